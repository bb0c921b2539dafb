"""Networks that lost residual blocks: what stands in the place of a block, and how they are saved and loaded.

A block that is taken out leaves its shortcut in its place. So the names of all other weights stay, and what is left is
saved by `timm.models.save_for_hf` and loaded by `timm.create_model('local-dir:FOLDER', pretrained=True)`: config.json
names the architecture 'shortened', and in `model_args` the one that it was, and the blocks that are gone.
"""
import copy
import inspect
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.models import generate_default_cfgs, register_model
from torch import nn

from .convert import remove_stochastic_depth
from .hub import build_model

__all__ = ['Shortcut']  # a list, as timm's registry wants it; register_model appends the entry point

RELU = 'relu_behind'  # in a Shortcut, a ReLU that was no module


class Shortcut(nn.Sequential):
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
        modules: OrderedDict[str, Any] = OrderedDict((name, _not_in_place(getattr(block, name))) for name in path)
        super().__init__(modules)
        if relu:
            self.add_module(RELU, nn.ReLU())
        # The arguments that made it, but the block and what is as by default; for config.json.
        self.config: dict[str, Any] = {**(dict(path=list(path)) if path else {}), **(dict(relu=True) if relu else {}),
                                       **({} if passes_on is None else dict(passes_on=list(passes_on)))}
        self.train(block.training)

    @torch.jit.ignore
    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """Nothing depends on it; timm's Swins tell it to each of their blocks."""


def _not_in_place(module: nn.Module) -> nn.Module:
    """The module, or a copy that doesn't write into its input: what the block before returned is not its own."""
    if getattr(module, 'inplace', False):
        module = copy.copy(module)
        module.inplace = False  # type: ignore[assignment]
    return module


class ShortcutOfSeveral(Shortcut):
    """Of a block that is called with several arguments, or returns several values."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """The features `x` (B, ...) through the shortcut, and what the block passes on."""
        y, places = super().forward(x), self.config.get('passes_on')
        return y if places is None else (y, *(None if place < 0 else args[place] for place in places))


def _shortcut(block: nn.Module, config: dict[str, Any]) -> Shortcut:
    several = config.get('passes_on') is not None or len(inspect.signature(block.forward).parameters) > 1
    return (ShortcutOfSeveral if several else Shortcut)(block, **config)


def take_out(model: nn.Module, removed: dict[str, dict[str, Any]]) -> None:
    """`remove_blocks`, but what timm would save of the network stays as it is."""
    for name, config in removed.items():
        parent, _, child = name.rpartition('.')
        try:
            setattr(model.get_submodule(parent), child, _shortcut(model.get_submodule(name), config))
        except (AttributeError, TypeError) as error:
            raise ValueError(f'{type(model).__name__} has no block {name} that could be taken out ({error})') from error


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
    take_out(model, removed)
    _describe(model)
    return model


def removed_blocks(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The blocks that were taken out of a network: the `Shortcut.config` of each by its name."""
    return {name: module.config for name, module in model.named_modules() if isinstance(module, Shortcut)}


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


# register_model reads this table at decoration time: it must stand above the entry point
default_cfgs = generate_default_cfgs({'shortened': {}})


def _build_shortened(architecture: str = '', removed_blocks: dict[str, dict[str, Any]] | None = None,
                     **kwargs: Any) -> nn.Module:
    if architecture == 'shortened' or not timm.is_model(architecture):
        raise ValueError(f"'shortened' can't be created by itself; load a folder that timm.models.save_for_hf wrote of "
                         f'a network that timm_sd.shorten made. The architecture {architecture!r} is no network')
    if kwargs.pop('drop_path_rate', 0.):
        raise ValueError('a shortened network has no drop path rate of its own; call timm_sd.add_stochastic_depth, or '
                         'put python -m timm_sd --drop-path-mode batch in front of the script')
    if architecture.startswith('sd_'):  # their rate is above 0 by default
        kwargs['drop_path_rate'] = 0.
    model = timm.create_model(architecture, **kwargs)
    return remove_blocks(remove_stochastic_depth(model), removed_blocks or {})


@register_model
def shortened(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Any network of timm's that lost residual blocks; see `timm_sd.shorten`."""
    if kwargs.get('features_only'):  # by what the whole network has to offer
        levels = {name: kwargs[name] for name in ('out_indices',) if name in kwargs}
        whole: Any = timm.create_model(kwargs.get('architecture', ''), features_only=True, **levels)
        kwargs.update(feature_cls='getter', out_indices=whole.feature_info.out_indices)
    return build_model(_build_shortened, 'shortened', pretrained, **kwargs)  # type: ignore[arg-type]
