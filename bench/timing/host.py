"""What the gate of a block costs the host: Python and autograd, around kernels too small to count."""
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import timm_sd
from timing.rows import spread
from timm_sd.functional import closed_block
from timm_sd.resnet_cifar_sd import BasicBlock
from timm_sd.stochastic_depth import Affine, Residual, make_skippable

BLOCKS = 18
PASSES = 10  # of a contestant in a turn
ALWAYS, NEVER = 1. - 1e-9, 1e-9  # drop path rates at which the gates are still drawn
OVER = ', over constant depth'


class _LightBlock(BasicBlock):
    """The paper's block, with its parameters, but of its branch the last batch norm alone runs."""

    def run_branch(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn2(x)


class _ZerosAlone(_LightBlock):
    """What a closed block leaves to autograd, its shortcut and zero gradients, without a gate."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.all_parameters = list(self.parameters())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return closed_block(x, self.all_parameters)


def _stage(block_class: type[BasicBlock], drop_path_rate: float = 0., scale: str = 'train') -> nn.Sequential:
    """Blocks in training mode, each at the same rate."""
    blocks = [block_class(16, 16) for _ in range(BLOCKS)]
    if drop_path_rate:
        make_skippable([
            Residual(block, shortcut_path=('shortcut', 'act2'), last_affine=(Affine('drop_path', block.bn2),),
                     nonnegative=True)
            for block in blocks], timm_sd.DepthGates(BLOCKS, drop_path_rate, 'uniform', scale=scale))
    return nn.Sequential(*blocks).train()


def host_costs(rounds: int) -> list[dict[str, Any]]:
    """Times forward and backward passes of light blocks on two images of 2 x 2 pixels, in turns, on one thread.

    Args:
        rounds: Turns of each contestant.

    Returns:
        Rows with `microseconds` a block, the median and the quartiles over the rounds: of a closed block, of its
        shortcut and zero gradients alone, and of an open block more than of one of constant depth.
    """
    torch.set_num_threads(1)
    stages = {'zero gradients alone': _stage(_ZerosAlone)}
    for scale in timm_sd.SCALES:
        stages[f'closed, scale {scale}'] = _stage(_LightBlock, ALWAYS, scale)
        stages[f'open, scale {scale}{OVER}'] = _stage(_LightBlock, NEVER, scale)
    turns = {name: _turn(stage) for name, stage in stages.items()}
    of_constant, found = _turn(_stage(_LightBlock)), {name: list[float]() for name in stages}
    for _ in tqdm(range(rounds), desc='rounds', leave=False):
        base = of_constant()
        for name, turn in turns.items():
            found[name].append(turn() - (base if name.endswith(OVER) else 0.))
    return [dict(name=name, microseconds=spread(values)) for name, values in found.items()]


def _turn(stage: nn.Sequential) -> Callable[[], float]:
    """A function that returns the microseconds a block of one forward and backward pass, the mean over a turn."""
    x, params = torch.randn(2, 16, 2, 2, requires_grad=True), list(stage.parameters())
    gradient = torch.ones(2, 16, 2, 2)

    def turn() -> float:
        seconds = 0.
        for _ in range(PASSES):
            start = time.perf_counter()
            stage(x).backward(gradient)
            seconds += time.perf_counter() - start
            for param in params:
                param.grad = None
        return seconds / PASSES / BLOCKS * 1e6

    turn()  # to warm up
    return turn
