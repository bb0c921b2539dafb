"""The run folder, the only thing that passes between bench tools, and its files, each replaced in one piece.

    args.yaml            every flag                      results.json         errors, time, hardware, versions
    summary.csv          one row an epoch                model.safetensors    the best epoch's weights, plain network
    model_ema.safetensors or model_without_ema.safetensors, with --model-ema: the worse of the two on the validation
                         images; model.safetensors is the better
    checkpoints/         what --resume goes on from      curves.png           loss and error by epoch
    samples.png          training images, as the network sees them
    mistakes.png         test images that the best weights get wrong
"""
import csv
import hashlib
import io
import json
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml

from harness.errors import UserError, one_line, user_errors
from harness.files import (
    folder_in_one_piece,
    make_folder,
    read_mapping,
    read_parts,
    write_atomic,
    write_csv,
    write_json,
    write_parts,
)
from timm_sd.weight_files import check_weights, checksum

# What a run leaves besides args.yaml.
LEFT_BY_A_RUN = ('checkpoints/*-*', 'results.json', 'summary.csv', 'model.safetensors')
# What is read of results.json and of each row of summary.csv; older runs have these too.
RESULTS = ('args', 'best_epoch', 'blocks', 'changed_from_recipe', 'dataset', 'drop_path_rate', 'epoch_seconds',
           'epochs', 'expected_depth', 'hardware', 'images', 'images_per_second', 'model', 'param_count', 'recipe',
           'seed', 'test_best', 'test_last', 'val_top1_err', 'val_top1_err_last', 'versions')
COLUMNS = ('epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr', 'train_seconds')
WRITTEN_ANEW = 'remove results.json and run the same training again with --resume auto, which writes it anew'


def number_in_name(path: Path) -> int:
    """The number in the name of a file in checkpoints/."""
    return int(path.name.partition('-')[2].partition('.')[0])


