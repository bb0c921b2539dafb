"""The run folder, the only thing that passes between bench tools, and its files, each replaced in one piece.

    args.yaml            every flag                      results.json         errors, time, hardware, versions
    summary.csv          one row an epoch                model.safetensors    the best epoch's weights, plain network
    checkpoints/         what --resume goes on from      curves.png           loss and error by epoch
    samples.png          training images, as the network sees them
    mistakes.png         test images that the best weights get wrong
"""
import csv
import fcntl
import io
import json
import os
import re
import sys
import zipfile
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from harness.cli import flag
from harness.errors import UserError, one_line
from harness.files import make_folder, read_parts, write_atomic, write_csv, write_json, write_parts

# Flags that change nothing that is computed beyond rounding: they may differ between a run and its resumption.
MAY_DIFFER = ('resume', 'output', 'experiment', 'log_interval', 'checkpoint_interval', 'checkpoint_hist', 'data_dir',
              'threads', 'require_processes', 'grad_checkpointing', 'cuda_graphs', 'validation_batch_size')


@dataclass(frozen=True)
class FolderSettings:
    """Run folder."""
    output: str = flag('output/train', 'folder of the run folders')
    experiment: str | None = flag(None, 'name of the run folder (default: time, model and image size)')
    resume: str | None = flag(None, "'auto', or a run folder to go on with")


def number_in_name(path: Path) -> int:
    """The number in the name of a file in checkpoints/."""
    return int(path.name.partition('-')[2].partition('.')[0])


