"""Trackers, by Accelerate: they are told what summary.csv holds of each epoch."""
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import filter_trackers, get_available_trackers

from harness.cli import flag
from harness.errors import UserError, user_errors

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
    """Starts them, for a run in `folder`, whose name they give it; a resumed run is the same one.

    Raises:
        UserError: If one can't start, such as without a login.
    """
    if not settings.log_with:
        return
    names = TRACKERS if 'all' in settings.log_with else settings.log_with
    accelerator.project_configuration.set_directories(str(folder))
    accelerator.log_with = filter_trackers(list(names), accelerator.logging_dir)
    told = {key: value if isinstance(value, int | float | str | bool) else json.dumps(value)
            for key, value in flags.items()}
    with user_errors(f'--log-with {" ".join(settings.log_with)}'):
        accelerator.init_trackers('timm-sd', told, dict(
            wandb=dict(name=folder.name, id=folder.name, resume='allow'),
            trackio=dict(name=folder.name, resume='allow')))
