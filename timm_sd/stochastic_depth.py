"""The method of *Deep Networks with Stochastic Depth* (Huang et al., ECCV 2016, arXiv 1603.09382).

The gate of a residual block is drawn on the host before the block runs, once for the mini-batch and identically on
every rank, so a closed block costs nothing anywhere: no kernel of its branch runs, forward or backward.

Three parts: `DepthGates` (gates.py) draws the gates of one network, `GatedBlock` makes a block of any class ask before
it runs, and `DepthGate`, in timm's `drop_path` slots, scales what the branch returns.
"""
import random
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from timm.layers import DropPath
from timm.models import register_notrace_module
from torch import nn

from .gates import DepthGates, check_choice, drop_path_rates

MODES = ('batch', 'subset', 'sample')
SCALES = ('train', 'eval')


class DepthGate(nn.Module):
    """One block's gate, in timm's `drop_path` slots: `forward` scales the branch of an open block.

    It has no parameters and no buffers, so a checkpoint stays that of the plain network.

    Args:
        gates: The draws of the whole network.
        index: The block's place in them, from 0.
        mode: 'batch' or 'subset', see `gate_blocks`.
        scale: 'train' divides the branch by p_l in training; 'eval' is the paper's eq. 5, which multiplies it by p_l
            in evaluation.
    """

    def __init__(self, gates: DepthGates, index: int, mode: str = 'batch', scale: str = 'train') -> None:
        super().__init__()
        self.gates = gates
        self.index = index
        self.mode = mode
        self.survival_prob = 1. - gates.drop_path_rates[index]
        self.train_scale = 1. / self.survival_prob if scale == 'train' else 1.
        self.eval_scale = self.survival_prob if scale == 'eval' else 1.
        self._folding: list[Any] = []

    @torch.jit.unused
    def fold_into(self, block: nn.Module, keys: list[str]) -> None:
        """From now on the tensors `keys` of `block` have p_l in them in every state_dict, and stand without it here.

        The hooks are the block's and not its layers', which others replace: SyncBatchNorm, timm's frozen batch norm.
        """
        self._folding += [block.register_state_dict_post_hook(partial(_fold, self.eval_scale, keys)),
                          block.register_load_state_dict_pre_hook(partial(_unfold, self.eval_scale, keys))]

    @torch.jit.unused
    def remove_folding(self) -> None:
        """Undoes `fold_into`."""
        for hook in self._folding:
            hook.remove()

    @torch.jit.unused
    @torch.compiler.disable  # the gate stays outside of every compiled graph, or each pattern would be compiled anew
    def is_open(self, x: torch.Tensor) -> bool:
        """Whether the block with the input `x` runs in this training forward pass. Ask once a pass."""
        return self.gates.ask(self.index, x).open[self.index]

    @torch.jit.unused
    @torch.compiler.disable
    def subset(self, x: torch.Tensor) -> torch.Tensor:
        """Which round(p_l B) of the samples `x` (B, ...) the branch runs on, (k,) int64; scales it by B / k."""
        key, size = self.gates.ask(self.index, x).key, len(x)
        count = min(size, max(1, round(self.survival_prob * size)))  # 0 where a last batch leaves a rank without images
        kept = random.Random(f'{key}/{self.index}').sample(range(size), count)
        self.train_scale = size / max(1, count)
        # device=x.device would wait for the device
        return torch.tensor(sorted(kept), dtype=torch.int64).to(x.device, non_blocking=True)

    def scale(self) -> float:
        """What the output of an open branch is multiplied by."""
        return self.train_scale if self.training else self.eval_scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scales the branch's output `x` (B, ...)."""
        return x if self.scale() == 1. else x * self.scale()

    def extra_repr(self) -> str:
        return f'block={self.index + 1}, drop_path_rate={self.gates.drop_path_rates[self.index]:.3f}, mode={self.mode}'


