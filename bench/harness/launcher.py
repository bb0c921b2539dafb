"""What the launcher that started this process asks for, in its environment: it is followed, or refused in one line."""
import os

import torch

from harness.errors import UserError

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


def settle_precision(amp: bool | None, amp_dtype: str | None) -> tuple[bool | None, str]:
    """The flags --amp and --amp-dtype, None where they are open, together with the launcher's --mixed_precision.

    Raises:
        UserError: If they contradict each other.
    """
    said = launcher_precision()
    if amp is False and amp_dtype is not None:
        raise UserError(f'--amp-dtype {amp_dtype} does nothing with --no-amp; leave out one of them')
    if said is not None and (amp is False or amp_dtype not in (None, said)):
        given = '--no-amp' if amp is False else f'--amp-dtype {amp_dtype}'
        raise UserError(f'the launcher asks for {said} (ACCELERATE_MIXED_PRECISION='
                        f'{os.environ["ACCELERATE_MIXED_PRECISION"]}), but {given} is given; leave out one of them')
    settled = said or amp_dtype
    return (amp if settled is None else True), settled or 'bfloat16'


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
    is_alone = given.get('WORLD_SIZE', '1') == '1' and given.get('RANK', '0') == '0' and 'LOCAL_RANK' not in given
    if is_alone or torch.distributed.is_initialized():  # or somebody else has joined the others already
        return
    way_out = 'start it with torchrun or accelerate launch (README, Several processes), or unset them'
    missing = [name for name in RENDEZVOUS if name not in given]
    if missing:
        raise UserError(f'{", ".join(given)} are set for several processes, but not {", ".join(missing)}; {way_out}')
    given['LOCAL_WORLD_SIZE'] = os.environ.get('LOCAL_WORLD_SIZE') or '1'
    for name, value in given.items():
        if name != 'MASTER_ADDR' and not (value.isascii() and value.isdigit()):
            raise UserError(f'{name} is {value!r}, which is no number; {way_out}')
    if os.environ.get('TORCHELASTIC_MAX_RESTARTS', '0') != '0' and \
            os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':
        # The store outlives a restart, and the new processes would wait for the addresses that the old ones left in it.
        raise UserError('torchrun --max-restarts wants a store of its own for each restart, else the new processes do '
                        'not meet: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1')
    if int(given['RANK']) >= int(given['WORLD_SIZE']):
        raise UserError(f'RANK is {given["RANK"]}, but must be less than WORLD_SIZE, {given["WORLD_SIZE"]}; {way_out}')


def tasks_started() -> tuple[int, str, bool]:
    """How many tasks Slurm or MPI says it has started, the variable that says so, and whether this is the first."""
    for size, rank in (MPI | SLURM).items():
        number = os.environ.get(size, '')
        if number.isdigit():
            return int(number), size, os.environ.get(rank, '0') == '0'
    return 1, '', True
