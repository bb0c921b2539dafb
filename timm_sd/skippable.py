"""A residual block that asks a gate before its branch runs, and what it does then: open, closed, rescaled, subset.

`SkippableBlock` is mixed into a block of any class, and `DropPathSlot`, in timm's `drop_path` slots, scales what the
branch returns.
"""
import random
import types
from functools import cache, update_wrapper
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, drop_path
from timm.models import register_notrace_module
from torch import nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

from .functional import add_scaled, as_tensor, closed_block, on_channels_last, scaled
from .gates import DepthGates
from .scaled_block import features, parameters_of, scaled_block
from .shallow_copy import has_hooks

OWN_SLOT = 'depth_gate'  # of a block that has no drop_path slot: its forward knows nothing of it


class DropPathSlot(DropPath):
    """timm's DropPath for the slots of one block; its rate stands in the network's gates.

    It has no parameters and no buffers, so a checkpoint stays that of the plain network. Its own training mode decides
    whether the block drops: in a network in evaluation it can be on (Monte Carlo stochastic depth).

    Args:
        gates: The gates of the whole network.
        index: The block's place in them, from 0.
    """
    __jit_unused_properties__ = ['drop_prob']

    def __init__(self, gates: DepthGates, index: int) -> None:
        nn.Module.__init__(self)  # DropPath's own would set drop_prob, which needs the gates
        self.scale_by_keep = True
        self.gates = gates
        self.index = index
        # Of the branch, in the copy of the slot that a forward pass runs.
        self.factor: float | torch.Tensor | None = None

    @property
    def drop_prob(self) -> float:
        """The block's drop path rate, 1 - p_l. As in timm's DropPath, it can be set; here between any two passes."""
        return self.gates.drop_path_rates[self.index]

    @drop_prob.setter
    def drop_prob(self, rate: float) -> None:
        rates = list(self.gates.drop_path_rates)
        rates[self.index] = rate
        self.gates.drop_path_rates = rates

    @torch.jit.unused
    def drops(self) -> bool:
        """Whether the block asks its gate.

        Raises:
            RuntimeError: If it runs in evaluation, but may repeat a forward pass that was in training.
        """
        if not self.training and self.gates.active and not torch.compiler.is_compiling() \
                and self.gates.remembers(self.index):
            raise RuntimeError(f'block {self.index + 1} runs in evaluation within a backward pass, with the random '
                               'numbers of a training pass; change the mode after backward()')
        return self.training and self.gates.active

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scales the branch's output `x` (B, ...).

        Raises:
            RuntimeError: If it is called in training by anything but the forward of its block's class.
        """
        if torch.jit.is_scripting():
            return x
        else:
            if self.factor is not None:
                return scaled(x, self.factor)
            if self.gates.mode == 'sample':
                if self.training and self.gates.over_time is not None:
                    self.gates.check_epoch()
                    if torch.compiler.is_compiling():
                        return self._drop_samples(x, self.gates.survival_probs[self.index].to(x.device))
                return drop_path(x, self.drop_prob, self.training, self.scale_by_keep)
            if self.training and self.gates.active and not _is_traced(x):
                raise RuntimeError(f'the drop path of block {self.index + 1} knows its gate in the forward of the '
                                   "block's class alone; for another forward, put timm's DropPath there")
            return x

    def _drop_samples(self, x: torch.Tensor, survival_prob: torch.Tensor) -> torch.Tensor:
        """timm's drop_path of x (B, ...), with a tensor (), which needs no new build where its value changes."""
        mask = (torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) < survival_prob).to(x.dtype)
        return x * (mask / survival_prob if self.scale_by_keep else mask)

    def extra_repr(self) -> str:
        return f'block={self.index + 1}, drop_prob={self.drop_prob:.3f}, mode={self.gates.mode}'


