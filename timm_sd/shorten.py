"""Depth after training: a network loses residual blocks for good, and what is left is a plain, faster network.

A network that was trained with stochastic depth does not rely on any one block. So it can lose some without further
training. LayerDrop (arXiv 1909.11556) and LayerSkip (arXiv 2404.16710) found this for transformers.

shortened.py has what is left, and how it is saved and loaded.
"""
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from itertools import chain
from numbers import Integral
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import update_bn

from .block_probe import training_mode
from .compute import branch_shares
from .convert import remove_stochastic_depth
from .probe import example_arguments, residual_blocks
from .scaled_block import features
from .shortened import remove_blocks, take_out
from .stochastic_depth import Residual

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]


def _config(residual: Residual) -> dict[str, Any]:
    """The `Shortcut.config` of a block; what does nothing to its input is left out."""
    modules: Any = residual.block._modules
    path = [name for name in residual.shortcut_path if type(modules[name]) is not nn.Identity]
    if residual.nonnegative and path and type(modules[path[0]]) is nn.ReLU:
        del path[0]
    relu = residual.relu_behind and not (residual.nonnegative and not path)
    return dict(path=path, relu=relu, passes_on=residual.passes_on if residual.returns_tuple else None)


class _Block(NamedTuple):
    """A residual block that can be taken out.

    Attributes:
        name: Of its module.
        config: See `Shortcut.config`.
        residual: See `Residual`.
        size: Of its output for one image, such as (C, H, W).
    """
    name: str
    config: dict[str, Any]
    residual: Residual
    size: tuple[int, ...]


def _find_blocks(model: nn.Module, example_input: Any) -> list[_Block]:
    """The blocks in the order of the forward pass."""
    if any(getattr(block, 'compiled_forward', None) for block in model.modules()):
        raise ValueError(f'the blocks of {type(model).__name__} are compiled; shorten it before compile_blocks')
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel) or hasattr(model, '_orig_mod'):
        raise ValueError(f'{type(model).__name__} wraps a network; pass the network itself')
    residuals = residual_blocks(model, example_input=example_input).closable
    if not residuals:
        raise ValueError(f'{type(model).__name__} has no residual block that could be taken out')
    names, sizes = {module: name for name, module in model.named_modules()}, {}
    args, kwargs = example_arguments(model, example_input)

    def note(block: nn.Module, args: tuple, output: Any) -> None:
        sizes[block] = tuple(features(output).shape[1:])
    with training_mode(model, False), torch.no_grad(), ExitStack() as hooks:
        for residual in residuals:
            hooks.callback(residual.block.register_forward_hook(note).remove)
        model(*args, **kwargs)
    return [_Block(names[each.block], _config(each), each, sizes[each.block]) for each in residuals]


