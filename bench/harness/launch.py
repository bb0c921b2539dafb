"""How many processes train together, and with how many threads."""
import os
import socket
import sys
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs

from harness.cli import flag, positive_int
from harness.errors import RankError, UserError, one_line
from harness.launcher import MPI, OFF, check_accumulation, check_launcher, tasks_started
from harness.machine import cores


@dataclass(frozen=True)
class LaunchSettings:
    """Processes."""
    require_processes: int | None = flag(None, 'fail unless N processes train together', type=positive_int,
                                         metavar='N')
    timeout: int | None = flag(None, "how long processes wait for each other (default: torch's)", type=positive_int,
                               metavar='SECONDS')
    threads: int | None = flag(None, 'CPU threads a process (default: cores / processes)', type=positive_int)


def describe_processes(accelerator: Accelerator) -> str:
    """How many processes train together."""
    return f'{accelerator.num_processes} process{"es" if accelerator.num_processes > 1 else ""}'


def warn_of_others(accelerator: Accelerator) -> None:
    """Says so where more tasks were started than train together: it may be meant, as in the script of a batch job."""
    tasks, name, is_first = tasks_started()
    way_out = '; torchrun starts processes that train together, --require-processes N refuses any other number'
    if tasks > accelerator.num_processes and accelerator.is_main_process and is_first:
        what = f'{name} says that {tasks} tasks were started'
    # accelerate launch without --multi_gpu says where several processes meet, and then starts a single one.
    elif 'ACCELERATE_USE_CPU' in os.environ and 'MASTER_PORT' in os.environ and 'RANK' not in os.environ:
        what = 'accelerate launch was asked for several processes, and has started one for lack of --multi_gpu'
    else:
        return
    print(f'warning: {what}, but this is a training of {describe_processes(accelerator)}{way_out}', file=sys.stderr,
          flush=True)


def wait_for_first_process(timeout: int | None) -> None:
    """Returns when it can be reached; torch waits for it too, but logs pages of stack frames where it waits in vain.

    Raises:
        OSError: If it can't be reached in time.
    """
    # torchrun has met the others, and a program that imports this one may have joined them
    if os.environ.get('RANK', '0') == '0' or 'TORCHELASTIC_RUN_ID' in os.environ or torch.distributed.is_initialized():
        return
    end = time.monotonic() + (timeout or torch.distributed.default_pg_timeout.total_seconds())
    while True:
        try:
            socket.create_connection((os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])), 10).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


def make_accelerator(timeout: int | None = None) -> Accelerator:
    """Joins the other processes that a launcher started. Precision and compilation are the flags' business.

    Args:
        timeout: Seconds that they wait for each other; None for torch's own.

    Raises:
        UserError: If the launcher asks for what would be ignored, or the others can't be joined.
    """
    check_launcher()
    here, processes = int(os.environ.get('LOCAL_WORLD_SIZE') or 1), int(os.environ.get('WORLD_SIZE') or 1)
    on_gpus = torch.accelerator.is_available() and os.environ.get('ACCELERATE_USE_CPU', '').lower() in OFF
    if on_gpus and processes > 1 and here > torch.accelerator.device_count():
        raise UserError(f'{here} processes were started on this machine, each wants a GPU of its own, and it has '
                        f'{torch.accelerator.device_count()}; start fewer, or set ACCELERATE_USE_CPU=true')
    address = ':'.join(os.environ.get(name, '') for name in ('MASTER_ADDR', 'MASTER_PORT'))
    hidden = {'ACCELERATE_GRADIENT_ACCUMULATION_STEPS'}  # Accelerate would divide the loss by it, as we do
    if address.startswith(':') or address.endswith(':'):
        hidden |= MPI.keys()  # Accelerate would look for the other processes, and find no way to them
    kept = {name: os.environ.pop(name) for name in hidden if name in os.environ}
    handlers = [] if timeout is None else [InitProcessGroupKwargs(timeout=timedelta(seconds=timeout))]
    try:
        wait_for_first_process(timeout)
        accelerator = Accelerator(cpu=not on_gpus, mixed_precision='no', dynamo_backend='no', kwargs_handlers=handlers)
    except (OSError, RuntimeError) as error:  # gloo's and NCCL's are RuntimeErrors
        if processes == 1 and tasks_started()[0] == 1:
            raise
        raise RankError(f'the {processes} processes did not find each other at {address} ({one_line(error, 150)}); '
                        'check that address, and that all of them were started; --timeout says how long they '
                        'wait') from error
    finally:
        os.environ.update(kept)
    if accelerator.distributed_type == DistributedType.XLA:
        raise UserError('torch_xla is installed, so Accelerate wants a TPU, on which nothing was tried; uninstall it')
    if accelerator.num_processes < processes:
        raise UserError(f'{processes} processes were started, but on {accelerator.device.type} each would train '
                        'alone; start one, or set ACCELERATE_USE_CPU=true')
    warn_of_others(accelerator)
    return accelerator


def join_processes(settings: LaunchSettings, grad_accum_steps: int = 1) -> Accelerator:
    """Joins the other processes that a launcher started, and sets up torch for speed.

    Raises:
        UserError: If --require-processes asks for another number of them; see also `make_accelerator`.
    """
    check_accumulation(grad_accum_steps)
    accelerator = make_accelerator(settings.timeout)
    if settings.require_processes not in (None, accelerator.num_processes):
        raise UserError(f'--require-processes is {settings.require_processes}, but here train '
                        f'{describe_processes(accelerator)}; README, Several processes, has the launch lines')
    # accelerate launch sets OMP_NUM_THREADS to 1, also where one process has all cores.
    torch.set_num_threads(settings.threads or max(1, cores() // int(os.environ.get('LOCAL_WORLD_SIZE') or 1)))
    torch.backends.cudnn.benchmark = True  # all batches but the last have one shape
    return accelerator
