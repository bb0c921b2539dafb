"""How many processes train together, with how many threads, and what else the launcher that started them asks for."""
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, broadcast_object_list

from harness.cli import flag, positive_int
from harness.errors import RankError, UserError, one_line
from harness.machine import cores

Made = TypeVar('Made')

# What `accelerate launch` and its config file can ask for, beyond more processes, and why it is refused.
# Their other variables (FSDP_*, ACCELERATE_DYNAMO_MODE, ...) mean something only together with one of these.
NOT_FOLLOWED = {
    'ACCELERATE_USE_DEEPSPEED': 'processes train together by data parallelism alone, not by DeepSpeed',
    'ACCELERATE_USE_FSDP': 'processes train together by data parallelism alone, not by FSDP',
    'ACCELERATE_USE_MEGATRON_LM': 'processes train together by data parallelism alone, not by Megatron-LM',
    'ACCELERATE_USE_PARALLELISM_CONFIG': 'processes train together by data parallelism alone, and by no other',
    'ACCELERATE_USE_SAGEMAKER': 'nothing here was tried on SageMaker',
    'ACCELERATE_USE_IPEX': "Intel's extension for PyTorch is not used",
    'ACCELERATE_IN_TPU_POD': 'nothing here was tried on a TPU',
    'ACCELERATE_DYNAMO_BACKEND': 'to compile, give train.py --compile blocks',
}
OFF = ('', '0', 'f', 'false', 'n', 'no', 'none', 'off')
PRECISIONS = {'no': None, 'bf16': 'bfloat16', 'fp16': 'float16'}
LEAVE_OUT = "leave it out of the launcher's line and of its config file"

# By what a process knows that others were started with it: their number, and its own among them.
RENDEZVOUS = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')
MPI = {f'{name}_SIZE': f'{name}_RANK' for name in ('PMI', 'OMPI_COMM_WORLD', 'MV2_COMM_WORLD')}
SLURM = {'SLURM_STEP_NUM_TASKS': 'SLURM_PROCID', 'SLURM_NTASKS': 'SLURM_PROCID'}


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


def from_main_process(accelerator: Accelerator, make: Callable[[], Made]) -> Made:
    """What `make` gives in the main process, in all of them; its UserError is raised in all."""
    found: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            found = [make()]
        except UserError as error:
            found = [error]
    broadcast_object_list(found)
    if isinstance(found[0], UserError):
        raise found[0]
    return found[0]


# --- what the launcher asks for


def launcher_precision() -> str | None:
    """The dtype of `accelerate launch --mixed_precision`; None for 'no', its default, which says nothing.

    Raises:
        UserError: If it is another one, such as fp8.
    """
    said = (os.environ.get('ACCELERATE_MIXED_PRECISION') or 'no').lower()
    if said not in PRECISIONS:
        raise UserError(f'the launcher asks for {said} (ACCELERATE_MIXED_PRECISION), but only '
                        f'{", ".join(PRECISIONS)} are there; {LEAVE_OUT}')
    return PRECISIONS[said]


def settle_precision(amp: bool | None, amp_dtype: str | None) -> tuple[bool | None, str | None]:
    """The flags --amp and --amp-dtype, None where they are open, together with the launcher's --mixed_precision.

    Raises:
        UserError: If they contradict each other.
    """
    said = launcher_precision()
    if said is None:
        return amp, amp_dtype
    if amp is False or amp_dtype not in (None, said):
        given = '--no-amp' if amp is False else f'--amp-dtype {amp_dtype}'
        raise UserError(f'the launcher asks for {said} (ACCELERATE_MIXED_PRECISION='
                        f'{os.environ["ACCELERATE_MIXED_PRECISION"]}), but {given} is given; leave out one of them')
    return True, said


def check_accumulation(grad_accum_steps: int) -> None:
    """Checks that the launcher asks for as many batches a step as --grad-accum-steps, or for none."""
    said = os.environ.get('ACCELERATE_GRADIENT_ACCUMULATION_STEPS') or '1'
    if said not in ('1', str(grad_accum_steps)):
        raise UserError(f'the launcher asks for {said} batches a step (ACCELERATE_GRADIENT_ACCUMULATION_STEPS), but '
                        f'--grad-accum-steps is {grad_accum_steps}; make them equal, or {LEAVE_OUT}')


def check_launcher() -> None:
    """Checks that the launcher asks for nothing that would be ignored, and says how the processes find each other.

    Raises:
        UserError: If it does, or doesn't.
    """
    launcher_precision()
    for name, what in NOT_FOLLOWED.items():
        value = os.environ.get(name, '')
        if value.lower() not in OFF:
            raise UserError(f'the launcher says {name}={value}, which is not followed: {what}; {LEAVE_OUT}')
    given = {name: os.environ[name] for name in RENDEZVOUS if os.environ.get(name)}
    if not given.keys() & {'RANK', 'WORLD_SIZE', 'LOCAL_RANK'} or torch.distributed.is_initialized():
        return  # one process, or those that somebody else has joined already
    way_out = 'start it with torchrun or accelerate launch (README, Several processes), or unset them'
    missing = [name for name in RENDEZVOUS if name not in given]
    if missing:
        raise UserError(f'{", ".join(given)} are set for several processes, but not {", ".join(missing)}; {way_out}')
    given['LOCAL_WORLD_SIZE'] = os.environ.get('LOCAL_WORLD_SIZE') or '1'
    for name, value in given.items():
        if name != 'MASTER_ADDR' and not (value.isascii() and value.isdigit()):
            raise UserError(f'{name} is {value!r}, which is no number; {way_out}')
    if int(given['RANK']) >= int(given['WORLD_SIZE']):
        raise UserError(f'RANK is {given["RANK"]}, but must be less than WORLD_SIZE, {given["WORLD_SIZE"]}; {way_out}')


# --- joining the others


def tasks_started() -> tuple[int, str, bool]:
    """How many tasks Slurm or MPI says it has started, the variable that says so, and whether this is the first."""
    for size, rank in (MPI | SLURM).items():
        number = os.environ.get(size, '')
        if number.isdigit():
            return int(number), size, os.environ.get(rank, '0') == '0'
    return 1, '', True


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
    if os.environ.get('RANK', '0') == '0' or 'TORCHELASTIC_RUN_ID' in os.environ:  # torchrun has met the others
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
        if processes == 1:
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
    torch.set_num_threads(settings.threads or max(1, cores() // int(os.environ.get('LOCAL_WORLD_SIZE', '1'))))
    torch.backends.cudnn.benchmark = True  # all batches but the last have one shape
    return accelerator