class SkippableBlock(nn.Module):
    """Mixed into a residual block's own class: asks the gate, and skips the branch if it is closed.

    The class of a block is swapped, as torch's parametrize and fully_shard do it. The gate is asked in `forward`, so
    that a closed block is a module call like any other: hooks fire, and FSDP has gathered its parameters.

    An open block runs its own class's forward on a shallow copy of itself, whose slots know the scale of this pass: so
    passes in several threads don't meet.

    Tracers (torch.export, ONNX, jit.trace, fx, TorchScript) see the plain network, in training too.

    What a closed block returns is its input, without a copy, unless something else than the next block gets it. So who
    collects the outputs of several blocks in training may have one tensor twice.

    Attributes:
        plain_class: The block's class without the method.
        drop_path_slots: Names of the slots that hold the block's `DropPathSlot`.
        branch_ends: Names of the block's modules whose output is a branch, where no slot scales it.
        shortcut_path: Names of the block's modules that are its shortcut, in their order, and of the activation behind
            the addition; none for the identity.
        relu_behind: Whether there is a ReLU behind the addition that is no module.
        nonnegative: Whether its input came out of a ReLU when the method was added. A closed block then skips its own
            ReLU, so replace either all activations of the network or none.
        last_affine: With scale 'eval', the parameters that scale each branch: the slot or module that ends it, the
            names of the modules on the way to their layer, their own names, and how many other parameters it has.
        chained: Whether its output goes to nothing but the next block that can be skipped.
        returns_tuple: Whether its features come first in a tuple.
        passes_on: What is behind them there: the places of arguments behind the input, from 0, or -1 for None.
        compiled_forward: The forward of its class, compiled, or None.
    """
    plain_class: type[nn.Module]
    drop_path_slots: list[str]  # lists, for TorchScript
    branch_ends: list[str]
    shortcut_path: list[str]
    relu_behind: bool
    nonnegative: bool
    last_affine: list[tuple[str, list[str], list[str], int]]
    chained: bool
    returns_tuple: bool
    passes_on: list[int]
    compiled_forward: Any

    def compile(self, **options: Any) -> None:
        """Compiles what the gate lets run; nn.Module's own would compile the gate too, anew for each pattern."""
        if self.plain_class.compile is nn.Module.compile:
            self.compiled_forward = torch.compile(self.plain_class.forward, **options)
        else:
            self.plain_class.compile(self, **options)

    def run_shortcut(self, x: torch.Tensor) -> torch.Tensor:
        """The output of the block without its branch; `x` is left alone, whatever an activation does in place."""
        y = x
        for name in self.shortcut_path:
            module: Any = self._modules[name]
            kind = type(module)
            changes_nothing = kind is nn.Identity or (kind is nn.ReLU and y is x and self.nonnegative)
            if changes_nothing and not has_hooks(module):
                continue
            y = module(y.clone() if getattr(module, 'inplace', False) else y)
        return F.relu(y) if self.relu_behind and not (y is x and self.nonnegative) else y

    def run_open(self, x: torch.Tensor, factor: torch.Tensor, gradient_factor: torch.Tensor) -> torch.Tensor:
        """The output of the block if it is open, for a recording: no gate is asked, and p_l may change later.

        Args:
            x: Its input, (B, C, H, W).
            factor: 1 / p_l, on the device, ().
            gradient_factor: p_l ** 2, likewise; see `scale_gradients`.
        """
        slots = {name: self._modules[name] for name in self.drop_path_slots}
        return _run(scaled_block(self, slots, factor, gradient_factor), x)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), 'compiled_forward': None}  # as nn.Module leaves out what it compiled

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # the class was made at run time, so a pickle names the one it was made of
        reduced: Any = super().__reduce_ex__(protocol)
        return _new_skippable, (self.plain_class,), *reduced[2:]


@cache
def skippable_class(plain_class: Any) -> type[SkippableBlock]:
    """`plain_class` with `SkippableBlock` mixed in."""
    plain, gated = plain_class.forward, _forward

    def forward(self, *args, **kwargs):
        return gated(self, *args, **kwargs)

    # TorchScript compiles the source that inspect finds behind `__wrapped__`, and looks names up in the globals of the
    # function. With both of the plain class it sees the plain block.
    forward = types.FunctionType(forward.__code__, plain.__globals__, closure=forward.__closure__)
    attributes = dict(plain_class=plain_class, __module__=plain_class.__module__, __doc__=plain_class.__doc__,
                      forward=update_wrapper(forward, plain))
    return register_notrace_module(type(f'Skippable{plain_class.__name__}', (SkippableBlock, plain_class), attributes))


def _new_skippable(plain_class: Any) -> nn.Module:
    skippable = skippable_class(plain_class)
    return skippable.__new__(skippable)


def _is_traced(x: torch.Tensor) -> bool:
    """Whether what runs now is being recorded, by torch.export, jit.trace or fx: that must not freeze a draw."""
    if is_fx_symbolic_tracing():
        if forward_ad._current_level >= 0:
            raise RuntimeError('torch.func.linearize would trace the plain network, and return its derivative beside '
                               'the value of the one with gates; use torch.func.jvp, or call eval()')
        return True
    # not is_exporting(), which torch 2.11 takes for true in all that torch.compile compiles
    return torch.compiler._is_exporting_flag or torch.jit.is_tracing() or isinstance(x, (FakeTensor, FunctionalTensor))


