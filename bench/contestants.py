"""What throughput.py times: networks that differ in how they drop blocks, and training steps of them.

All contestants live in one process and take short turns (A B C A B C ...), so that a slow moment of the machine hits
all of them. Of the sd_*_cifar networks some run that lack a stage's blocks: what a block of each stage costs is
measured on plain networks, so the limit that a share of the saving refers to knows nothing of this project's code.
"""
import argparse
import io
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torchvision.ops import StochasticDepth
from tqdm import tqdm

import timm_sd
from config import UserError
from engine import autocast, default_amp, train_epoch
from in_memory import ImageSet, MemoryBatches
from timm_sd.convert import residual_blocks

MODES = ('constant', *timm_sd.MODES, 'torchvision-batch', 'torchvision-row')
STAGES = ('layer1', 'layer2', 'layer3')


class Entry(NamedTuple):
    """One contestant: how it drops blocks, 1 - p_L, its schedule and scale, and whether its blocks are compiled."""
    mode: str
    rate: float
    schedule: str = 'linear'
    compiled: bool = False
    scale: str = 'train'

    @property
    def name(self) -> str:
        p_last = '' if self.mode == 'constant' else f', p_L {1 - self.rate:g}'
        uniform = ' uniform' if self.schedule == 'uniform' and p_last else ''
        return f'{self.mode}{p_last}{uniform}{", compiled" if self.compiled else ""}'


def build(model: str, entry: Entry) -> Any:
    """The network of an entry; those of other libraries get the paper's rates."""
    network: Any = timm.create_model(model, drop_path_rate=0.)
    if entry.mode in timm_sd.MODES:
        timm_sd.add_stochastic_depth(network, entry.rate, entry.schedule, entry.mode, entry.scale)
    elif entry.mode.startswith('torchvision-'):
        residuals, _ = residual_blocks(network)
        rates = timm_sd.drop_path_rates(len(residuals), entry.rate, entry.schedule)
        for residual, rate in zip(residuals, rates, strict=True):
            for slot in residual.slots:
                setattr(residual.block, slot, StochasticDepth(rate, entry.mode.removeprefix('torchvision-')))
    return network


def has_stages(model: str) -> bool:
    """Whether it is one of the networks whose blocks can be weighed by leaving out a stage's."""
    return model.startswith('sd_') and '_cifar' in model


def without_stage(model: str, stage: str) -> Any:
    """Constant depth, but only the first block of one stage."""
    network = build(model, Entry('constant', 0.))
    setattr(network, stage, getattr(network, stage)[:1])
    return network


class Contestant:
    """A network with its optimiser, and the training steps it is timed by.

    Args:
        model: The network.
        args: The flags.
        compiled: Compile its branches.
    """

    def __init__(self, model: Any, args: argparse.Namespace, compiled: bool = False) -> None:
        self.accelerator = Accelerator()
        device = self.accelerator.device
        torch.backends.cudnn.benchmark = True  # as train.py
        self.amp = autocast(device, default_amp(device.type) if args.amp is None else args.amp)
        self.model = model.to(device).to(memory_format=torch.channels_last).train()
        if args.grad_checkpointing:
            model.set_grad_checkpointing()
        if compiled and timm_sd.depth_gates(model):
            timm_sd.compile_blocks(model, mode=args.torchcompile_mode)
        elif compiled:
            for residual in residual_blocks(model)[0]:
                residual.block.compile(mode=args.torchcompile_mode, dynamic=False)
        self.optimizer = create_optimizer_v2(self.model, 'sgd', lr=1e-3, weight_decay=1e-4, filter_bias_and_bn=False,
                                             fused=True)
        self.gates = timm_sd.depth_gates(model)
        size = model.pretrained_cfg['input_size']
        pictures = torch.randint(256, (args.batch_size * args.steps, *size), dtype=torch.uint8)
        data = ImageSet(pictures, torch.randint(10, (len(pictures),)), [str(n) for n in range(10)])
        self.batches = MemoryBatches(data.to(device), args.batch_size, (0.5,) * size[0], (0.25,) * size[0],
                               train=True, crop_padding=4, hflip=0.5)
        self.x, self.target, _ = next(iter(self.batches))

    def seconds(self, steps: Callable[[], None], round_: int) -> float:
        """Seconds a step of a turn, whose gates are those of epoch `round_`."""
        if self.gates is not None:
            self.gates.set_epoch(round_)
        self.synchronize()
        start = time.perf_counter()
        steps()
        self.synchronize()
        return (time.perf_counter() - start) / len(self.batches)

    def synchronize(self) -> None:
        if self.accelerator.device.type == 'cuda':
            torch.cuda.synchronize()

    def bare(self) -> None:
        """A turn of forward, backward and update on one batch that is there already."""
        for _ in range(len(self.batches)):
            with self.amp():
                loss = F.cross_entropy(self.model(self.x), self.target)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def loop(self) -> None:
        """A turn of the whole training loop: the same gates, with order, augmentation and logging."""
        scheduler, _ = create_scheduler_v2(self.optimizer, 'constant', 1, updates_per_epoch=len(self.batches))
        train_epoch(self.model, self.batches, self.optimizer, scheduler, self.accelerator, self.amp, 0,
                    tqdm(total=len(self.batches.data), file=io.StringIO()))

    def draws(self, round_: int) -> list[list[bool]]:
        """The gates of a turn, by step; all open at constant depth and where samples are dropped, not blocks."""
        if self.gates is None:
            return []
        self.gates.set_epoch(round_)
        return [self.gates.draw() for _ in range(len(self.batches))]