class RunFolder:
    """One run's folder; nothing is written before `create`.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / 'checkpoints'

    def create(self, flags: dict[str, Any]) -> None:
        """Makes the folder and writes args.yaml, unless it is there already.

        Raises:
            UserError: If the folder can't be written.
        """
        make_folder(self.checkpoints, '--output')
        if not (self.path / 'args.yaml').exists():
            write_atomic(self.path / 'args.yaml', yaml.safe_dump(flags).encode())

    def lock(self) -> None:
        """Keeps other processes from training here until this one ends, however it ends.

        Raises:
            UserError: If another one does already.
        """
        file = os.open(self.checkpoints / '.lock', os.O_RDWR | os.O_CREAT)  # never closed: that would unlock it
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f'{self.path} is being trained by another process; wait for it, or choose '
                            'another --experiment') from error

    def read_flags(self) -> dict[str, Any] | None:
        """args.yaml, or None if there is none that can be read."""
        path = self.path / 'args.yaml'
        try:
            flags = yaml.safe_load(path.read_text()) if path.exists() else None
        except yaml.YAMLError:
            flags = None
        return flags if isinstance(flags, dict) else None

    def read_results(self) -> dict[str, Any] | None:
        """results.json, or None before the run is complete."""
        path = self.path / 'results.json'
        return json.loads(path.read_text()) if path.exists() else None

    def read_summary(self) -> list[dict[str, float]]:
        """The rows of summary.csv."""
        with (self.path / 'summary.csv').open() as file:
            return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]

    def epochs_written(self) -> int:
        """Rows of summary.csv, while the run goes on too; 0 before there is one."""
        path = self.path / 'summary.csv'
        return len(path.read_text().splitlines()) - 1 if path.exists() else 0

    def write_results(self, results: dict[str, Any]) -> None:
        """Writes results.json, which says that the run is complete: it comes last."""
        write_json(self.path / 'results.json', results)

    def write_summary(self, rows: list[dict[str, float]]) -> None:
        """Writes summary.csv, with timm's columns."""
        write_csv(self.path / 'summary.csv', rows)

    def write_weights(self, weights: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
        """Writes model.safetensors; metadata that isn't text becomes JSON."""
        write_atomic(self.path / 'model.safetensors', _as_safetensors(weights, metadata))

    def save_best(self, weights: dict[str, torch.Tensor], epoch: int) -> None:
        """Keeps the weights of the best epoch so far, numbered, as checkpoints are, by the epochs done."""
        write_parts(self.checkpoints / f'best-{epoch + 1:04d}.safetensors', _as_safetensors(weights, dict(epoch=epoch)))

    def load_best(self, epoch: int) -> dict[str, torch.Tensor]:
        """What `save_best` kept of this epoch."""
        return safetensors.torch.load(read_parts(self.checkpoints / f'best-{epoch + 1:04d}.safetensors'))

    def save_checkpoint(self, state: dict[str, Any], history: int) -> None:
        """Saves the state after `state['epoch']` epochs, then removes all but the last `history`."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_parts(self.checkpoints / f'checkpoint-{state["epoch"]:04d}.pt', buffer.getvalue())
        # A resume from the oldest checkpoint needs the best weights of its time: one more of them is kept.
        for whole, kept in (('checkpoint-*.pt', history), ('best-*.safetensors', history + 1)):
            oldest = min(sorted(map(number_in_name, self.checkpoints.glob(whole)))[-kept:], default=0)
            for path in self.checkpoints.glob(f'{whole}*'):  # also parts without their whole
                if number_in_name(path) < oldest:
                    path.unlink()

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The newest whole checkpoint, or None; a damaged one is passed over with a warning."""
        for path in sorted(self.checkpoints.glob('checkpoint-*.pt'), reverse=True):
            try:
                return _load(path)
            except Exception as error:  # zipfile, pickle and torch raise different ones
                print(f'warning: {path} is damaged ({one_line(error, 60)}); going on from one before it, or anew',
                      file=sys.stderr, flush=True)
        return None

    def remove_after(self, epochs: int) -> None:
        """Removes what lies beyond the first `epochs` epochs, left by a run that was killed or damaged."""
        for path in self.checkpoints.glob('*-*'):
            if number_in_name(path) > epochs:
                path.unlink()


def _as_safetensors(weights: dict[str, torch.Tensor], metadata: dict[str, Any]) -> bytes:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    return safetensors.torch.save(tensors, dict(texts, format='pt'))


def _load(path: Path) -> dict[str, Any]:
    content = io.BytesIO(read_parts(path))
    with zipfile.ZipFile(content) as archive:
        damaged = archive.testzip()  # torch.load doesn't check the CRCs
    if damaged is not None:
        raise ValueError(f'wrong CRC in {damaged}')
    content.seek(0)
    return torch.load(content, map_location='cpu', weights_only=True)


def _differences(flags: dict[str, Any], old: dict[str, Any]) -> list[str]:
    keys = flags.keys() & old.keys() - {*MAY_DIFFER, 'batch_size'}  # global_batch_size may not differ
    return [f'{key} {old[key]} -> {flags[key]}' for key in sorted(keys) if flags[key] != old[key]]


def find_run_folder(settings: FolderSettings, flags: dict[str, Any], name: str) -> RunFolder:
    """The folder that the flags mean: a new one, or with `resume` the one to go on with.

    Args:
        settings: 'auto' for `resume` means the folder of `experiment`, or without one the newest folder under `output`
            with the same flags, or a new one if there is none.
        flags: All flags, to be compared with those of the folder's run.
        name: What a new folder is called, behind the time.

    Raises:
        UserError: If a new run would overwrite an old one, or the flags differ from those of the run to go on with.
    """
    output, resume = Path(settings.output), settings.resume
    name = re.sub(r'[^\w.-]', '_', name)  # one folder below `output`, where 'auto' looks, for hf-hub:ORG/NAME too
    folder = RunFolder(output / (settings.experiment or f'{datetime.now():%Y%m%d-%H%M%S}-{name}'))
    if resume not in (None, 'auto'):
        folder = RunFolder(Path(resume))
        if folder.read_flags() is None:
            raise UserError(f'--resume {resume} is no run folder: it has no args.yaml')
    elif resume == 'auto' and not settings.experiment:
        for path in sorted(output.glob('*/args.yaml'), key=lambda path: path.stat().st_mtime, reverse=True):
            old = RunFolder(path.parent).read_flags()
            if old is not None and old.keys() == flags.keys() and not _differences(flags, old):
                return RunFolder(path.parent)
    old = folder.read_flags()
    if old is not None:
        if resume is None:
            raise UserError(f'run folder {folder.path} exists; go on with --resume auto, or choose '
                            'another --experiment')
        differences = _differences(flags, old)
        if differences:
            raise UserError(f'{folder.path} was run with other flags ({"; ".join(differences)}); '
                            'use the same, or choose another --experiment')
    return folder


def open_run_folder(settings: FolderSettings, flags: dict[str, Any], accelerator: Accelerator, name: str) -> RunFolder:
    """Finds the run folder on the main process, makes it, and tells the others: the clock is in its name.

    See `find_run_folder`.
    """
    found: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            found = [find_run_folder(settings, flags, name)]
            found[0].create(flags)
            found[0].lock()
        except UserError as error:
            found = [error]
    broadcast_object_list(found)
    if isinstance(found[0], UserError):
        raise found[0]
    return found[0]


def without_paths(results: dict[str, Any]) -> dict[str, Any]:
    """results.json for others to see: without the paths of this machine."""
    return dict(results, args=dict(results['args'], data_dir=None, output=None, resume=None))