def _forward(block: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The forward of a `SkippableBlock`."""
    slots = {name: slot for name in block.drop_path_slots
             if isinstance(slot := block._modules.get(name), DropPathSlot) and slot.drops()}
    if not slots or _is_traced(x):
        return _run(block, x, *args, **kwargs)
    return _run_gated(block, slots, x, *args, **kwargs)


def _run(block: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The forward of the block's own class."""
    return (block.compiled_forward or block.plain_class.forward)(block, x, *args, **kwargs)


# The gate stays outside of every compiled graph, or each pattern would be compiled anew. What it calls is compiled.
@torch.compiler.disable(recursive=False)
def _run_gated(block: Any, slots: dict[str, DropPathSlot], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The forward of a block whose `slots` drop: all of them, unless another module was put into one."""
    if '_is_replica' in block.__dict__:
        raise RuntimeError('nn.DataParallel: its replicas would draw gates of their own; use DistributedDataParallel')
    if x.is_cuda and torch.cuda.is_current_stream_capturing():  # no GPU has run this line
        raise RuntimeError('a CUDA graph of the whole network would freeze one draw; record its blocks, or call eval()')
    slot, all_slots = next(iter(slots.values())), len(slots) == len(block.drop_path_slots)
    draw = slot.gates.ask(slot.index)
    survival_prob = 1. - draw.rates[slot.index]
    # What is compiled takes the factor as a tensor: a number would be a part of the graph, and another a new build.
    number = _as_number
    if block.compiled_forward is not None or torch._C._dynamo.eval_frame.get_eval_frame_callback() not in (None, False):
        number = as_tensor
    if slot.gates.mode == 'subset':
        if not all_slots:
            raise RuntimeError(f"block {slot.index + 1} has another module in one of its drop_path slots, which mode "
                               "'subset' can't run on all samples; replace them all, or none")
        kept = _subset(f'{draw.key}/{slot.index}', x, survival_prob)
        factor = len(x) / max(1, len(kept)) if slot.scale_by_keep else 1.
        branch = scaled_block(block, slots, number(factor, x))
        if len(kept) == len(x):
            return _run(branch, x, *args, **kwargs)
        shortcut = block.run_shortcut(x)
        y = features(_run(branch, on_channels_last(torch.index_select, x, kept), *args, **kwargs))
        return _output(block, on_channels_last(torch.index_copy, shortcut, kept, y.to(shortcut.dtype)), args)
    if draw.open[slot.index]:
        factors = (1. / survival_prob, survival_prob ** 2) if slot.scale_by_keep else (1., None)
        return _run(scaled_block(block, slots, number(factors[0], x), factors[1]), x, *args, **kwargs)
    if not all_slots:  # the branch of the other module runs
        return _run(scaled_block(block, slots, 0.), x, *args, **kwargs)
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    y = closed_block(block.run_shortcut(x), (*parameters_of(block, skip=block.shortcut_path), *tensors))
    # `y` may share its memory with `x`. The next block writes into neither; other code and hooks may.
    return _output(block, y if block.chained and not block._forward_hooks else y.clone(), args)


def _output(block: Any, y: torch.Tensor, args: tuple) -> Any:
    """The features `y` as the block's class would return them."""
    return (y, *(None if place < 0 else args[place] for place in block.passes_on)) if block.returns_tuple else y


def _as_number(factor: float, x: torch.Tensor) -> float:
    return factor


@torch.compiler.disable
def _subset(key: str, x: torch.Tensor, survival_prob: float) -> torch.Tensor:
    """Which round(p_l B) of the samples `x` (B, ...) the branch runs on, (k,) int64."""
    size = len(x)
    count = min(size, max(1, round(survival_prob * size)))  # 0 where a last batch leaves a rank without images
    kept = sorted(random.Random(key).sample(range(size), count))
    return torch.tensor(kept, dtype=torch.int64).to(x.device, non_blocking=True)  # device=x.device would wait for it


def add_branch(block: nn.Module, shortcut: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """shortcut + block.drop_path(residual), each (B, C, H, W).

    The scale of a `DropPathSlot` is fused into the addition: a kernel of its own would eat a good part of what is
    saved.
    """
    slot: Any = block.drop_path
    if isinstance(slot, DropPathSlot) and slot.factor is not None and not has_hooks(slot):
        return add_scaled(shortcut, residual, slot.factor)
    return shortcut + slot(residual)