class Timings(NamedTuple):
    """By name and round: seconds a step, and the gates of each step; and what each block costs in seconds."""
    seconds: dict[str, list[float]]
    draws: dict[str, list[list[list[bool]]]]
    block_seconds: list[float]


def time_in_turns(model: str, entries: list[Entry], args: argparse.Namespace) -> Timings:
    """Times the bare steps of `entries`, and the first mode-'batch' one inside the whole training loop too ('loop').

    Args:
        model: Name of the network.
        entries: The contestants; 'constant' must be among them.
        args: batch_size, steps, rounds, amp, grad_checkpointing, torchcompile_mode.
    """
    torch.manual_seed(0)
    contestants = {entry.name: Contestant(build(model, entry), args, entry.compiled) for entry in entries}
    shortened = {stage: Contestant(without_stage(model, stage), args) for stage in STAGES if has_stages(model)}
    turns = {name: (contestant, contestant.bare) for name, contestant in {**contestants, **shortened}.items()}
    ours = [contestants[entry.name] for entry in entries if entry.mode == 'batch']
    if ours:
        turns['loop'] = ours[0], ours[0].loop

    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for round_ in tqdm(range(-1, args.rounds), desc=f'{model}, rounds, the first to warm up', leave=False):
        for name, (contestant, steps) in turns.items():
            elapsed = contestant.seconds(steps, max(round_, 0))
            if round_ >= 0:
                seconds[name].append(elapsed)
    block_seconds: list[float] = []
    for stage in shortened:
        saved = [full - short for full, short in zip(seconds['constant'], seconds.pop(stage), strict=True)]
        blocks = len(getattr(contestants['constant'].model, stage))
        block_seconds += [statistics.median(saved) / max(1, blocks - 1)] * blocks
    draws = {name: [contestant.draws(round_) for round_ in range(args.rounds)]
             for name, contestant in contestants.items()}
    return Timings(seconds, draws, block_seconds)


def _high_water_mark() -> int:
    """The largest size of this process so far, in KiB; not getrusage's, which counts the process that started it."""
    status = Path('/proc/self/status')
    if not status.exists():
        raise UserError('peak memory on a CPU is read from /proc, which this system lacks; use --no-memory')
    return int(status.read_text().partition('VmHWM:')[2].split()[0])


def _peak(model: str, entry: Entry, args: argparse.Namespace) -> float:
    contestant = Contestant(build(model, entry), args, entry.compiled)
    if contestant.accelerator.device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        contestant.bare()
        return torch.cuda.max_memory_allocated() / 2**20
    before = _high_water_mark()
    contestant.bare()
    return (_high_water_mark() - before) / 1024


def peak_memory(model: str, entry: Entry, args: argparse.Namespace) -> float:
    """MiB that training steps need: on a GPU what torch allocates, on a CPU how far the process grows.

    Measured in a process of its own, for the size of a process never falls.
    """
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        return round(pool.apply(_peak, (model, entry, args)), 1)