class GatedBlock(nn.Module):
    """Mixed into a residual block's own class: asks the gate before the block runs.

    In `__call__`, not in `forward`: the block's own code stays as it is, so TorchScript and export see a plain block,
    and `block.compile()` compiles the branch and leaves the gate outside.

    Attributes:
        plain_class: The block's class without the method.
        drop_path_slots: Names of the slots that hold the block's `DepthGate`.
        shortcut_path: Names of the block's modules that are its shortcut, in their order; none for the identity.
    """
    plain_class: type[nn.Module]
    drop_path_slots: list[str]  # lists, for TorchScript
    shortcut_path: list[str]

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # A Proxy is fx's: timm's and torchvision's tracers keep the block as a leaf, or one draw would be baked in.
        if not self.training or isinstance(x, torch.fx.Proxy):
            return super().__call__(x, *args, **kwargs)
        gate: Any = getattr(self, self.drop_path_slots[0])
        if gate.mode == 'subset':
            kept = gate.subset(x)
            shortcut = self.run_shortcut(x)
            y = super().__call__(on_channels_last(torch.index_select, x, kept), *args, **kwargs)
            return on_channels_last(torch.index_copy, shortcut, kept, y.to(shortcut.dtype))
        if gate.is_open(x):
            return super().__call__(x, *args, **kwargs)
        others = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        branch = (param for name, param in self.named_parameters() if name.partition('.')[0] not in self.shortcut_path)
        return closed_block(self.run_shortcut(x), (*branch, *others))

    def run_shortcut(self, x: torch.Tensor) -> torch.Tensor:
        """The output of the block without its branch; `x` is left alone, whatever an activation does in place."""
        y = x
        for name in self.shortcut_path:
            module: Any = getattr(self, name)
            y = module(y.clone() if y is x and getattr(module, 'inplace', False) else y)
        return y

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # the class was made at run time, so a pickle names the one it was made of
        reduced: Any = super().__reduce_ex__(protocol)
        return _new_gated, (self.plain_class,), *reduced[2:]


@cache
def _gated_class(plain_class: Any) -> type[GatedBlock]:
    attributes = dict(plain_class=plain_class, __module__=plain_class.__module__, __doc__=plain_class.__doc__)
    return register_notrace_module(type(f'Gated{plain_class.__name__}', (GatedBlock, plain_class), attributes))


def _new_gated(plain_class: Any) -> nn.Module:
    gated_class = _gated_class(plain_class)
    return gated_class.__new__(gated_class)


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


def closed_block(shortcut: torch.Tensor, params: Iterable[torch.Tensor]) -> torch.Tensor:
    """The output of a closed block.

    Args:
        shortcut: What the shortcut path returned, (B, C, H, W).
        params: The parameters of the branch; each gets a gradient of zero.

    Returns:
        The same values as `shortcut`, (B, C, H, W), without a copy.
    """
    return _ClosedBlock.apply(shortcut, *params)


def on_channels_last(function: Callable[..., torch.Tensor], x: torch.Tensor, kept: torch.Tensor,
                     *samples: torch.Tensor) -> torch.Tensor:
    """function(x, 0, kept, *samples); of a channels_last tensor (B, C, H, W) a channels_last one, without a detour.

    torch's index functions go pixel by pixel there, backward too, and may answer in another memory format.
    """
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        tensors = [tensor.permute(0, 2, 3, 1) for tensor in (x, *samples)]
        return function(tensors[0], 0, kept, *tensors[1:]).permute(0, 3, 1, 2)
    return function(x, 0, kept, *samples)


def _fold(survival_prob: float, keys: list[str], block: nn.Module, state_dict: dict, prefix: str, *args: Any) -> None:
    for key in keys:
        state_dict[prefix + key] = state_dict[prefix + key] * survival_prob


def _unfold(survival_prob: float, keys: list[str], block: nn.Module, state_dict: dict, prefix: str, *args: Any) -> None:
    for key in keys:
        if prefix + key in state_dict:
            state_dict[prefix + key] = state_dict[prefix + key] / survival_prob


class Residual(NamedTuple):
    """A residual block, and where its parts are.

    Attributes:
        block: The block; its output is shortcut + drop_path(branch), or the activation of that.
        slots: Names of its `drop_path` slots.
        shortcut_path: See `GatedBlock`.
        last_affine: For scale 'eval': the layers that end what goes into the slots; none if something follows them.
    """
    block: nn.Module
    slots: tuple[str, ...] = ('drop_path',)
    shortcut_path: tuple[str, ...] = ()
    last_affine: tuple[nn.Module, ...] = ()


