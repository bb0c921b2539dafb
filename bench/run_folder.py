"""The run folder, the only thing that passes between bench tools, and its files, each replaced in one piece.

    args.yaml            every flag                      results.json         errors, time, hardware, versions
    summary.csv          one row an epoch                model.safetensors    the best epoch's weights, plain network
    checkpoints/         what --resume goes on from      curves.png
"""
import csv
import fcntl
import io
import json
import os
import platform
import re
import sys
import zipfile
from datetime import datetime
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
import yaml
from accelerate import Accelerator
from torch import nn

import timm_sd
from config import FREE, UserError, cores

PART = 15 * 2**20


def write_atomic(path: Path, content: bytes) -> None:
    """Writes a file in one piece: after a crash or on a full disk the old one is still there, whole.

    Raises:
        UserError: If the file can't be written.
    """
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
        with open(temporary, 'wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f'{path} can not be written ({error.strerror}); what was saved before is good') from error


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows under the columns that any of them has."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(key for row in rows for key in row)),
                            lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode())


def write_parts(path: Path, content: bytes) -> None:
    """Writes a large file as several, `path` and `path`.1, .2 and so on, none larger than `PART`.

    `path` itself comes last: it says that the others are there. A run's state then passes through what limits the size
    of a file, and that of 1202 layers is 155 MB.
    """
    parts = [content[start:start + PART] for start in range(0, len(content), PART)]
    for number, part in reversed(list(enumerate(parts))):
        write_atomic(path.with_name(f'{path.name}.{number}') if number else path, part)


def read_parts(path: Path) -> bytes:
    """What `write_parts` wrote."""
    others = sorted(path.parent.glob(f'{path.name}.*'), key=lambda part: int(part.suffix[1:]))
    return b''.join(part.read_bytes() for part in (path, *others))


def epochs_done(path: Path) -> int:
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

    def create(self, args: dict[str, Any]) -> None:
        """Makes the folder and writes args.yaml, unless it is there already.

        Raises:
            UserError: If the folder can't be written.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f'output folder {self.path} can not be written ({error.strerror}); '
                            'choose another with --output') from error
        if not (self.path / 'args.yaml').exists():
            write_atomic(self.path / 'args.yaml', yaml.safe_dump(args).encode())

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

    def read_args(self) -> dict[str, Any] | None:
        """args.yaml, or None if there is none that can be read."""
        path = self.path / 'args.yaml'
        try:
            args = yaml.safe_load(path.read_text()) if path.exists() else None
        except yaml.YAMLError:
            args = None
        return args if isinstance(args, dict) else None

    def read_results(self) -> dict[str, Any] | None:
        """results.json, or None before the run is complete."""
        path = self.path / 'results.json'
        return json.loads(path.read_text()) if path.exists() else None

    def epochs_written(self) -> int:
        """Rows of summary.csv, while the run goes on too; 0 before there is one."""
        path = self.path / 'summary.csv'
        return len(path.read_text().splitlines()) - 1 if path.exists() else 0

    def write_results(self, results: dict[str, Any]) -> None:
        write_atomic(self.path / 'results.json', (json.dumps(results, indent=2) + '\n').encode())

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
        # Of the best one more: each checkpoint may name weights of its own, and a resume needs them.
        for whole, kept in (('checkpoint-*.pt', history), ('best-*.safetensors', history + 1)):
            oldest = min(sorted(map(epochs_done, self.checkpoints.glob(whole)))[-kept:], default=0)
            for path in self.checkpoints.glob(f'{whole}*'):  # with parts that a kill left alone
                if epochs_done(path) < oldest:
                    path.unlink()

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The newest whole checkpoint, or None; a damaged one is passed over with a warning."""
        for path in sorted(self.checkpoints.glob('checkpoint-*.pt'), reverse=True):
            try:
                return _load(path)
            except Exception as error:  # zipfile, pickle and torch each have their own for a damaged file
                reason = ' '.join(str(error).split())[:60]
                print(f'warning: {path} is damaged ({reason}); going on from one before it, or anew',
                      file=sys.stderr, flush=True)
        return None

    def remove_after(self, epochs: int) -> None:
        """Removes what lies beyond the first `epochs` epochs, left by a run that was killed or damaged."""
        for path in self.checkpoints.glob('*-*'):
            if epochs_done(path) > epochs:
                path.unlink()


def raw_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor as it is. A state_dict won't do for a bit-exact resume: with scale='eval' it is folded."""
    return {name: tensor.detach() for tensors in (model.named_parameters(), model.named_buffers())
            for name, tensor in tensors}


@torch.no_grad()
def load_raw_state(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    for name, tensor in raw_state(model).items():
        tensor.copy_(state[name])


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


def _differences(args: dict[str, Any], old: dict[str, Any]) -> list[str]:
    keys = args.keys() & old.keys() - {*FREE, 'batch_size'}  # that of all processes may not differ
    return [f'{key} {old[key]} -> {args[key]}' for key in sorted(keys) if args[key] != old[key]]


def find_run_folder(args: dict[str, Any], name: str) -> RunFolder:
    """The folder that these flags mean: a new one, or with `resume` the one to go on with.

    Args:
        args: The flags. 'auto' for `resume` means the folder of `experiment`, or without one the newest folder under
            `output` with the same flags, or a new one if there is none.
        name: What a new folder is called, behind the time.

    Raises:
        UserError: If a new run would overwrite an old one, or the flags differ from those of the run to go on with.
    """
    output, resume = Path(args['output']), args['resume']
    name = re.sub(r'[^\w.-]', '_', name)  # of hf-hub:ORG/NAME too: `auto` looks into the folders of `output`, no deeper
    folder = RunFolder(output / (args['experiment'] or f'{datetime.now():%Y%m%d-%H%M%S}-{name}'))
    if resume not in (None, 'auto'):
        folder = RunFolder(Path(resume))
        if folder.read_args() is None:
            raise UserError(f'--resume {resume} is no run folder: it has no args.yaml')
    elif resume == 'auto' and not args['experiment']:
        for path in sorted(output.glob('*/args.yaml'), key=lambda path: path.stat().st_mtime, reverse=True):
            old = RunFolder(path.parent).read_args()
            if old is not None and old.keys() == args.keys() and not _differences(args, old):
                return RunFolder(path.parent)
    old = folder.read_args()
    if old is not None:
        if resume is None:
            raise UserError(f'run folder {folder.path} exists; go on with --resume auto, or choose '
                            'another --experiment')
        differences = _differences(args, old)
        if differences:
            raise UserError(f'{folder.path} was run with other flags ({"; ".join(differences)}); '
                            'use the same, or choose another --experiment')
    return folder


def without_paths(results: dict[str, Any]) -> dict[str, Any]:
    """results.json for others to see: without the paths of this machine."""
    return dict(results, args=dict(results['args'], data_dir=None, output=None, resume=None))


def hardware(accelerator: Accelerator, amp: bool) -> dict[str, Any]:
    """What a figure was measured on: device, processes, threads and precision."""
    if accelerator.device.type == 'cuda':
        device = torch.cuda.get_device_name(accelerator.device)
    else:
        info = Path('/proc/cpuinfo')
        lines = info.read_text().splitlines() if info.exists() else []
        names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
        device = f'{names[0] if names else platform.machine()}, {cores()} cores'
    return dict(device=device, cores=cores(), processes=accelerator.num_processes, threads=torch.get_num_threads(),
                amp=amp)


def versions() -> dict[str, str]:
    """What a figure was measured with."""
    return dict(python=platform.python_version(), torch=torch.__version__, timm=timm.__version__,
                timm_sd=timm_sd.__version__)
