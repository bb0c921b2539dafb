"""What throughput.py times: networks that differ in how they drop blocks, and training steps of them.

All contestants live in one process and take short turns (A B C A B C ...), so that a slow moment of the machine hits
all of them. Of the sd_*_cifar networks some run that lack a stage's blocks: what a block of each stage costs is
measured on plain networks, so the limit that a share of the saving refers to knows nothing of this project's code. In
other networks a block's share of the multiplications stands for its share of the time.
"""
import argparse
import io
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torchvision.ops import StochasticDepth
from tqdm import tqdm

import timm_sd
from harness.cli import flag, number, positive_int
from harness.data.in_memory import ImageSet, MemoryBatches
from harness.engine import default_amp, train_epoch
from harness.errors import UserError
from harness.graphs import make_step
from timm_sd.compute import shares_of_gated
from timm_sd.probe import residual_blocks

# Ways of dropping: none, this project's modes, and torchvision's StochasticDepth.
DROPS = ('constant', *timm_sd.MODES, 'torchvision-batch', 'torchvision-row')
STAGES = ('layer1', 'layer2', 'layer3')


@dataclass(frozen=True)
class StepSettings:
    """Steps."""
    batch_size: int = flag(128, 'images a step', short='-b', type=positive_int)
    steps: int = flag(2, 'steps a turn', type=positive_int)
    rounds: int = flag(40, 'turns of each contestant, at least 2', type=number(int, 2))
    amp: bool | None = flag(None, 'bf16 autocast (default: if faster)', action=argparse.BooleanOptionalAction)
    grad_checkpointing: bool = flag(False, 'recompute activations to save memory')
    torchcompile_mode: str | None = flag(None, 'of torch.compile, such as reduce-overhead (CUDA graphs)')
    memory: bool = flag(True, 'probe the peak memory')


class Variant(NamedTuple):
    """How a contestant drops blocks.

    Attributes:
        mode: Of `DROPS`.
        drop_path: 1 - p_L.
        schedule: Of the survival probabilities.
        scale: Of mode 'batch', 'train' or 'eval'.
        compiled: Whether the branches are compiled.
        cuda_graphs: Whether the steps are recorded.
    """
    mode: str
    drop_path: float
    schedule: str = 'linear'
    scale: str = 'train'
    compiled: bool = False
    cuda_graphs: bool = False

    @property
    def label(self) -> str:
        """For people; results are told apart by the fields."""
        p_last = '' if self.mode == 'constant' else f', p_L {1 - self.drop_path:g}'
        uniform = ' uniform' if self.schedule == 'uniform' and p_last else ''
        how = f'{", compiled" if self.compiled else ""}{", graphs" if self.cuda_graphs else ""}'
        return f'{self.mode}{p_last}{uniform}{how}'

    def describes(self, row: dict[str, Any]) -> bool:
        """Whether a row of throughput.py has the steps of this variant."""
        fields = dict(self._field_defaults, **row)  # rows that are older than a field
        return row.get('loop') is False and all(fields.get(name) == value for name, value in self._asdict().items())


CONSTANT = Variant('constant', 0.)
RECORDED = CONSTANT._replace(cuda_graphs=True)


def build(model: str, variant: Variant) -> Any:
    """The network of a variant; those of other libraries get the paper's rates."""
    network: Any = timm.create_model(model, drop_path_rate=0.)
    if variant.mode in timm_sd.MODES:
        timm_sd.add_stochastic_depth(network, variant.drop_path, variant.schedule, variant.mode, variant.scale)
    elif variant.mode.startswith('torchvision-'):
        residuals, _ = residual_blocks(network)
        rates = timm_sd.drop_path_rates(len(residuals), variant.drop_path, variant.schedule)
        for residual, rate in zip(residuals, rates, strict=True):
            for slot in residual.slots:
                setattr(residual.block, slot, StochasticDepth(rate, variant.mode.removeprefix('torchvision-')))
    return network


def has_stages(model: str) -> bool:
    """Whether it is one of the networks whose blocks can be weighed by leaving out a stage's."""
    return model.startswith('sd_') and '_cifar' in model


