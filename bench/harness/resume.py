"""Which run folder the flags mean: a new one, or with --resume the one to go on with."""
import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator

from harness.cli import flag
from harness.engine import default_amp
from harness.errors import UserError
from harness.ranks import from_main_process
from harness.run_folder import RunFolder

# Flags that change nothing that is computed beyond rounding: they may differ between a run and its resumption.
MAY_DIFFER = ('resume', 'output', 'experiment', 'log_interval', 'checkpoint_interval', 'checkpoint_hist', 'data_dir',
              'threads', 'timeout', 'workers', 'require_processes', 'grad_checkpointing', 'cuda_graphs',
              'validation_batch_size', 'log_with')

# Names that Windows keeps for devices, whatever follows behind a dot.
DEVICES = {'CON', 'PRN', 'AUX', 'NUL', *(f'{port}{number}' for port in ('COM', 'LPT') for number in range(10))}

# From the flags of a run to those that had an effect.
Effective = Callable[[dict[str, Any]], dict[str, Any]]


def folder_name(text: str) -> str:
    """An argparse type: the name of one folder, which every system can have, so that it can be copied to any."""
    if {*text} & {*'<>:"/\\|?*'} or not text.isprintable() or text != text.rstrip(' .') or not text \
            or text.partition('.')[0].rstrip(' ').upper() in DEVICES:
        raise argparse.ArgumentTypeError(f'{text!r} must be the name of one folder, which is made below --output, and '
                                         'one that Windows can have too')
    return text


@dataclass(frozen=True)
class FolderSettings:
    """Run folder."""
    output: str = flag('output/train', 'folder of the run folders')
    experiment: str | None = flag(None, 'name of the run folder (default: time, model and image size)',
                                  type=folder_name)
    resume: str | None = flag(None, "'auto', or a run folder to go on with")


class Target(NamedTuple):
    """The folder of a run, and the finished run that a new one begins from, to train it for longer."""
    folder: RunFolder
    finished: RunFolder | None = None


def _differences(flags: dict[str, Any], old: dict[str, Any], effective: Effective) -> dict[str, str]:
    """The flags that differ in what is computed, and how."""
    # global_batch_size and initial_sha256 may not differ; amp is the old run's where it is open
    free = {*MAY_DIFFER, 'batch_size', 'initial_checkpoint', *(['amp'] if flags['amp'] is None else [])}
    ours, theirs = effective(flags), effective(old)
    names = dict(initial_sha256='the file of --initial-checkpoint')
    return {key: f'{names.get(key, key)} {theirs[key]} -> {ours[key]}'
            for key in sorted(ours.keys() & theirs.keys() - free) if ours[key] != theirs[key]}


def _check_longer(flags: dict[str, Any], finished: RunFolder, folder: RunFolder, effective: Effective) -> Target:
    """What `folder` is to go on from, a finished run; UserError unless more epochs are all that is new."""
    old, weights = effective(finished.read_flags() or {}), f'--initial-checkpoint {finished.path}/model.safetensors'
    differences = _differences(flags, old, effective)
    if finished.read_results() is None:
        raise UserError(f'{finished.path} is not finished; finish it first, without --experiment')
    if not finished.has_checkpoint:
        raise UserError(f'{finished.path} has no checkpoint any more; {weights} begins with its weights')
    if differences.keys() != {'epochs'} or flags['epochs'] <= old['epochs']:
        raise UserError(f'{finished.path} was run with other flags ({"; ".join(differences.values()) or "the same"}); '
                        f'to go on with it in {folder.path} give more --epochs than its {old["epochs"]}, and nothing '
                        f'else; other flags begin with {weights}')
    return Target(folder, finished)


def _ways_on(folder: RunFolder, flags: dict[str, Any], old: dict[str, Any], differences: dict[str, str]) -> str:
    """What goes on from a run under other flags, in words."""
    if folder.read_results() is None:
        return ''
    longer = f': --resume {folder.path} --experiment NEW trains it for longer' \
        if differences.keys() == {'epochs'} and flags['epochs'] > old['epochs'] else ''
    return f'{longer}{"," if longer else ":"} --initial-checkpoint {folder.path}/model.safetensors --experiment NEW ' \
           'begins with its weights'


