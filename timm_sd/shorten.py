"""Depth after training: a network loses residual blocks for good, and what is left is a plain, faster network.

A network that was trained with stochastic depth does not rely on any one block, so that it bears this without further
training. (LayerDrop, arXiv 1909.11556, and LayerSkip, arXiv 2404.16710, found so of transformers.)

A block that is taken out leaves its shortcut in its place. So the names of all other weights stay, and what is left is
saved by `timm.models.save_for_hf` and loaded by `timm.create_model('local-dir:FOLDER', pretrained=True)`: config.json
names the architecture 'shortened', and in `model_args` the one that it was, and the blocks that are gone.
"""
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import nn
from torch.optim.swa_utils import update_bn

from .block_probe import training_mode
from .compute import branch_shares
from .convert import remove_stochastic_depth
from .hub import build_model
from .probe import residual_blocks
from .stochastic_depth import Residual

__all__ = ['Shortcut']  # a list, as timm's registry wants it; register_model appends the entry point

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]


class Shortcut(nn.Module):
    """What stays of a residual block without its branch: the identity, or the modules of its shortcut.

    Args:
        block: The block.
        path: Names of its modules that are the shortcut and the activation behind the addition, in their order.
        relu: Whether there is a ReLU behind them that is no module.
        passes_on: What a block that returns a tuple has behind its features there: the places of arguments behind the
            input, from 0, or -1 for None. None of a block that returns its features alone.
    """

    def __init__(self, block: nn.Module, path: Sequence[str] = (), relu: bool = False,
                 passes_on: Sequence[int] | None = None) -> None:
        super().__init__()
        for name in path:
            self.add_module(name, getattr(block, name))
        # private, for a block may have a module of any name
        self._relu, self._passes_on = relu, None if passes_on is None else list(passes_on)
        self.train(block.training)

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that made it, but the block and what is as by default; for config.json."""
        path, passes_on = list(self._modules), self._passes_on
        return {**(dict(path=path) if path else {}), **(dict(relu=True) if self._relu else {}),
                **({} if passes_on is None else dict(passes_on=passes_on))}

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The features `x` (B, ...) through the shortcut; the other arguments of the block go nowhere else."""
        y = x
        for name in self._modules:
            module = getattr(self, name)
            y = module(y.clone() if getattr(module, 'inplace', False) else y)
        if self._relu:
            y = F.relu(y)
        return y if self._passes_on is None else (y, *(None if place < 0 else args[place] for place in self._passes_on))


def _config(residual: Residual) -> dict[str, Any]:
    """The `Shortcut.config` of a block; what does nothing to its input is left out."""
    modules: Any = residual.block._modules
    path = [name for name in residual.shortcut_path if type(modules[name]) is not nn.Identity]
    if residual.nonnegative and path and type(modules[path[0]]) is nn.ReLU:
        del path[0]
    relu = residual.relu_behind and not (residual.nonnegative and not path)
    return dict(path=path, relu=relu, passes_on=residual.passes_on if residual.returns_tuple else None)


class _Place(NamedTuple):
    """Where a block stands, and the `Shortcut.config` of it."""
    name: str
    config: dict[str, Any]


def _find_blocks(model: nn.Module, example_input: Any) -> tuple[list[Residual], list[_Place]]:
    residuals = residual_blocks(model, example_input=example_input).closable
    if not residuals:
        raise ValueError(f'{type(model).__name__} has no residual block that could be taken out')
    names = {module: name for name, module in model.named_modules()}
    return residuals, [_Place(names[residual.block], _config(residual)) for residual in residuals]


def remove_blocks(model: nn.Module, removed: dict[str, dict[str, Any]]) -> nn.Module:
    """Takes blocks out of a network, in place.

    Args:
        model: The network.
        removed: The `Shortcut.config` of each block by its name, as `removed_blocks` gives them.

    Returns:
        The same network.

    Raises:
        ValueError: If it has no such block.
    """
    for name, config in removed.items():
        parent, _, child = name.rpartition('.')
        try:
            setattr(model.get_submodule(parent), child, Shortcut(model.get_submodule(name), **config))
        except (AttributeError, TypeError) as error:
            raise ValueError(f'{type(model).__name__} has no block {name} that could be taken out ({error})') from error
    return model


