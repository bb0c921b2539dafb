"""Step time of stochastic depth against constant depth, and of the whole training loop against the bare step.

    python bench/throughput.py --model sd_resnet110_cifar --json bench/results/throughput.json

All contestants live in one process and take short turns (A B C A B C ...), so that a slow moment of the machine hits
all of them; warm-up stays outside. Quoted are ratios within a round: the median over the rounds, and the quartiles.
"""
import argparse
import io
import json
import statistics
import time
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.layers import DropPath
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn
from tqdm import tqdm

import timm_sd
from config import Parser, UserError, check_model_name, count, default_amp, number, parse, rate, run
from data import Batches, ImageSet
from engine import autocast, train_epoch
from run_folder import hardware, versions, write_atomic


class Contestant:
    """A network with its optimiser, and the training steps it is timed by.

    Args:
        model: The network.
        args: The flags.
        accelerator: Says which device.
    """

    def __init__(self, model: Any, args: argparse.Namespace, accelerator: Accelerator) -> None:
        self.accelerator, self.amp = accelerator, autocast(accelerator.device, args.amp)
        self.model = model.to(accelerator.device).to(memory_format=torch.channels_last).train()
        self.optimizer = create_optimizer_v2(self.model, 'sgd', lr=1e-3, weight_decay=1e-4, filter_bias_and_bn=False)
        self.gates = timm_sd.depth_gates(model)
        size = model.pretrained_cfg['input_size']
        pictures = torch.randint(256, (args.batch_size * args.steps, *size), dtype=torch.uint8)
        data = ImageSet(pictures, torch.randint(10, (len(pictures),)), [str(n) for n in range(10)])
        self.batches = Batches(data.to(accelerator.device), args.batch_size, (0.5,) * size[0], (0.25,) * size[0],
                               train=True, crop_padding=4, hflip=0.5)
        self.x, self.target, _ = next(iter(self.batches))
        self.depths: list[int] = []  # open blocks of each timed step

    def _seconds(self, work: Any, round_: int) -> float:
        if self.gates is not None:
            self.gates.set_epoch(round_)
        self._synchronize()
        start = time.perf_counter()
        work()
        self._synchronize()
        return (time.perf_counter() - start) / len(self.batches)

    def _synchronize(self) -> None:
        if self.accelerator.device.type == 'cuda':
            torch.cuda.synchronize()

    def _bare_steps(self) -> None:
        for _ in range(len(self.batches)):
            with self.amp():
                loss = F.cross_entropy(self.model(self.x), self.target)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def _loop(self) -> None:
        scheduler, _ = create_scheduler_v2(self.optimizer, 'constant', 1, updates_per_epoch=len(self.batches))
        train_epoch(self.model, self.batches, self.optimizer, scheduler, self.accelerator, self.amp, 0,
                    tqdm(total=len(self.batches.data), file=io.StringIO()))

    def bare(self, round_: int) -> float:
        """Seconds a step: forward, backward, update, on one batch that is there already."""
        return self._seconds(self._bare_steps, round_)

    def loop(self, round_: int) -> float:
        """Seconds a step of the whole loop: the same gates, with order, augmentation and logging."""
        return self._seconds(self._loop, round_)

    def open_share(self, rounds: int) -> float:
        """Share of the blocks that the timed steps ran."""
        if self.gates is None:
            return 1.
        drawn = []
        for round_ in range(rounds):
            self.gates.set_epoch(round_)
            drawn += [sum(self.gates.draw()) / len(self.gates.open) for _ in range(len(self.batches))]
        return statistics.mean(drawn)


def timm_drop_path(name: str, rate: float) -> nn.Module:
    """timm's DropPath at the paper's rates: a gate for each sample, applied to a branch that has run."""
    model = timm.create_model(name, drop_path_rate=0.)
    blocks = [module for module in model.modules() if hasattr(module, 'drop_path')]
    for block, block_rate in zip(blocks, timm_sd.drop_path_rates(len(blocks), rate), strict=True):
        block.drop_path = DropPath(block_rate)
    return model


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return dict(median=round(middle, 4), q1=round(low, 4), q3=round(high, 4))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Times all contestants in turns."""
    accelerator = Accelerator()
    args.amp = default_amp(accelerator.device.type) if args.amp is None else args.amp
    torch.manual_seed(0)
    models = dict(
        constant=timm.create_model(args.model, drop_path_rate=0.),
        timm_drop_path=timm_drop_path(args.model, args.drop_path),
        batch=timm.create_model(args.model, drop_path_rate=args.drop_path),
    )
    contestants = {name: Contestant(model, args, accelerator) for name, model in models.items()}
    ours = contestants['batch']
    timings = {name: contestant.bare for name, contestant in contestants.items()} | dict(loop=ours.loop)
    seconds: dict[str, list[float]] = {name: [] for name in timings}
    for round_ in tqdm(range(-1, args.rounds), desc='rounds, the first to warm up'):
        for name, timing in timings.items():
            elapsed = timing(max(round_, 0))
            if round_ >= 0:
                seconds[name].append(elapsed)

    share_open = ours.open_share(args.rounds)
    rows = {}
    for name, values in seconds.items():
        ratios = [value / base for value, base in zip(values, seconds['constant'], strict=True)]
        rows[name] = dict(step_seconds=spread(values), ratio_to_constant=spread(ratios),
                          images_per_second=round(args.batch_size / statistics.median(values), 1))
    ratio = rows['batch']['ratio_to_constant']['median']
    return dict(
        model=args.model, drop_path_rate=args.drop_path, batch_size=args.batch_size, steps=args.steps,
        rounds=args.rounds, blocks_open=round(share_open, 4), timings=rows,
        share_of_saving=round((1 - ratio) / (1 - share_open), 4),
        loop_to_bare_throughput=spread([b / w for b, w in zip(seconds['batch'], seconds['loop'], strict=True)]),
        hardware=hardware(accelerator, args.amp), versions=versions())


def main() -> None:
    """Measures, prints a table and writes JSON."""
    parser = Parser('Times stochastic depth against constant depth.')
    parser.add_argument('--model', default='sd_resnet110_cifar')
    parser.add_argument('--drop-path', type=rate, default=0.5, help='1 - p_L, above 0')
    parser.add_argument('-b', '--batch-size', type=count, default=128)
    parser.add_argument('--steps', type=count, default=2, help='steps a turn')
    parser.add_argument('--rounds', type=number(int, 2), default=40, help='turns of each contestant, at least 2')
    parser.add_argument('--amp', action=argparse.BooleanOptionalAction, help='bf16 autocast (default: if faster)')
    parser.add_argument('--json', help='file to write')
    args = parse(parser)
    check_model_name(args.model)
    if args.drop_path == 0:
        raise UserError('--drop-path 0 saves nothing; give a rate above 0')
    results = measure(args)
    print(f'{"":16}{"s/step":>9}{"images/s":>10}{"ratio":>8}   quartiles')
    for name, row in results['timings'].items():
        ratio = row['ratio_to_constant']
        print(f'{name:16}{row["step_seconds"]["median"]:9.4f}{row["images_per_second"]:10.0f}{ratio["median"]:8.3f}'
              f'   {ratio["q1"]:.3f} to {ratio["q3"]:.3f}')
    print(f'{results["blocks_open"]:.3f} of the blocks ran; {results["share_of_saving"]:.2f} of the possible saving '
          f'obtained; the loop runs at {results["loop_to_bare_throughput"]["median"]:.3f} of the bare step\'s images/s')
    if args.json:
        write_atomic(Path(args.json), (json.dumps(results, indent=2) + '\n').encode())


if __name__ == '__main__':
    run(main)
