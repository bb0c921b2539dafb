"""Trackers, by Accelerate: they are told what summary.csv holds of each epoch."""
import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import filter_trackers, get_available_trackers

from harness.cli import flag
from harness.errors import UserError, one_line
from harness.files import write_atomic
from harness.ranks import from_main_process

TRACKERS = ('tensorboard', 'wandb', 'trackio')


@dataclass(frozen=True)
class TrackingSettings:
    """Trackers."""
    log_with: list[str] = flag([], 'what else is told of each epoch; all: those that are installed',
                               choices=(*TRACKERS, 'all'), nargs='+')


def check_trackers(settings: TrackingSettings) -> None:
    """Raises UserError if a tracker isn't installed: Accelerate would leave it out without a word."""
    installed = {str(tracker) for tracker in get_available_trackers()} & {*TRACKERS}
    for name in settings.log_with:
        if name not in installed and not (name == 'all' and installed):
            wanted = TRACKERS[0] if name == 'all' else name
            raise UserError(f'--log-with {name}: it is not installed; pip install {wanted}')


def start_trackers(settings: TrackingSettings, accelerator: Accelerator, folder: Path, flags: dict[str, Any]) -> None:
    """Starts them for the run in `folder`; a resumed run is the same one.

    Args:
        settings: Which.
        accelerator: Tells them of each epoch, in the main process.
        folder: Of the run, which they name after it.
        flags: What they are told of the run, which may go to a server.

    Raises:
        UserError: In all processes, if one can't start, such as without a login.
    """
    if not settings.log_with:
        return
    names = TRACKERS if 'all' in settings.log_with else settings.log_with
    accelerator.project_configuration.set_directories(str(folder))
    accelerator.log_with = filter_trackers(list(names), accelerator.logging_dir)
    told = {key: value if isinstance(value, int | float | str | bool) else json.dumps(value)
            for key, value in flags.items()}

    def start() -> None:
        file = folder / '.tracked'  # two folders of one name are two runs, wherever they are moved
        if not file.exists():
            write_atomic(file, secrets.token_hex(4).encode())
        one_run = dict(name=f'{folder.name}-{file.read_text()}', resume='allow')
        try:
            accelerator.init_trackers('timm-sd', told, dict(wandb=dict(one_run, id=one_run['name']), trackio=one_run))
        except Exception as error:  # each tracker has errors of its own
            raise UserError(f'--log-with {" ".join(settings.log_with)}: {one_line(error)}') from error
    from_main_process(accelerator, start)