def removed_blocks(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The blocks that were taken out of a network: the `Shortcut.config` of each by its name."""
    return {name: module.config for name, module in model.named_modules() if isinstance(module, Shortcut)}


def _from_the_ends(places: Sequence[_Place]) -> list[int]:
    """The order in which blocks go: those at the end of their stage first, of all stages in proportion.

    The first block of a stage, which changes the shape, goes last. Of two in the same place the deeper one goes first.
    """
    stages: dict[str, list[int]] = {}
    for index, place in enumerate(places):
        stages.setdefault(place.name.rpartition('.')[0], []).append(index)
    depth = {index: number / len(stage) for stage in stages.values() for number, index in enumerate(stage)}
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
    residuals, places = _find_blocks(model, example_input)
    order = list(_from_the_ends(places) if order is None else order)
    if len(set(order)) < len(order) or not set(order) <= set(range(len(places))):
        raise ValueError(f'order is {order}; it must be different numbers of the blocks, 0 ... {len(places) - 1}')
    if (blocks is None) == (share is None):
        raise ValueError(f'blocks is {blocks} and share {share}; give one of them')
    remove_stochastic_depth(model)
    if blocks is not None:
        if not 0 <= blocks <= len(places):
            raise ValueError(f'blocks is {blocks}; {type(model).__name__} has {len(places)} residual blocks, of which '
                             'so many can stay, or fewer')
        count = len(places) - blocks
    else:
        count = _count_for_share(model, residuals, order, share, example_input)
    if count > len(order):
        raise ValueError(f'order has {len(order)} blocks, and {count} would have to go')
    remove_blocks(model, {places[index].name: places[index].config for index in order[:count]})
    if bn_batches is not None:
        update_bn(bn_batches, model, next(model.parameters()).device)
    _describe(model)
    return model


def _count_for_share(model: nn.Module, residuals: Sequence[Residual], order: Sequence[int], share: Any,
                     example_input: Any) -> int:
    """How many blocks have to go until at most `share` of the multiplications is left."""
    if not 0. < share <= 1.:
        raise ValueError(f'share is {share}; it must be a number in (0, 1]')
    shares = branch_shares(model, [(each.block, each.shortcut_path) for each in residuals], example_input)
    left = [1.]
    for index in order:
        left.append(left[-1] - shares[index])
    for count, value in enumerate(left):
        if value <= share + 1e-9:
            return count
    raise ValueError(f'share is {share}, and {left[-1]:.3f} of the multiplications lie outside of the residual '
                     'branches that may go')


def _describe(model: Any) -> None:
    """Lets timm's `save_for_hf` write which blocks are gone, for a network of timm's."""
    if not hasattr(model, 'pretrained_cfg') or not hasattr(model, '_model_args'):
        return
    cfg, args = dict(model.pretrained_cfg), {
        name: value for name, value in model._model_args.items() if not name.startswith('drop_path')}
    if cfg['architecture'] != 'shortened':
        args['architecture'] = cfg['architecture']
    model._model_args = dict(args, removed_blocks=removed_blocks(model))
    model.pretrained_cfg = model.default_cfg = dict(cfg, architecture='shortened')


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
    _, places = _find_blocks(model, example_input)

    def measure(place: _Place) -> float:
        parent_name, _, child = place.name.rpartition('.')
        parent, block = model.get_submodule(parent_name), model.get_submodule(place.name)
        remove_blocks(model, {place.name: place.config})
        try:
            return sum(loss(model(x.to(device)), y.to(device)).item() * len(x) for x, y in batches)
        finally:
            setattr(parent, child, block)

    with training_mode(model, False):
        losses = [measure(place) for place in places]
    if not any(losses):
        raise ValueError('there are no images to rank blocks by')
    return sorted(range(len(places)), key=losses.__getitem__)


# register_model reads this table at decoration time: it must stand above the entry point
default_cfgs = generate_default_cfgs({'shortened': {}})


def _build_shortened(architecture: str = '', removed_blocks: dict[str, dict[str, Any]] | None = None,
                     **kwargs: Any) -> nn.Module:
    if architecture == 'shortened' or not timm.is_model(architecture):
        raise ValueError(f"'shortened' is made by timm_sd.shorten, saved by timm.models.save_for_hf, and loaded by "
                         f"'local-dir:' or 'hf-hub:'; the architecture {architecture!r} is none that it could be of")
    if 'drop_path_rate' in kwargs:
        raise ValueError(f'drop_path_rate is {kwargs["drop_path_rate"]}, but a shortened network is plain; call '
                         'timm_sd.add_stochastic_depth')
    model = timm.create_model(architecture, **kwargs)
    return remove_blocks(remove_stochastic_depth(model), removed_blocks or {})


@register_model
def shortened(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Any network of timm's that lost residual blocks; see `timm_sd.shorten`."""
    return build_model(_build_shortened, 'shortened', pretrained, **kwargs)  # type: ignore[arg-type]
