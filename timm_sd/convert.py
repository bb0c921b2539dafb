"""Stochastic depth for any residual timm model, added in place and taken away again."""
import warnings

from torch import nn

from .probe import drop_path_slots, residual_blocks
from .stochastic_depth import DepthGate, GatedBlock, check_arguments, gate_blocks


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
) -> nn.Module:
    """Adds stochastic depth to a timm model, in place; its state_dict keys and its evaluation stay what they are.

    Args:
        model: A residual timm model, with or without pretrained weights.
        drop_path_rate: Rate of the last block, 1 - p_L, in [0, 1).
        schedule: 'linear' (the paper's eq. 4) or 'uniform'.
        mode: 'batch', 'subset' or 'sample', see `gate_blocks`.
        scale: 'train' divides by p_l in training; 'eval' is the paper's eq. 5, and divides the last affine layer of
            each branch by p_l here, so that evaluation stays the same.
        seed: Seed of the gates.

    Returns:
        The same model.

    Raises:
        ValueError: If an argument isn't one of these, the model has the method already, has no residual block that can
            be closed, uses a block twice, or a branch can't absorb p_l with scale='eval'.
    """
    check_arguments(drop_path_rate, schedule, mode, scale)
    name = type(model).__name__
    if any(isinstance(module, DepthGate) for module in model.modules()):
        raise ValueError(f'{name} has stochastic depth already; call remove_stochastic_depth(model) first')
    residuals, stay_open = residual_blocks(model, scale)
    if not residuals:
        raise ValueError(f'{name} has no residual block with a drop_path that could be closed')
    if stay_open:
        warnings.warn(f'{name}: {stay_open} of {len(residuals) + stay_open} residual blocks change more than they add '
                      'to, and stay open', stacklevel=2)
    plain = {key: value.clone() for key, value in model.state_dict().items()} if scale == 'eval' else None
    _clear_slots(model)  # timm's own rule, also of the blocks that stay open
    gate_blocks(residuals, drop_path_rate, schedule, mode, scale, seed)
    if plain is not None:
        model.load_state_dict(plain)  # unfolds
    return model


def remove_stochastic_depth(model: nn.Module) -> nn.Module:
    """Takes every drop path out of a model, in place: plain blocks, and the same evaluation.

    Args:
        model: A model with stochastic depth, by this package or timm's DropPath.

    Returns:
        The same model.
    """
    gates = [module for module in model.modules() if isinstance(module, DepthGate)]
    folded = model.state_dict()
    for gate in gates:
        gate.remove_folding()
    _clear_slots(model)
    for block in model.modules():
        if isinstance(block, GatedBlock):
            block.__class__ = block.plain_class  # type: ignore[assignment]
            del block.drop_path_slots, block.shortcut_path
    if any(gate.eval_scale != 1. for gate in gates):
        model.load_state_dict(folded)
    return model