def gate_blocks(
        residuals: Sequence[Residual],
        drop_path_rate: float,
        schedule: str = 'linear',
        mode: str = 'batch',
        scale: str = 'train',
        seed: int = 0,
) -> None:
    """Puts a `DepthGate` into the `drop_path` slots of each block; at rate 0 the blocks stay as they are.

    With scale='eval' a state_dict is folded on the way out and unfolded on the way in: p_l goes into the branch's last
    affine layer. So every checkpoint is that of a plain residual network, whatever the scale it was trained with. The
    folded tensors are copies: what averages weights in place through `state_dict` (timm's ModelEma) wants
    scale='train', or torch's AveragedModel, which goes through the parameters.

    Args:
        residuals: The residual blocks in the order of the forward pass.
        drop_path_rate: Rate of the last block, 1 - p_L, in [0, 1).
        schedule: 'linear' or 'uniform', see `drop_path_rates`.
        mode: 'batch', the paper's one gate for the whole mini-batch; 'subset', the branch runs on a random
            round(p_l B) of the B samples (DINOv2), so a step always costs the same, and batch norm sees these samples
            alone; or 'sample', timm's DropPath, which computes every branch and drops it for some samples: it saves
            nothing and is there for comparison.
        scale: 'train' or 'eval', see `DepthGate`.
        seed: Seed of the gates.

    Raises:
        ValueError: If the rate, schedule, mode or scale isn't one of these, mode and scale don't go together, or a
            branch ends in nothing that can absorb p_l with scale 'eval'.
    """
    check_arguments(drop_path_rate, schedule, mode, scale)
    gates = DepthGates(drop_path_rates(len(residuals), drop_path_rate, schedule), seed)
    if drop_path_rate == 0.:
        return
    if scale == 'eval' and not all(residual.last_affine for residual in residuals):
        raise ValueError("drop_path_scale is 'eval', but not all branches end in a layer that can absorb p_l; use "
                         "'train'")
    for index, (block, slots, shortcut_path, last_affine) in enumerate(residuals):
        gate = DropPath(gates.drop_path_rates[index]) if mode == 'sample' else DepthGate(gates, index, mode, scale)
        gate.train(block.training)
        for slot in slots:
            setattr(block, slot, gate)
        if isinstance(gate, DepthGate):
            block.drop_path_slots, block.shortcut_path = list(slots), list(shortcut_path)  # type: ignore[assignment]
            plain_class: Any = type(block)
            block.__class__ = _gated_class(plain_class)
            if scale == 'eval':
                last = {param for layer in last_affine for param in layer.parameters(recurse=False)}
                gate.fold_into(block, [name for name, param in block.named_parameters() if param in last])


def check_arguments(drop_path_rate: float, schedule: str, mode: str, scale: str) -> None:
    """Raises the ValueError that `gate_blocks` documents."""
    drop_path_rates(1, drop_path_rate, schedule)
    check_choice('drop_path_mode', mode, MODES)
    check_choice('drop_path_scale', scale, SCALES if mode == 'batch' else ('train',))


def depth_gates(model: nn.Module) -> DepthGates | None:
    """The gates of `model`, also when it is wrapped (DDP, torch.compile); None at constant depth and with DropPath."""
    return next((module.gates for module in model.modules() if isinstance(module, DepthGate)), None)


def compile_blocks(model: nn.Module, **options: Any) -> None:
    """Compiles each gated block for itself; the gates stay outside, so 2^L patterns need no more builds.

    Args:
        model: A model with stochastic depth in mode 'batch' or 'subset'.
        **options: Of `torch.compile`, such as mode='reduce-overhead' (CUDA graphs).

    Raises:
        ValueError: If no block has a gate.
    """
    blocks = [block for block in model.modules() if isinstance(block, GatedBlock)]
    if not blocks:
        raise ValueError('no block has a gate, so there is nothing to compile around; compile the whole model')
    # Each shape of branch is built at the full and the last batch's size, in evaluation, and once more where it is
    # recomputed; of timm's own blocks each one, whose p_l is a number in its graph.
    for limit in ('recompile_limit', 'accumulated_recompile_limit'):
        setattr(torch._dynamo.config, limit, max(8 * len(blocks), getattr(torch._dynamo.config, limit)))
    for block in blocks:
        block.compile(**dict(dict(dynamic=False), **options))
