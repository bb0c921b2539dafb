"""A shallow copy of a block whose branch is multiplied by a factor, for one forward pass."""
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .functional import scale_gradients, scaled
from .shallow_copy import shallow_copy


def features(output: Any) -> Any:
    """The features (B, ...) in what a block returned, which in transformers is a tuple of them and, mostly, None."""
    return output[0] if isinstance(output, tuple) and output else output


@torch.compiler.disable
def scaled_block(block: Any, slots: dict[str, Any], factor: float | torch.Tensor,
                 gradient_factor: float | torch.Tensor | None = None) -> Any:
    """A shallow copy of `block`, a `SkippableBlock`, whose branch is multiplied by `factor`, 1 / p_l in an open block.

    Args:
        block: The block.
        slots: Those of its `drop_path_slots` that drop.
        factor: 0 for a branch that doesn't count. As a tensor (), what is recorded or compiled follows its value.
        gradient_factor: p_l ** 2, of the gradients of its last affine layer with scale 'eval'. None leaves them alone.
    """
    copy = shallow_copy(block, '_modules')
    for name, slot in slots.items():
        copy._modules[name] = shallow_copy(slot)
        copy._modules[name].__dict__['factor'] = 1. if block.branch_ends else factor
    if gradient_factor is not None and next(iter(slots.values())).gates.scale == 'eval':
        for end, path, names, others in block.last_affine:
            if end in slots or block.branch_ends:
                _scale_gradients(copy, path, names, others, gradient_factor)
    if block.branch_ends and (isinstance(factor, torch.Tensor) or factor != 1.):
        for name in block.branch_ends:
            copy._modules[name] = _ScaledOutput(copy._modules[name], factor)
    return copy


class _ScaledOutput(nn.Module):
    """In the place of a module that ends a branch: multiplies what it returns.

    Of another type, so that torch.compile doesn't take the graph of the one for the other.
    """

    def __init__(self, module: nn.Module, factor: float | torch.Tensor) -> None:
        super().__init__()
        self.module, self.factor = module, factor

    def __getattr__(self, name: str) -> Any:  # the block may ask for more than the output
        return self._modules[name] if name == 'module' else getattr(self._modules['module'], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.module(*args, **kwargs)
        y = scaled(features(output), self.factor)
        return (y, *output[1:]) if isinstance(output, tuple) else y


def _scale_gradients(block: Any, path: list[str], names: list[str], others: int,
                     factor: float | torch.Tensor) -> None:
    """Replaces the layer at `path` by a copy whose parameters get the gradient of eq. 5, see `scale_gradients`.

    A layer that has other parameters by now, such as by fusing, pruning, weight norm or LoRA, is left alone, and so is
    one with a call of its own, such as by `layer.compile()`: their gradients are those of scale 'train'. A layer that
    writes into these parameters in its forward is an error.
    """
    layer = block
    for name in path:
        layer = layer._modules.get(name)
        if layer is None or 'forward' in layer.__dict__ or layer._compiled_call_impl is not None:
            return
    params = {name: layer.__dict__.get(name, layer._parameters.get(name)) for name in names}  # FSDP1 has plain tensors
    more = len(parameters_of(layer)) - sum(name in layer._parameters for name in names)
    if more > others or any(param is None for param in params.values()):
        return
    for name in path:
        block._modules[name] = block = shallow_copy(block._modules[name], '_modules')
    block.__dict__.update(zip(params, scale_gradients(list(params.values()), factor), strict=True))


def parameters_of(module: nn.Module, skip: Sequence[str] = ()) -> list[torch.Tensor]:
    """The parameters in a module but for those of its children `skip`; much faster than Module.parameters()."""
    found: list[torch.Tensor] = [param for param in module._parameters.values() if param is not None]
    for name, child in module._modules.items():
        if child is not None and (child._parameters or child._modules) and name not in skip:
            found += parameters_of(child)
    return found