def find_run_folder(settings: FolderSettings, flags: dict[str, Any], name: str,
                    effective: Effective = dict) -> Target:
    """The folder that the flags mean: a new one, or with `resume` the one to go on with.

    Args:
        settings: 'auto' for `resume` means the folder of `experiment`, or without one the newest folder under `output`
            with the same flags, or a new one if there is none. A folder for `resume` and another `experiment` begin a
            new run that trains the finished one of the folder for longer.
        flags: All flags, to be compared with those of the folder's run.
        name: What a new folder is called, behind the time.
        effective: From the flags of a run to those that had an effect.

    Raises:
        UserError: If a new run would overwrite an old one, or the flags differ from those of the run to go on with.
    """
    output, resume = Path(settings.output), settings.resume
    name = re.sub(r'[^\w.-]', '_', name)  # one folder below `output`, where 'auto' looks, for hf-hub:ORG/NAME too
    folder = RunFolder(output / (settings.experiment or f'{datetime.now():%Y%m%d-%H%M%S}-{name}'))
    if resume not in (None, 'auto'):
        named = RunFolder(Path(resume))
        if named.read_flags() is None:
            raise UserError(f'--resume {resume} is no run folder: it has no args.yaml')
        if not settings.experiment:
            folder = named
        elif folder.path.resolve() != named.path.resolve():
            theirs, results = folder.read_flags(), named.read_results()
            if theirs is None:
                return _check_longer(flags, named, folder, effective)
            if results is None or theirs.get('extended', [])[-1:] != [results['epochs']]:
                raise UserError(f'{folder.path} exists, and was not begun from {named.path}; choose another '
                                '--experiment')
    elif resume == 'auto' and not settings.experiment:
        begun = [path for path in output.glob('*/args.yaml') if path.is_file()]
        for path in sorted(begun, key=lambda path: path.stat().st_mtime, reverse=True):
            try:
                old = RunFolder(path.parent).read_flags()
            except UserError:
                continue  # whatever it was, it was not named
            if old is not None and old.keys() <= flags.keys() and not _differences(flags, old, effective):
                return Target(RunFolder(path.parent))
    old = folder.read_flags()
    if old is not None:
        if resume is None:
            raise UserError(f'run folder {folder.path} exists; go on with --resume auto, or choose '
                            'another --experiment')
        differences = _differences(flags, old, effective)
        if differences:
            raise UserError(f'{folder.path} was run with other flags ({"; ".join(differences.values())}); use the '
                            f'same, or choose another --experiment{_ways_on(folder, flags, old, differences)}')
    return Target(folder)


def open_run_folder(settings: FolderSettings, flags: dict[str, Any], accelerator: Accelerator, name: str,
                    effective: Effective = dict) -> RunFolder:
    """Finds the run folder on the main process, makes it, and tells the others: the clock is in its name.

    It sets two of the flags in all processes. `amp`, where it is open, becomes that of the run to go on with, and for a
    new run what is faster. `extended` becomes the epochs at which the run was finished before, each time that it was
    then trained for longer. See `find_run_folder`.
    """
    def find() -> tuple[RunFolder, dict[str, Any]]:
        folder, finished = find_run_folder(settings, flags, name, effective)
        old = (finished or folder).read_flags() or {}
        results = finished.read_results() if finished is not None else None
        extended = [*old.get('extended', []), *([results['epochs']] if results else [])]
        settled: dict[str, Any] = dict(extended=extended) if extended else {}
        if flags['amp'] is None:
            settled['amp'] = old['amp'] if 'amp' in old else default_amp(accelerator.device.type)
        if finished is not None:
            folder.begin_from(finished)
        folder.create({**flags, **settled})
        folder.lock()
        return folder, settled
    folder, settled = from_main_process(accelerator, find)
    flags.update(settled)
    return folder
