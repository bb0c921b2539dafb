"""How many processes train together, and with how many threads."""
import os
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate import Accelerator

from harness.cli import flag, positive_int
from harness.errors import UserError
from harness.machine import cores

Made = TypeVar('Made')


@dataclass(frozen=True)
class LaunchSettings:
    """Processes."""
    require_processes: int | None = flag(None, 'fail unless N processes train together', type=positive_int,
                                         metavar='N')
    threads: int | None = flag(None, 'CPU threads a process (default: cores / processes)', type=positive_int)


def describe_processes(accelerator: Accelerator) -> str:
    """How many processes train together; it says so if a launcher started more than that."""
    together, started = accelerator.num_processes, int(os.environ.get('WORLD_SIZE', '1'))
    apart = f' (of {started} started, which know nothing of each other: see README, Several processes)'
    return f'{together} process{"es" if together > 1 else ""}{apart if started > together else ""}'


def make_accelerator() -> Accelerator:
    """Joins the other processes that a launcher started. Precision and compilation are the flags' business."""
    return Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision='no', dynamo_backend='no')


def join_processes(settings: LaunchSettings) -> Accelerator:
    """Joins the other processes that a launcher started, and sets up torch for speed.

    Raises:
        UserError: If --require-processes asks for another number of them.
    """
    accelerator = make_accelerator()
    if settings.require_processes not in (None, accelerator.num_processes):
        raise UserError(f'--require-processes is {settings.require_processes}, but here train '
                        f'{describe_processes(accelerator)}; README, Several processes, has the launch lines')
    # accelerate launch sets OMP_NUM_THREADS to 1, also where one process has all cores.
    torch.set_num_threads(settings.threads or max(1, cores() // int(os.environ.get('LOCAL_WORLD_SIZE', '1'))))
    torch.backends.cudnn.benchmark = True  # all batches but the last have one shape
    return accelerator
