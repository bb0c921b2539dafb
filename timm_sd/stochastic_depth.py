"""The method of *Deep Networks with Stochastic Depth* (Huang et al., ECCV 2016, arXiv 1603.09382).

The gate of a residual block is drawn on the host before the block runs, once for the mini-batch and identically on
every rank, so a closed block costs nothing anywhere: no kernel of its branch runs, forward or backward.

Three parts: `drop_path_rates` says how likely each block is dropped, `DepthGates` draws the gates of one network, and
`DepthGate`, in timm's `drop_path` slot, tells its block whether to run and scales what the branch returns.
"""
import random
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath
from torch import nn

SCHEDULES = ('linear', 'uniform')
MODES = ('batch', 'sample')
SCALES = ('train', 'eval')


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f'{name} is {value!r}; choose one of {", ".join(choices)}')


def drop_path_rates(depth: int, drop_path_rate: float, schedule: str = 'linear') -> list[float]:
    """The drop path rate 1 - p_l of each of `depth` blocks.

    `linear` is the paper's eq. 4, p_l = 1 - (l / L)(1 - p_L) for l = 1..L: the first block is already dropped at times
    and the last at exactly `drop_path_rate`. This is not timm's rule, idx / (n - 1), which never drops the first.

    Args:
        depth: Number of residual blocks, L.
        drop_path_rate: Rate of the last block, 1 - p_L, in [0, 1).
        schedule: 'linear' or 'uniform' (every block at `drop_path_rate`).

    Returns:
        The rates of block 1, ..., block L.

    Raises:
        ValueError: If the rate or the schedule isn't one of these.
    """
    _check_choice('drop_path_schedule', schedule, SCHEDULES)
    if not 0. <= drop_path_rate < 1.:
        raise ValueError(f'drop_path_rate is {drop_path_rate}; it must lie in [0, 1)')
    if schedule == 'uniform':
        return [drop_path_rate] * depth
    return [drop_path_rate * block / depth for block in range(1, depth + 1)]


class DepthGates:
    """The gates of one network: a Bernoulli draw for each block and mini-batch.

    A draw is a function of (seed, epoch, step) alone, so it is the same on every rank and world size, and the same
    again after a resume. `step` counts the training forward passes of the epoch. In a loop that never calls `set_epoch`
    all of training is epoch 0, and the steps go on counting.

    Attributes:
        drop_path_rates: 1 - p_l of each block.
        open: The last draw, one bool a block.
    """

    def __init__(self, rates: Sequence[float], seed: int = 0) -> None:
        self.drop_path_rates = list(rates)
        self.seed = seed
        self.epoch = 0
        self.step = 0
        self.open = [True] * len(self.drop_path_rates)
        self._last_asked = len(self.open)

    def is_open(self, index: int) -> bool:
        """Whether block `index` (from 0) runs; the first block that asks in a forward pass draws for all.

        Drawn here rather than in a hook of the model, so that forward_features, forward_intermediates and timm's
        feature wrappers, which never call the model itself, get one draw a pass too. The blocks ask in order, so one
        that comes no later than the last one has begun a new pass.
        """
        if index <= self._last_asked:
            self.draw()
        self._last_asked = index
        return self.open[index]

    def draw(self) -> list[bool]:
        """Draws the gates of the next step: b_l ~ Bernoulli(p_l), True for open."""
        # A string seed goes through SHA-512, documented to be stable, so neighbouring steps are independent streams.
        # torch's generators stay untouched: a drop path must not shift the augmentation or dropout of its rank.
        uniform = random.Random(f'{self.seed}/{self.epoch}/{self.step}').random
        self.open = [uniform() >= rate for rate in self.drop_path_rates]
        self.step += 1
        return self.open

    def set_epoch(self, epoch: int) -> None:
        """Starts an epoch: the draws that follow are those of its steps 0, 1, ..."""
        self.epoch, self.step = epoch, 0

    @property
    def expected_depth(self) -> float:
        """Expected number of open blocks, the sum of p_l: (3L - 1) / 4 for the linear schedule at p_L = 0.5."""
        return sum(1. - rate for rate in self.drop_path_rates)

    def state_dict(self) -> dict:
        """What is needed to go on drawing: seed, epoch and step."""
        return dict(seed=self.seed, epoch=self.epoch, step=self.step)

    def load_state_dict(self, state: dict) -> None:
        """Goes on where `state_dict` was taken."""
        self.seed, self.epoch, self.step = state['seed'], state['epoch'], state['step']


class DepthGate(nn.Module):
    """One block's gate, in timm's `drop_path` slot: `forward` scales the branch of an open block.

    It has no parameters and no buffers, so a checkpoint stays that of the plain network.

    Args:
        gates: The draws of the whole network.
        index: The block's place in them, from 0.
        scale: 'train' divides the branch by p_l in training; 'eval' is the paper's eq. 5, which multiplies it by p_l
            in evaluation.
    """

    def __init__(self, gates: DepthGates, index: int, scale: str = 'train') -> None:
        super().__init__()
        self.gates = gates
        self.index = index
        survival_prob = 1. - gates.drop_path_rates[index]
        self.train_scale = 1. / survival_prob if scale == 'train' else 1.
        self.eval_scale = survival_prob if scale == 'eval' else 1.

    @torch.compiler.disable  # the gate stays outside of every compiled graph, or each pattern would be compiled anew
    def is_open(self) -> bool:
        """Whether this block runs in this training forward pass. Ask once a pass."""
        return self.gates.is_open(self.index)

    def scale(self) -> float:
        """What the output of an open branch is multiplied by."""
        return self.train_scale if self.training else self.eval_scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scales the branch's output `x` (B, C, H, W)."""
        return x if self.scale() == 1. else x * self.scale()

    def extra_repr(self) -> str:
        return f'block={self.index + 1}, drop_path_rate={self.gates.drop_path_rates[self.index]:.3f}'


