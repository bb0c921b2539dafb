"""The method of *Deep Networks with Stochastic Depth* (Huang et al., ECCV 2016, arXiv 1603.09382) on one network.

The gate of a residual block is drawn on the host before the block runs, once for the mini-batch and identically on
every rank, so a closed block costs nothing anywhere: no kernel of its branch runs, forward or backward. gates.py draws,
skippable.py has the block, and `make_skippable` applies both to the blocks of a network.
"""
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from .gates import DepthGates
from .scaled_block import parameters_of
from .skippable import OWN_SLOT, DropPathSlot, SkippableBlock, skippable_class


class Affine(NamedTuple):
    """The parameters that scale a branch.

    Attributes:
        end: The slot, or the other child of the block, in which the branch ends.
        layer: The module that has them, in the block or the block itself.
        names: Their names there.
    """
    end: str
    layer: nn.Module
    names: tuple[str, ...] = ('weight', 'bias')


class Residual(NamedTuple):
    """A residual block, and where its parts are.

    Attributes:
        block: The block; its output is shortcut + drop_path(branch), or the activation of that.
        slots: Names of its `drop_path` slots; none if it has no use for one.
        branch_ends: See `SkippableBlock`.
        shortcut_path: See `SkippableBlock`.
        relu_behind: See `SkippableBlock`.
        last_affine: For scale 'eval': what scales each branch; none if something that isn't linear ends one.
        chained: See `SkippableBlock`.
        nonnegative: See `SkippableBlock`.
        returns_tuple: See `SkippableBlock`.
        passes_on: See `SkippableBlock`.
    """
    block: nn.Module
    slots: tuple[str, ...] = ('drop_path',)
    branch_ends: tuple[str, ...] = ()
    shortcut_path: tuple[str, ...] = ()
    relu_behind: bool = False
    last_affine: tuple[Affine, ...] = ()
    chained: bool = True
    nonnegative: bool = False
    returns_tuple: bool = False
    passes_on: tuple[int, ...] = ()


def make_skippable(residuals: Sequence[Residual], gates: DepthGates, initialize: bool = False) -> None:
    """Puts a `DropPathSlot` into the `drop_path` slots of each block, and lets it be skipped.

    Modes: 'batch' is the paper's one gate for the whole mini-batch. With 'subset' the branch runs on a random
    round(p_l B) of the B samples (DINOv2), so a step always costs the same, and batch norm sees these samples alone.
    'sample' is timm's DropPath, which computes every branch and drops it for some samples: it saves nothing and is
    there for comparison.

    Scales: both divide a branch by p_l in training and do nothing in evaluation, so a state dict is always that of the
    plain network. 'train' is timm's custom. 'eval' is the paper's eq. 5 with plain stored weights, see
    `scale_gradients`. It follows the paper with SGD, momentum and weight decay. Optimisers that divide by the size of
    the gradient, such as Adam, take their own steps in the scaled weights. Clipping by a norm counts their gradients
    p_l times as large as the paper's. A last layer that is pruned, fused, wrapped (LoRA), compiled for itself or under
    weight norm gets the gradient of scale 'train'; what the network computes stays right.

    Args:
        residuals: The residual blocks in the order of the forward pass.
        gates: The network's gates, as many as blocks.
        initialize: With scale 'eval', start as the paper does: the last affine layer of each branch times p_l. Not for
            weights that were trained already.

    Raises:
        ValueError: If a branch ends in nothing that can absorb p_l with scale 'eval'.
    """
    if gates.scale == 'eval' and not all(residual.last_affine for residual in residuals):
        raise ValueError("drop_path_scale is 'eval', but not all branches end in a layer that can absorb p_l; use "
                         "'train'")
    for index, residual in enumerate(residuals):
        skippable: Any = residual.block
        plain_class: Any = type(residual.block)
        slots = list(residual.slots) or [OWN_SLOT]
        slot = DropPathSlot(gates, index).train(skippable.training)
        for name in slots:
            setattr(skippable, name, slot)
        if gates.mode == 'sample':
            continue
        paths = {module: name.split('.') if name else [] for name, module in skippable.named_modules()}
        skippable.drop_path_slots = slots
        skippable.branch_ends, skippable.shortcut_path = list(residual.branch_ends), list(residual.shortcut_path)
        skippable.last_affine = [(end, paths[layer], list(names), len(parameters_of(layer)) - len(names))
                                 for end, layer, names in residual.last_affine]
        skippable.passes_on = list(residual.passes_on)
        for name in ('relu_behind', 'chained', 'nonnegative', 'returns_tuple'):
            setattr(skippable, name, getattr(residual, name))
        skippable.compiled_forward = None
        skippable.__class__ = skippable_class(plain_class)
        if gates.scale == 'eval' and initialize:
            with torch.no_grad():
                for _, layer, names in residual.last_affine:
                    for name in names:
                        getattr(layer, name).mul_(1. - gates.drop_path_rates[index])


def depth_gates(model: nn.Module) -> DepthGates | None:
    """The gates of `model`, also when it is wrapped (DDP, torch.compile).

    At rate 0 and in mode 'sample' they are there too and never draw, so one training loop serves all.

    Returns:
        The gates; None if no `drop_path` slot of the model is this package's.

    Raises:
        ValueError: If there are several, of two networks or of a part that was copied.
    """
    found = {id(module.gates): module.gates for module in model.modules() if isinstance(module, DropPathSlot)}
    if len(found) > 1:
        raise ValueError(f'{type(model).__name__} holds {len(found)} networks with gates of their own, or copies of '
                         'blocks, which have their own too; ask each network for its gates')
    return next(iter(found.values()), None)


def compile_blocks(model: nn.Module, **options: Any) -> None:
    """Compiles each block for itself; the gates stay outside, so 2^L patterns need no more builds.

    Args:
        model: A model with stochastic depth in mode 'batch' or 'subset', or made at rate 0.
        **options: Of `torch.compile`, such as mode='reduce-overhead' (CUDA graphs).

    Raises:
        ValueError: If no block can be skipped.
    """
    blocks = [block for block in model.modules() if isinstance(block, SkippableBlock)]
    if not blocks:
        raise ValueError('no block has a gate, so there is nothing to compile around; compile the whole model')
    # Each shape of branch is built at the full and the last batch's size, in evaluation, and once more where it is
    # recomputed.
    for limit in ('recompile_limit', 'accumulated_recompile_limit'):
        setattr(torch._dynamo.config, limit, max(8 * len(blocks), getattr(torch._dynamo.config, limit)))
    # In mode 'subset' another rate is another size of the batch.
    takes_subsets = any(isinstance(slot, DropPathSlot) and slot.gates.mode == 'subset' for slot in model.modules())
    options = dict(dict(dynamic=None if takes_subsets else False), **options)
    for block in blocks:
        block.compile(**options)