def without_stage(model: str, stage: str) -> Any:
    """Constant depth, but only the first block of one stage."""
    network = build(model, CONSTANT)
    setattr(network, stage, getattr(network, stage)[:1])
    return network


class Contestant:
    """A network with its optimiser, and the training steps it is timed by.

    Args:
        model: The network.
        settings: Of its steps.
        compiled: Compile its branches.
        cuda_graphs: Record its steps.
    """

    def __init__(self, model: Any, settings: StepSettings, compiled: bool = False, cuda_graphs: bool = False) -> None:
        accelerator = Accelerator()
        device = accelerator.device
        torch.backends.cudnn.benchmark = True  # as train.py
        model = model.to(device).to(memory_format=torch.channels_last).train()
        if settings.grad_checkpointing:
            model.set_grad_checkpointing()
        if compiled and timm_sd.depth_gates(model):
            timm_sd.compile_blocks(model, mode=settings.torchcompile_mode)
        elif compiled:
            for residual in residual_blocks(model)[0]:
                residual.block.compile(mode=settings.torchcompile_mode, dynamic=False)
        self.model, self.gates = model, timm_sd.depth_gates(model)
        self.step = make_step(model, papers_optimizer(model), accelerator,
                              default_amp(device.type) if settings.amp is None else settings.amp, cuda_graphs)
        size = model.pretrained_cfg['input_size']
        pictures = torch.randint(256, (settings.batch_size * settings.steps, *size), dtype=torch.uint8)
        data = ImageSet(pictures, torch.randint(10, (len(pictures),)), [str(n) for n in range(10)])
        self.batches = MemoryBatches(data.to(device), settings.batch_size, (0.5,) * size[0], (0.25,) * size[0],
                               train=True, crop_padding=4, hflip=0.5)
        self.x, self.target, _ = next(iter(self.batches))

    def time_turn(self, turn: Callable[[], None], round_: int) -> tuple[float, float]:
        """Seconds a step of a turn, and of the host alone until it had started everything.

        Args:
            turn: `bare` or `loop`.
            round_: The gates are those of the epoch with this number.
        """
        if self.gates is not None:
            self.gates.set_epoch(round_)
        self.synchronize()
        start = time.perf_counter()
        turn()
        started = time.perf_counter()
        self.synchronize()
        return (time.perf_counter() - start) / len(self.batches), (started - start) / len(self.batches)

    def synchronize(self) -> None:
        if self.step.accelerator.device.type == 'cuda':
            torch.cuda.synchronize()

    def bare(self) -> None:
        """A turn of forward, backward and update on one batch that is there already."""
        for _ in range(len(self.batches)):
            self.step.backward(self.x, self.target, len(self.x), is_update=True)
            self.step.update()

    def loop(self) -> None:
        """A turn of the whole training loop: the same gates, with order, augmentation and logging."""
        scheduler, _ = create_scheduler_v2(self.step.optimizer, 'constant', 1, updates_per_epoch=len(self.batches))
        train_epoch(self.step, self.batches, scheduler, 0, tqdm(total=len(self.batches.data), file=io.StringIO()),
                    log_interval=20)

    def draws(self, round_: int) -> list[list[bool]]:
        """The gates of a turn, by step; none where a network has no gates."""
        if self.gates is None:
            return []
        self.gates.set_epoch(round_)
        return [self.gates.draw() for _ in range(len(self.batches))]


def papers_optimizer(model: Any) -> torch.optim.Optimizer:
    """The paper's optimiser, with a small learning rate."""
    return create_optimizer_v2(model, 'sgd', lr=1e-3, weight_decay=1e-4, filter_bias_and_bn=False, fused=True)


