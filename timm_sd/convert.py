"""Stochastic depth for any residual timm model, added in place and taken away again."""
import warnings
from typing import Any

from torch import nn

from .gates import DepthGates
from .probe import drop_path_slots, residual_blocks
from .skippable import OWN_SLOT, SkippableBlock
from .stochastic_depth import depth_gates, make_skippable


def _clear_slots(model: nn.Module) -> None:
    for block in model.modules():
        for slot in drop_path_slots(block):
            if getattr(block, slot) is not None:
                setattr(block, slot, nn.Identity())


def add_stochastic_depth(
        model: nn.Module,
        drop_path_rate: float,
        schedule: str = 'linear',
        mode: str = 'batch',
        scale: str = 'train',
        seed: int = 0,
        example_input: Any = None,
) -> nn.Module:
    """Adds stochastic depth to a model, in place; its state_dict keys and its evaluation stay what they are.

    Args:
        model: A residual model of timm, or of another library or one's own with `example_input`; with or without
            pretrained weights.
        drop_path_rate: Rate of the last block, 1 - p_L, in [0, 1).
        schedule: 'linear' (the paper's eq. 4) or 'uniform'.
        mode: 'batch', 'subset' or 'sample', see `make_skippable`.
        scale: 'train', or 'eval' for the paper's gradients (eq. 5), see `make_skippable`. The weights stay as they are.
        seed: Seed of the gates.
        example_input: What the model is called with: a tensor (B, C, H, W), a tuple of arguments or a dict of named
            ones. Only shapes count. By default a picture of the size that timm knows.

    Returns:
        The same model.

    Raises:
        ValueError: If an argument isn't one of these, the model has the method already, can't be run, has no residual
            block that can be closed, uses a block twice, or a branch can't absorb p_l with scale='eval'.
    """
    DepthGates(1, drop_path_rate, schedule, mode, scale)  # refuses what is wrong before the model is touched
    name = type(model).__name__
    gates = depth_gates(model)
    if gates is not None and gates.active:
        raise ValueError(f'{name} has stochastic depth already; call depth_gates(model).set_drop_path_rate, or '
                         'remove_stochastic_depth(model) first')
    residuals, stay_open = residual_blocks(model, scale, example_input)
    if not residuals:
        raise ValueError(f'{name} has no residual block that could be closed' + (
            f'; its {len(stay_open)} blocks with a drop_path change more than they add to' if stay_open else ''))
    if mode == 'sample' and not all(residual.slots for residual in residuals):
        raise ValueError(f"drop_path_mode 'sample' needs a drop_path slot in each block, which {name} lacks; use "
                         "'batch' or 'subset'")
    if stay_open:
        warnings.warn(f'{name}: {len(stay_open)} of {len(residuals) + len(stay_open)} residual blocks change more than '
                      'they add to, and stay open', stacklevel=2)
    remove_stochastic_depth(model)  # timm's own rule, also of the blocks that stay open
    make_skippable(residuals, DepthGates(len(residuals), drop_path_rate, schedule, mode, scale, seed))
    return model


def remove_stochastic_depth(model: nn.Module) -> nn.Module:
    """Takes every drop path out of a model, in place: plain blocks, and the same evaluation.

    Args:
        model: A model with stochastic depth, by this package or timm's DropPath.

    Returns:
        The same model.
    """
    _clear_slots(model)
    for block in model.modules():
        if isinstance(block, SkippableBlock):
            block._modules.pop(OWN_SLOT, None)
            block.__class__ = block.plain_class  # type: ignore[assignment]
            for name in SkippableBlock.__annotations__:
                block.__dict__.pop(name, None)
    return model