def is_closed(block: nn.Module) -> bool:
    """Whether `block` is dropped in this forward pass; False for a block without a `DepthGate`."""
    gate = block.drop_path
    return isinstance(gate, DepthGate) and gate.training and not gate.is_open()


def add_branch(block: nn.Module, shortcut: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """shortcut + block.drop_path(residual), each (B, C, H, W).

    A `DepthGate`'s scale is fused into the addition: a kernel of its own would eat a good part of what is saved.
    """
    gate: Any = block.drop_path
    if isinstance(gate, DepthGate):
        return torch.add(shortcut, residual, alpha=gate.scale())
    return shortcut + gate(residual)


class _ClosedBlock(torch.autograd.Function):
    """Hands the shortcut through, and a gradient of zero to the parameters of the branch that didn't run.

    Zero, not None: the original's weight decay and momentum act on a dropped block, and DistributedDataParallel sees
    every parameter in every step, so it needs no find_unused_parameters (and static_graph would be wrong).
    """

    @staticmethod
    def forward(ctx: Any, shortcut: torch.Tensor, *params: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*params)
        return shortcut.view_as(shortcut)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        needed = ctx.needs_input_grad[1:]
        grads = [torch.empty_like(p) if need else None for p, need in zip(ctx.saved_tensors, needed, strict=True)]
        if any(needed):  # one kernel a block, not one a parameter: on a GPU the step is bound by launches
            torch._foreach_zero_([zeros for zeros in grads if zeros is not None])
        return grad, *grads


def closed_block(shortcut: torch.Tensor, params: Iterable[nn.Parameter]) -> torch.Tensor:
    """The output of a closed block.

    Args:
        shortcut: What the shortcut path returned, (B, C, H, W).
        params: The parameters of the branch; each gets a gradient of zero.

    Returns:
        The same values as `shortcut`, (B, C, H, W), without a copy.
    """
    return _ClosedBlock.apply(shortcut, *params)


def _fold(survival_prob: float, layer: nn.Module, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    for name, _ in layer.named_parameters(recurse=False):
        state_dict[prefix + name] = state_dict[prefix + name] * survival_prob


def _unfold(survival_prob: float, layer: nn.Module, state_dict: dict, prefix: str, *args: Any) -> None:
    for name, _ in layer.named_parameters(recurse=False):
        if prefix + name in state_dict:
            state_dict[prefix + name] = state_dict[prefix + name] / survival_prob


def gate_blocks(
        blocks: Sequence[nn.Module],
        drop_path_rate: float,
        schedule: str = 'linear',
        mode: str = 'batch',
        scale: str = 'train',
        seed: int = 0,
        last_affine: str = 'bn2',
) -> None:
    """Puts a `DepthGate` into the `drop_path` slot of each block; at rate 0 the blocks stay as they are.

    With scale='eval' a state_dict is folded on the way out and unfolded on the way in: p_l goes into the branch's last
    affine layer. So every checkpoint is that of a plain residual network, whatever the scale it was trained with. The
    folded tensors are copies: what averages weights in place through `state_dict` (timm's ModelEma) wants
    scale='train', or torch's AveragedModel, which goes through the parameters.

    Args:
        blocks: The residual blocks in the order of the forward pass. Each asks `is_closed(block)` before it runs.
        drop_path_rate: Rate of the last block, 1 - p_L, in [0, 1).
        schedule: 'linear' or 'uniform', see `drop_path_rates`.
        mode: 'batch', the paper's one gate for the whole mini-batch, or 'sample', timm's DropPath, which computes
            every branch and drops it for some samples; it saves nothing and is there for comparison.
        scale: 'train' or 'eval', see `DepthGate`.
        seed: Seed of the gates.
        last_affine: Name of the affine layer that ends each block's branch.

    Raises:
        ValueError: If the rate, schedule, mode or scale isn't one of these, or mode and scale don't go together.
    """
    _check_choice('drop_path_mode', mode, MODES)
    _check_choice('drop_path_scale', scale, SCALES if mode == 'batch' else ('train',))
    gates = DepthGates(drop_path_rates(len(blocks), drop_path_rate, schedule), seed)
    if drop_path_rate == 0.:
        return
    for index, block in enumerate(blocks):
        if mode == 'sample':
            block.drop_path = DropPath(gates.drop_path_rates[index])
            continue
        block.drop_path = DepthGate(gates, index, scale)
        if scale == 'eval':
            layer = getattr(block, last_affine)
            layer.register_state_dict_post_hook(partial(_fold, block.drop_path.eval_scale))
            layer.register_load_state_dict_pre_hook(partial(_unfold, block.drop_path.eval_scale))


def depth_gates(model: nn.Module) -> DepthGates | None:
    """The gates of `model`, also when it is wrapped (DDP, torch.compile); None at constant depth and with DropPath."""
    return next((module.gates for module in model.modules() if isinstance(module, DepthGate)), None)