class Timings(NamedTuple):
    """What `time_in_turns` measured.

    Attributes:
        seconds: Seconds a step in each round, by variant.
        host_seconds: Seconds that the host took to start them.
        loops: Seconds a step inside the whole training loop, of the first variant of mode 'batch', and of the first one
            that is recorded.
        draws: The gates of each step in each round, by variant.
        block_seconds: What each block costs in an eager step (False) and in a recorded one (True).
    """
    seconds: dict[Variant, list[float]]
    host_seconds: dict[Variant, list[float]]
    loops: dict[Variant, list[float]]
    draws: dict[Variant, list[list[list[bool]]]]
    block_seconds: dict[bool, list[float]]


def time_in_turns(model: str, variants: list[Variant], settings: StepSettings) -> Timings:
    """Times the bare steps of `variants`, and of mode 'batch' the whole training loop too.

    Args:
        model: Name of the network.
        variants: The contestants; `CONSTANT` must be among them, and `RECORDED` if any is recorded.
        settings: Of their steps.
    """
    torch.manual_seed(0)
    contestants = {variant: Contestant(build(model, variant), settings, variant.compiled, variant.cuda_graphs)
                   for variant in variants}
    recorded = (False, True) if RECORDED in variants else (False,)
    shortened = {(stage, kind): Contestant(without_stage(model, stage), settings, cuda_graphs=kind)
                 for kind in recorded for stage in STAGES if has_stages(model)}
    looping = [next(variant for variant in variants if variant.mode == 'batch' and variant.cuda_graphs == kind)
               for kind in recorded if any(variant.mode == 'batch' for variant in variants)]
    shares = shares_of_gated(contestants[looping[0]].model) if looping and not shortened else []
    timed = [*((contestant, contestant.bare) for contestant in (*contestants.values(), *shortened.values())),
             *((contestants[variant], contestants[variant].loop) for variant in looping)]
    found: dict[Any, list[tuple[float, float]]] = {key: [] for key in (
        *contestants, *shortened, *((variant, 'loop') for variant in looping))}
    for round_ in tqdm(range(-1, settings.rounds), desc=f'{model}, rounds, the first to warm up', leave=False):
        for (contestant, turn), turns in zip(timed, found.values(), strict=True):
            turns.append(contestant.time_turn(turn, max(round_, 0)))
            if round_ < 0:
                turns.clear()
    seconds = {key: [elapsed for elapsed, _ in turns] for key, turns in found.items()}
    block_seconds = {kind: [share * statistics.median(seconds[CONSTANT]) for share in shares] for kind in recorded}
    for stage, kind in shortened:
        constant = seconds[RECORDED if kind else CONSTANT]
        saved = [full - short for full, short in zip(constant, seconds[stage, kind], strict=True)]
        blocks = len(getattr(contestants[CONSTANT].model, stage))
        block_seconds[kind] += [statistics.median(saved) / max(1, blocks - 1)] * blocks
    return Timings(
        {variant: seconds[variant] for variant in variants},
        {variant: [host for _, host in found[variant]] for variant in variants},
        {variant: seconds[variant, 'loop'] for variant in looping},
        {variant: [contestant.draws(round_) for round_ in range(settings.rounds)]
         for variant, contestant in contestants.items()},
        block_seconds)


def _high_water_mark() -> int:
    """The largest size of this process so far, in KiB; not getrusage's, which counts the process that started it."""
    status = Path('/proc/self/status')
    if not status.exists():
        raise UserError('peak memory on a CPU is read from /proc, which this system lacks; use --no-memory')
    return int(status.read_text().partition('VmHWM:')[2].split()[0])


def _peak(model: str, variant: Variant, settings: StepSettings) -> float:
    contestant = Contestant(build(model, variant), settings, variant.compiled, variant.cuda_graphs)
    if contestant.step.accelerator.device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        contestant.bare()
        return torch.cuda.max_memory_allocated() / 2**20
    before = _high_water_mark()
    contestant.bare()
    return (_high_water_mark() - before) / 1024


def peak_memory(model: str, variant: Variant, settings: StepSettings) -> float:
    """MiB that training steps need: on a GPU what torch allocates, on a CPU how far the process grows.

    Measured in a process of its own, for the size of a process never falls.
    """
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        return round(pool.apply(_peak, (model, variant, settings)), 1)
