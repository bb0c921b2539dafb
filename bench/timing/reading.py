"""How long a data set of large images takes to open, how fast it is read, and the memory that takes, beside timm's.

Both decode the same JPEGs of 224 px and run timm's transforms of training on them, without a network behind. A pass
over all images counts with its start; workers are there already, as from the second epoch of a training on (those of
a stream are not).
"""
import io
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import numpy as np
import psutil
from accelerate import Accelerator
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_dataset, create_loader
from tqdm import tqdm

from harness.cli import flag, positive_int
from harness.data.columns import open_split
from harness.data.loaders import make_batches
from harness.data.settings import AugmentationSettings, ImageSettings
from harness.data.sources import SourceSettings, open_data
from harness.data.splits import load_images
from harness.errors import UserError
from harness.paths import BENCH
from timing.rows import spread

SIZE = (3, 224, 224)
CFG: dict[str, Any] = dict(input_size=SIZE, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD,
                           interpolation='bilinear', crop_pct=0.95, crop_mode='center')
SHARDS = 8
CLASSES = 10
MEMORY_BATCHES = 40

# Opens a data set; then a batch size and a number of workers make batches of it.
Open = Callable[[], Callable[[int, int], Iterable[Any]]]


@dataclass(frozen=True)
class ReadingSettings:
    """Reading."""
    workers: int = flag(2, 'processes that read', short='-j', type=positive_int)
    memory_workers: list[int] = flag([0, 2, 8], 'whose memory is measured', type=int, nargs='*', metavar='WORKERS')