def read_metadata(path: str | Path) -> dict[str, str]:
    """What train.py wrote into a safetensors file about its run; empty for files of others."""
    try:
        with safetensors.safe_open(path, 'pt') as file:
            texts = file.metadata() or {}
    except (OSError, safetensors.SafetensorError):
        return {}
    return texts if 'timm_sd' in texts else {}


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


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
            _lock(file)
        except OSError as error:
            raise UserError(f'{self.path} is being trained by another process; wait for it, or choose '
                            'another --experiment') from error

    def read_flags(self) -> dict[str, Any] | None:
        """args.yaml, or None where no run was begun.

        Raises:
            UserError: If it can't be read, or is missing where a run was begun.
        """
        path = self.path / 'args.yaml'
        way_out = 'bring it back, or choose another --experiment'
        if os.path.exists(path):
            return read_mapping(path, yaml.safe_load, way_out)
        left = next((file for pattern in LEFT_BY_A_RUN for file in self.path.glob(pattern)), None)
        if left is not None:
            raise UserError(f'{self.path} has a {left.name} of a run, but no args.yaml; {way_out}')
        return None

    def read_results(self) -> dict[str, Any] | None:
        """results.json, or None before the run is complete.

        Raises:
            UserError: If it can't be read, or something is missing in it.
        """
        path = self.path / 'results.json'
        if not os.path.exists(path):
            return None
        results = read_mapping(path, json.loads, WRITTEN_ANEW)
        missing = [key for key in RESULTS if key not in results]
        if missing:
            raise UserError(f'{path} lacks {", ".join(missing)}; {WRITTEN_ANEW}')
        return results

    def read_summary(self) -> list[dict[str, float]]:
        """The rows of summary.csv.

        Raises:
            UserError: If it can't be read, or a row is damaged.
        """
        path = self.path / 'summary.csv'
        try:
            # What is no text is replaced, so that the row it is in can be named.
            lines = [*csv.reader(path.read_text(encoding='utf-8', errors='replace').splitlines())]
        except (OSError, ValueError, csv.Error) as error:
            raise UserError(f'{path} can not be read ({one_line(error, 100)}); {WRITTEN_ANEW}') from error
        header = lines.pop(0) if lines else []
        missing = [column for column in COLUMNS if column not in header]
        if missing or not lines:
            raise UserError(f'{path} lacks {", ".join(missing) or "rows"}; {WRITTEN_ANEW}')
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                rows.append({key: float(value) for key, value in zip(header, line, strict=True)})
            except ValueError as error:
                raise UserError(
                    f'{path} is damaged in row {number}, {",".join(line)[:60]!r}; {WRITTEN_ANEW}') from error
        return rows

    def read_run(self) -> tuple[dict[str, Any], list[dict[str, float]]] | None:
        """results.json and the rows of summary.csv, or None before the run is complete.

        Raises:
            UserError: If one of them can't be read, or they are of two runs.
        """
        results = self.read_results()
        if results is None:
            return None
        rows = self.read_summary()
        last = round(100 - rows[-1]['eval_top1_ema' if results.get('averaged') else 'eval_top1'], 4)
        if last != results['val_top1_err_last']:
            raise UserError(f'{self.path} holds files of two runs: the last validation error of summary.csv is {last}, '
                            f'of results.json {results["val_top1_err_last"]}; {WRITTEN_ANEW}')
        return results, rows

    def epochs_written(self) -> int:
        """Rows of summary.csv, while the run goes on too; 0 before there is one."""
        path = self.path / 'summary.csv'
        return max(0, len(path.read_bytes().splitlines()) - 1) if path.exists() else 0

    def write_results(self, results: dict[str, Any]) -> None:
        """Writes results.json, which says that the run is complete: it comes last."""
        write_json(self.path / 'results.json', results)

    def write_summary(self, rows: list[dict[str, float]]) -> None:
        """Writes summary.csv, with timm's columns."""
        write_csv(self.path / 'summary.csv', rows)

    def write_weights(self, weights: dict[str, torch.Tensor], metadata: dict[str, Any],
                      name: str = 'model.safetensors') -> str:
        """Writes model.safetensors, and returns its SHA-256; metadata that isn't text becomes JSON."""
        content = _as_safetensors(weights, metadata)
        write_atomic(self.path / name, content)
        return hashlib.sha256(content).hexdigest()

    def check_one_run(self, results: dict[str, Any]) -> str:
        """Checks that model.safetensors is whole and finite, and of the run that results.json tells.

        Args:
            results: Its results.json.

        Returns:
            Its SHA-256.

        Raises:
            UserError: If it isn't.
        """
        path = self.path / 'model.safetensors'
        with user_errors(f'{path} can not be used'):
            check_weights(str(path), {})
        metadata = read_metadata(path)
        if not metadata:
            raise UserError(f'{path} does not say which run it is of; {WRITTEN_ANEW}')
        said = dict(results, selected_epoch=results['best_epoch'], test_top1_err=results['test_best']['top1_err'],
                    test_top1_err_last_epoch=results['test_last']['top1_err'])
        for key in metadata.keys() & said.keys():
            if metadata[key] != _as_text(said[key]):
                raise UserError(f'{self.path} holds files of two runs: {key} of model.safetensors is {metadata[key]}, '
                                f'of results.json {_as_text(said[key])}; {WRITTEN_ANEW}')
        found = checksum(str(path), like='0' * 64)
        if results.get('weights_sha256', found) != found:  # older runs say none
            raise UserError(f'{path} has another SHA-256 than results.json says: it is damaged, or of another run; '
                            f'{WRITTEN_ANEW}')
        return found

    def save_best(self, weights: dict[str, torch.Tensor], epoch: int, suffix: str = '') -> None:
        """Keeps the weights of the best epoch so far, numbered, as checkpoints are, by the epochs done.

        Args:
            weights: A state dict.
            epoch: From 0.
            suffix: '_ema' of the average of the weights.
        """
        write_parts(self.checkpoints / f'best{suffix}-{epoch + 1:04d}.safetensors',
                    _as_safetensors(weights, dict(epoch=epoch)))

    def load_best(self, epoch: int, suffix: str = '') -> dict[str, torch.Tensor]:
        """What `save_best` kept of this epoch."""
        path = self.checkpoints / f'best{suffix}-{epoch + 1:04d}.safetensors'
        with user_errors(f'{path} holds the best weights, and can not be read'):
            return safetensors.torch.load(read_parts(path))

    def save_checkpoint(self, state: dict[str, Any], history: int) -> None:
        """Saves the state after `state['epoch']` epochs, then removes all but the last `history`."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_parts(self.checkpoints / f'checkpoint-{state["epoch"]:04d}.pt', buffer.getvalue())
        # A resume from the oldest checkpoint needs the best weights of its time: one more of them is kept.
        for whole, kept in (('checkpoint-*.pt', history), ('best-*.safetensors', history + 1),
                            ('best_ema-*.safetensors', history + 1)):
            oldest = min(sorted(map(number_in_name, self.checkpoints.glob(whole)))[-kept:], default=0)
            for path in self.checkpoints.glob(f'{whole}*'):  # also parts without their whole
                if number_in_name(path) < oldest:
                    path.unlink()

    def load_checkpoint(self, restore: Callable[[dict[str, Any]], None] = lambda state: None) -> dict[str, Any] | None:
        """The newest whole checkpoint, or None if there is none at all; a damaged one is passed over with a warning.

        Args:
            restore: Goes back to a checkpoint; one that it fails with counts as damaged.

        Raises:
            UserError: If all are damaged: to begin anew would remove them.
        """
        damaged: list[str] = []
        for path in sorted(self.checkpoints.glob('checkpoint-*.pt'), reverse=True):
            try:
                state = _load(path)
                restore(state)
            except UserError:
                raise
            except Exception as error:  # zipfile, pickle and torch raise different ones
                damaged.append(f'{path} is damaged ({type(error).__name__}: {one_line(error, 60)})')
            else:
                for what in damaged:
                    print(f'warning: {what}; going on from one before it', file=sys.stderr, flush=True)
                return state
        if damaged:
            raise UserError(f'{self.path} has no checkpoint that can be read: {damaged[0]}; bring it back if it was '
                            'written on another disk or by another version, or choose another --experiment')
        return None

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is one, damaged or not."""
        return any(self.checkpoints.glob('checkpoint-*.pt'))

    def begin_from(self, other: 'RunFolder') -> None:
        """Copies another run's checkpoints, in one piece."""
        with folder_in_one_piece(self.checkpoints) as new:
            for path in other.checkpoints.glob('*-*'):
                write_atomic(new / path.name, path.read_bytes())

    def remove_after(self, epochs: int) -> None:
        """Removes what lies beyond the first `epochs` epochs, left by a run that was killed or damaged."""
        for path in self.checkpoints.glob('*-*'):
            if number_in_name(path) > epochs:
                path.unlink()


def _lock(file: int) -> None:
    # Not flock, as the package filelock does: workers inherit it, and outlive a killed process by seconds.
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _as_safetensors(weights: dict[str, torch.Tensor], metadata: dict[str, Any]) -> bytes:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    texts = {key: _as_text(value) for key, value in metadata.items()}
    return safetensors.torch.save(tensors, dict(texts, format='pt'))


def _load(path: Path) -> dict[str, Any]:
    content = io.BytesIO(read_parts(path))
    with zipfile.ZipFile(content) as archive:
        damaged = archive.testzip()  # torch.load doesn't check the CRCs
    if damaged is not None:
        raise ValueError(f'wrong CRC in {damaged}')
    content.seek(0)
    return torch.load(content, map_location='cpu', weights_only=True)