def _in_one_stage(size: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether outputs are of one size: (C, H, W) is (H, W, C), or as tokens (H W, C)."""
    return math.prod(size) == math.prod(other) and (sorted(size) == sorted(other) or len(size) != len(other))


def _from_the_ends(sizes: Sequence[tuple[int, ...]]) -> list[int]:
    """The order in which blocks go: those at the end of their stage first, of all stages in proportion.

    A stage is a row of blocks whose outputs have one size. Its first block goes last. Of two in the same place the
    deeper one goes first.

    Args:
        sizes: Of the output of each block.
    """
    stages: list[list[int]] = []
    for index, size in enumerate(sizes):
        if index and _in_one_stage(sizes[index - 1], size):
            stages[-1].append(index)
        else:
            stages.append([index])
    depth = {index: number / len(stage) for stage in stages for number, index in enumerate(stage)}
    return sorted(depth, key=lambda index: (-depth[index], -index))


def shorten(model: nn.Module, blocks: int | None = None, share: float | None = None,
            order: Sequence[int] | None = None, bn_batches: Iterable[Any] | None = None,
            example_input: Any = None) -> nn.Module:
    """Takes residual blocks out of a trained network, in place; what is left is a plain network, without drop paths.

    Args:
        model: A residual network that `add_stochastic_depth` could be called on, trained with it or not.
        blocks: How many residual blocks stay.
        share: Or the share of the network's multiplications that may stay, in (0, 1]; as few blocks as needed go.
        order: The blocks by their number, from 0, in the order in which they go, such as that of `rank_blocks`. By
            default from the end of each stage.
        bn_batches: Training images by which the statistics of batch norm are estimated anew (torch's `update_bn`),
            batches of (B, C, H, W), or tuples that begin with them. By default they stay.
        example_input: See `add_stochastic_depth`.

    Returns:
        The same network.

    Raises:
        ValueError: If there are no such blocks, or the multiplications can't be as few as that.
    """
    found, name = _find_blocks(model, example_input), type(model).__name__
    order = _from_the_ends([block.size for block in found]) if order is None else [int(index) for index in order]
    if len(set(order)) < len(order) or not set(order) <= set(range(len(found))):
        raise ValueError(f'order is {order}; it must be different numbers of the blocks, 0 ... {len(found) - 1}')
    if (blocks is None) == (share is None):
        raise ValueError(f'blocks is {blocks} and share {share}; give one of them')
    if blocks is None:
        count = _count_for_share(model, [found[index].residual for index in order], share, example_input)
    elif not isinstance(blocks, Integral) or isinstance(blocks, bool) or not 0 <= blocks <= len(found):
        raise ValueError(f'blocks is {blocks!r}; {name} has {len(found)} residual blocks, of which so many can stay '
                         'or fewer')
    else:
        count = len(found) - int(blocks)
    if count > len(order):
        raise ValueError(f'order has {len(order)} blocks, and {count} would have to go')
    if bn_batches is not None:
        batches = iter(bn_batches)
        try:
            bn_batches = chain([next(batches)], batches)
        except StopIteration:  # then update_bn would leave batch norm without statistics
            raise ValueError('bn_batches holds no images; a generator can be read once') from None
    remove_stochastic_depth(model)
    remove_blocks(model, {found[index].name: found[index].config for index in order[:count]})
    if bn_batches is not None:
        update_bn(bn_batches, model, next(model.parameters()).device)
    return model


def _count_for_share(model: nn.Module, residuals: Sequence[Residual], share: Any, example_input: Any) -> int:
    """How many blocks have to go, in this order, until at most `share` of the multiplications is left."""
    if not isinstance(share, int | float) or isinstance(share, bool) or not 0. < share <= 1.:
        raise ValueError(f'share is {share!r}; it must be a number in (0, 1]')
    left = 1.
    for count, of_branch in enumerate([0., *branch_shares(
            model, [(each.block, each.shortcut_path) for each in residuals], example_input)]):
        left -= of_branch
        if left <= share + 1e-9:
            return count
    raise ValueError(f'share is {share}, and {left:.3f} of the multiplications lie outside of the residual branches '
                     'that may go')


@torch.no_grad()
def rank_blocks(model: nn.Module, batches: Batches,
                loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = F.cross_entropy,
                example_input: Any = None) -> list[int]:
    """The residual blocks by how little they matter: the loss on held-out images without each one, the others there.

    Runs the network once over the images for each block. Not for test images: what is chosen by them can't be judged
    by them.

    Args:
        model: A trained network; it stays as it is.
        batches: Images (B, C, H, W) and their labels (B,).
        loss: Of outputs and labels, the mean of a batch.
        example_input: See `add_stochastic_depth`.

    Returns:
        Their numbers, from 0; first the one without which the loss is the lowest. See `shorten`.

    Raises:
        ValueError: If the network has no residual blocks, or there are no images.
    """
    device = next(model.parameters()).device
    if iter(batches) is batches:  # a generator, which could be read once
        batches = list(batches)
    found = _find_blocks(model, example_input)

    def measure(block: _Block) -> float:
        parent, _, child = block.name.rpartition('.')
        take_out(model, {block.name: block.config})
        try:
            losses = [(loss(model(x.to(device)), y.to(device)).item() * len(x), len(x)) for x, y in batches]
        finally:
            setattr(model.get_submodule(parent), child, block.residual.block)
        if not losses or not math.isfinite(sum(each for each, _ in losses)):
            raise ValueError(f'without {block.name} the loss is not a number' if losses else
                             'there are no images to rank blocks by')
        return sum(each for each, _ in losses) / sum(images for _, images in losses)

    with training_mode(model, False):
        means = [measure(block) for block in found]
    return sorted(range(len(found)), key=means.__getitem__)