def _encoded(data_dir: str | None) -> list[bytes]:
    """JPEGs of a local data set's training split, or generated ones of about 30 KiB."""
    if data_dir:
        source = SourceSettings(data_dir=data_dir)
        rows: Any = open_split(open_data(source, Accelerator()), source, 'train').rows
        return [image['bytes'] or Path(image['path']).read_bytes() for image in rows['image']]
    found, generator = [], np.random.default_rng(0)
    for _ in range(200):
        smooth = Image.fromarray(generator.integers(0, 256, (56, 56, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        smooth.resize(SIZE[1:], Image.Resampling.BICUBIC).save(buffer, 'JPEG')
        found.append(buffer.getvalue())
    return found


def write_images(folder: Path, images: int, data_dir: str | None) -> None:
    """The same JPEGs as class folders, pictures/train/CLASS/*.jpg, and as parquet/train-*.parquet."""
    encoded = _encoded(data_dir)
    for number in range(images):
        file = folder / 'pictures' / 'train' / f'class {number % CLASSES}' / f'{number:06d}.jpg'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded[number % len(encoded)])
    (folder / 'parquet').mkdir()
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(num_classes=CLASSES))
    for shard in range(SHARDS):
        numbers = range(shard * images // SHARDS, (shard + 1) * images // SHARDS)
        rows = dict(image=[dict(bytes=encoded[number % len(encoded)], path=None) for number in numbers],
                    label=[number % CLASSES for number in numbers])
        datasets.Dataset.from_dict(rows, features=features).to_parquet(
            str(folder / 'parquet' / f'train-{shard:05d}-of-{SHARDS:05d}.parquet'))


def _open_ours(folder: Path, streaming: bool, images: int) -> Callable[[int, int], Iterable[Any]]:
    """Opens a folder as train.py does; gives what makes batches of it, from their size and the workers."""
    accelerator, source = Accelerator(), SourceSettings(data_dir=str(folder), streaming=streaming)
    split = load_images(open_split(open_data(source, accelerator), source, 'train'), ImageSettings(in_memory=False),
                        channels=3, progress=False)

    def batches(size: int, workers: int) -> Iterable[Any]:
        return make_batches(split, ImageSettings(batch_size=size, workers=workers), CFG, accelerator,
                            AugmentationSettings(), epoch_size=images if streaming else None)
    return batches


def _open_timms(name: str, folder: Path) -> Callable[[int, int], Iterable[Any]]:
    """Likewise, as timm's train.py does."""
    data = create_dataset(name, root=str(folder), split='train', input_key='image' if name else None,
                          target_key='label' if name else None)

    def batches(size: int, workers: int) -> Iterable[Any]:
        return create_loader(
            data, SIZE, size, is_training=True, num_workers=workers, device=Accelerator().device,
            mean=CFG['mean'], std=CFG['std'], interpolation=CFG['interpolation'], scale=(0.08, 1.), color_jitter=0.4,
            persistent_workers=workers > 0)
    return batches


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _read(batches: Iterable[Any]) -> None:
    for _ in batches:
        pass


def _memory() -> float:
    """MiB of this process and its children; what several share is divided among them."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(process.memory_full_info().pss for process in processes) / 2**20


def _peak_memory(folder: Path, name: str, batch_size: int, workers: int) -> int:
    """By how many MiB a process that has read nothing yet, and its workers, grow at most while they open and read."""
    program = f'from timing.reading import grow; grow({str(folder)!r}, {name!r}, {batch_size}, {workers})'
    result = subprocess.run([sys.executable, '-c', program], cwd=BENCH, capture_output=True, text=True)
    if result.returncode:
        raise UserError(f'--reading can not read {name} with {workers} workers: {result.stderr[-300:]}')
    return round(float(result.stdout))


def grow(folder: str, name: str, batch_size: int, workers: int) -> None:
    """Reads, and prints by how many MiB this process and its workers grew at most."""
    before, peak = _memory(), 0.
    with _own_cache(Path(folder, 'cache')):
        batches = contestants(Path(folder), batch_size * MEMORY_BATCHES)[name]()(batch_size, workers)
        for number, _ in enumerate(islice(batches, MEMORY_BATCHES)):
            if number % 4 == 0:
                peak = max(peak, _memory())
    print(max(peak, _memory()) - before)


def contestants(folder: Path, images: int) -> dict[str, Open]:
    """Who opens and reads what `write_images` wrote."""
    pictures, parquet = folder / 'pictures', folder / 'parquet'
    return {'folder, timm_sd': partial(_open_ours, pictures, False, images),
            'folder, timm': partial(_open_timms, '', pictures),
            'parquet, timm_sd': partial(_open_ours, parquet, False, images),
            'parquet, timm': partial(_open_timms, f'hfds/{parquet}', parquet),
            'stream, timm_sd': partial(_open_ours, parquet, True, images)}


def _own_cache(folder: Path) -> AbstractContextManager:
    """Within it `datasets` prepares files in `folder`, so that the first opening finds nothing prepared."""
    return mock.patch.object(datasets.config, 'HF_DATASETS_CACHE', folder)


def measure_reading(images: int, data_dir: str | None, batch_size: int, rounds: int,
                    settings: ReadingSettings) -> list[dict[str, Any]]:
    """Opens and reads the same images from a folder, from parquet files and from a stream of these, in turns.

    Args:
        images: How many.
        data_dir: Data set whose JPEGs are taken, again and again; without it they are generated.
        batch_size: Images a batch.
        rounds: Turns of each contestant.
        settings: See `ReadingSettings`.

    Returns:
        A row for each source and project: seconds to open it the first time and again, images a second, and MiB by
        the number of workers; `ratio` is ours by timm's images a second, within a round.
    """
    if images < batch_size:
        raise UserError(f'--images {images} make no batch of -b {batch_size}')
    with tempfile.TemporaryDirectory() as scratch, _own_cache(Path(scratch, 'cache')):
        folder = Path(scratch)
        write_images(folder, images, data_dir)
        opens = contestants(folder, images)
        first = {name: _seconds(run) for name, run in opens.items()}
        memory = {name: {str(workers): _peak_memory(folder, name, batch_size, workers)
                         for workers in settings.memory_workers} for name in tqdm(opens, desc='memory', leave=False)}
        loaders = {name: run()(batch_size, settings.workers) for name, run in opens.items() if 'stream' not in name}
        for batches in loaders.values():  # starts the workers
            _read(batches)
        again: dict[str, list[float]] = {name: [] for name in opens}
        speeds: dict[str, list[float]] = {name: [] for name in opens}
        for round_ in tqdm(range(rounds), desc='rounds', leave=False):
            for name in list(opens)[::1 if round_ % 2 == 0 else -1]:
                again[name].append(_seconds(opens[name]))
                # The workers of a stream read ahead into its next pass: new ones each time have no start.
                batches = loaders[name] if name in loaders else opens[name]()(batch_size, settings.workers)
                speeds[name].append(images // batch_size * batch_size / _seconds(partial(_read, batches)))
                del batches  # ends the workers of a stream
    rows = []
    for name in opens:
        source, project = name.split(', ')
        theirs = speeds.get(f'{source}, timm', speeds['folder, timm'])
        rows.append(dict(
            source=source, project=project, images=images, batch_size=batch_size, workers=settings.workers,
            first_start_seconds=round(first[name], 3), start_seconds=spread(again[name]),
            images_per_second=spread(speeds[name]), mib=memory[name],
            ratio=spread([our / their for our, their in zip(speeds[name], theirs, strict=True)])))
    return rows


def print_reading(rows: list[dict[str, Any]]) -> None:
    """One line a row."""
    print(f'{"source":10}{"project":10}{"first start":>12}{"start":>9}{"images/s":>10}{"of timm":>9}   '
          f'{"quartiles":16}MiB')
    for row in rows:
        print('{source:10}{project:10}{first_start_seconds:12.2f}{start[median]:9.3f}{speed[median]:10.1f}'
              '{ratio[median]:9.3f}   {ratio[q1]:.3f} to {ratio[q3]:.3f}  {memory}'.format(
                  **row, start=row['start_seconds'], speed=row['images_per_second'],
                  memory=', '.join(f'{mib:.0f} with {workers}' for workers, mib in row['mib'].items())))
