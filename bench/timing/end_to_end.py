"""Whole epochs on the CPU, timed from outside: train.py, two runs of it at once, one on two processes, and timm's own.

An epoch's time is that between two rows of summary.csv, which both scripts write when an epoch is done: training,
validation on the same test images, and saving. The first epoch, with start-up and warm-up, doesn't count.
"""
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

from harness.cli import flag, number, positive_int
from harness.data.sources import SourceSettings, open_data
from harness.errors import UserError
from harness.machine import cores
from harness.paths import TRAIN
from harness.run_folder import RunFolder


@dataclass(frozen=True)
class EndToEndSettings:
    """End to end."""
    timm_train: str | None = flag(None, "path of timm's train.py, to be timed beside it")
    data_dir: str | None = flag(None, 'folder of parquet files (default: generated pictures)')
    images: int = flag(6400, 'training images an epoch', type=positive_int)
    epochs: int = flag(3, 'epochs, the first to warm up', type=number(int, 3))
    repeats: int = flag(2, 'turns of each contestant', type=positive_int)


class Training(NamedTuple):
    """What is timed.

    Attributes:
        project: Whose train.py: 'timm_sd' or 'timm'.
        at_once: Trainings at the same time.
        processes: Of each training.
    """
    project: str
    at_once: int = 1
    processes: int = 1

    @property
    def label(self) -> str:
        """For people; results are told apart by the fields."""
        runs = f', {self.at_once} runs at once' if self.at_once > 1 else ''
        processes = f', {self.processes} processes' if self.processes > 1 else ''
        owner = "timm's " if self.project == 'timm' else ''
        return f'{owner}train.py{runs}{processes}'


def write_subset(folder: Path, settings: EndToEndSettings) -> None:
    """Parquet files of the first --images training images and a fifth as many test images, columns img and label."""
    splits = open_data(SourceSettings(data_dir=settings.data_dir), Accelerator()).splits if settings.data_dir else {}
    for split, images in (('train', settings.images), ('test', settings.images // 5)):
        if settings.data_dir:
            data = splits[split]
            if len(data) < images:
                raise UserError(f'--data-dir {settings.data_dir} has {len(data)} images in {split}, '
                                f'--images {settings.images} wants {images}')
            data = data.select(range(images))
        else:
            generator = np.random.default_rng(0)
            smooth = generator.integers(0, 256, (images, 8, 8, 3), dtype=np.uint8)
            features = datasets.Features(img=datasets.Image(), label=datasets.ClassLabel(num_classes=10))
            data = datasets.Dataset.from_dict(
                dict(img=[Image.fromarray(picture).resize((32, 32), Image.Resampling.BILINEAR) for picture in smooth],
                     label=generator.integers(0, 10, images)), features=features)
        data.to_parquet(str(folder / f'{split}-00000-of-00001.parquet'))


def commands(model: str, drop_path: float, batch_size: int, amp: bool, data: Path, output: Path,
             settings: EndToEndSettings) -> dict[Training, list[list[str]]]:
    """The command lines of each contestant, which run at the same time."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    shared = ['--model', model, '--drop-path', str(drop_path), '--epochs', str(settings.epochs), '--opt', 'sgd',
              '--lr', '0.1', '--channels-last', '--output', str(output)]
    ours = ['--amp' if amp else '--no-amp', *shared, '-c', 'cifar10', '--data-dir', str(data), '--val-split', 'test',
            '--experiment']
    launch = ['accelerate', 'launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1',
              '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', str(port)]
    half = ['--threads', str(max(1, cores() // 2)), '-b', str(batch_size)]
    found = {
        Training('timm_sd'): [[sys.executable, TRAIN, *ours, 'one', '-b', str(batch_size)]],
        Training('timm_sd', at_once=2): [[sys.executable, TRAIN, *ours, name, *half] for name in ('left', 'right')],
        Training('timm_sd', processes=2): [
            [*launch, TRAIN, *ours, 'two', '-b', str(batch_size // 2), '--require-processes', '2']],
    }
    if settings.timm_train:
        found[Training('timm')] = [[
            sys.executable, '-m', 'timm_sd', settings.timm_train, *shared, '--model-kwargs', 'drop_path_mode=sample',
            '--dataset', f'hfds/{data}', '--input-key', 'img', '--target-key', 'label', '--num-classes', '10',
            '--val-split', 'test', '--train-crop-mode', 'rkrc', '--color-jitter', '0', '--device', 'cpu',
            *(['--amp', '--amp-dtype', 'bfloat16'] if amp else []), '-b', str(batch_size), '-j', str(cores()),
            '--no-prefetcher', '--sched', 'step', '--warmup-epochs', '0', '--log-interval', '1000',
            '--experiment', 'timm']]
    return found


def epoch_seconds(together: list[list[str]], epochs: int) -> list[float]:
    """Runs trainings at the same time; seconds of each epoch but the first, divided by how many they are."""
    ends: list[list[float]] = [[] for _ in together]
    folders = [RunFolder(Path(*(command[command.index(flag) + 1] for flag in ('--output', '--experiment'))))
               for command in together]
    with tempfile.TemporaryFile('w+') as log:
        processes = [subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT,
            env=dict(os.environ, ACCELERATE_USE_CPU='true'))
            for command in together]
        try:
            while min(map(len, ends)) < epochs and not any(process.poll() for process in processes):
                time.sleep(0.02)
                for folder, own in zip(folders, ends, strict=True):
                    own += [time.perf_counter()] * (folder.epochs_written() - len(own))
        finally:
            for process in processes:
                process.terminate()
                process.wait()
        if min(map(len, ends)) < epochs:
            log.seek(0)
            raise UserError(f'{" ".join(together[0][:4])} ... failed: {log.read()[-1500:]}')
    return [statistics.mean(after - before for before, after in pairs) / len(together)
            for pairs in zip(*(list(zip(own, own[1:], strict=False)) for own in ends), strict=True)]


def time_epochs(model: str, drop_path: float, batch_size: int, amp: bool,
                settings: EndToEndSettings) -> dict[Training, list[float]]:
    """Seconds of each epoch but the first of every contestant, which run in turns.

    Args:
        model: Name of the network.
        drop_path: 1 - p_L.
        batch_size: Images a step, of all processes.
        amp: Train in bf16 autocast.
        settings: See `EndToEndSettings`.
    """
    seconds: dict[Training, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch, 'data')
        data.mkdir()
        write_subset(data, settings)
        for repeat in range(settings.repeats):
            turn = commands(model, drop_path, batch_size, amp, data, Path(scratch, f'turn-{repeat}'), settings)
            for training, together in tqdm(turn.items(), desc=f'{model}, turn {repeat + 1} of {settings.repeats}'):
                seconds.setdefault(training, []).extend(epoch_seconds(together, settings.epochs))
    return seconds
