"""What the method does to tensors: zero gradients, the scale of the paper's eq. 5, and taking samples out."""
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch


class _ClosedBlock(torch.autograd.Function):
    """Hands the shortcut through, and a gradient of zero to the parameters of the branch that didn't run.

    Zero, not None: the original's weight decay and momentum act on a dropped block, and DistributedDataParallel sees
    every parameter in every step, so it needs no find_unused_parameters (and static_graph would be wrong).
    """

    @staticmethod
    def forward(ctx: Any, shortcut: torch.Tensor, *params: torch.Tensor) -> torch.Tensor:
        ctx.params = params  # not saved: nothing of their values is needed, so they may change meanwhile
        return shortcut.view_as(shortcut)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        zeros = [torch.empty_like(param) for param in ctx.params]
        if len({type(zero) for zero in zeros}) == 1:
            torch._foreach_zero_(zeros)  # one kernel a block, not one a parameter: on a GPU launches bind the step
        else:  # a layer that is sharded for itself
            for zero in zeros:
                zero.zero_()
        if torch.is_grad_enabled():  # to be differentiated again
            zeros = [zero + grad.flatten()[:0].sum() for zero in zeros]
        return grad, *zeros

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor, *params: Any) -> torch.Tensor:
        return tangent.view_as(tangent)


@torch.compiler.disable
def closed_block(shortcut: torch.Tensor, params: Iterable[torch.Tensor]) -> torch.Tensor:
    """The output of a closed block.

    Args:
        shortcut: What the shortcut path returned, (B, C, H, W).
        params: The parameters of the branch; each gets a gradient of zero.

    Returns:
        The same values as `shortcut`, (B, C, H, W), without a copy.
    """
    if torch._C._are_functorch_transforms_active():  # they want Functions in another form, which is slower to call
        return shortcut + sum(param.flatten()[:0].sum().to(shortcut.dtype) for param in params)
    return _ClosedBlock.apply(shortcut, *(param for param in params if param.requires_grad))


class _ScaleGradients(torch.autograd.Function):
    """Hands tensors through, and multiplies their gradients by a factor."""

    @staticmethod
    def forward(ctx: Any, factor: float | torch.Tensor, *params: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.factor = factor
        return tuple(param.view_as(param) for param in params)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple:
        # vmap over torch.autograd.grad, or its is_grads_batched
        if torch._C._are_functorch_transforms_active() or torch._C._functorch.is_legacy_batchedtensor(grads[0]):
            return None, *(grad * ctx.factor for grad in grads)
        return None, *torch._foreach_mul(grads, ctx.factor)  # one kernel on a GPU

    @staticmethod
    def jvp(ctx: Any, factor: None, *tangents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(tangent.view_as(tangent) for tangent in tangents)


def scale_gradients(params: Sequence[torch.Tensor], factor: float | torch.Tensor) -> Sequence[torch.Tensor]:
    """The same parameters, whose gradients reach them times `factor`: the paper's eq. 5 with plain stored weights.

    The paper trains s + g n + b, where n is what the branch's last batch norm normalised, and evaluates
    s + p (g n + b). Stored are g' = p g and b' = p b, so that s + g' n + b' evaluates, and s + (g' n + b') / p trains.
    SGD with the learning rate r moves g by -r dg, so it must move g' = p g by -r p dg: the gradient of g' is p dg. By
    the chain rule it would be dg / p, p ** 2 of which is right. So `factor` is p ** 2.

    Forward-mode derivatives of torch.autograd are the true ones; those of torch.func are times `factor`, as its
    gradients are.
    """
    if torch._C._are_functorch_transforms_active():  # as in `closed_block`
        return [torch.lerp(param.detach(), param, factor) for param in params]
    return _ScaleGradients.apply(factor, *params)


class _AddScaled(torch.autograd.Function):
    """shortcut + factor * residual with a factor that is a tensor, in one kernel, and one in the backward pass."""

    @staticmethod
    def forward(ctx: Any, shortcut: torch.Tensor, residual: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        # As the alpha of torch.add is rounded: on a CPU to the dtype of the tensors, on a GPU not at all. Operators
        # round a tensor without dimensions, and promote to the dtype of one that has some.
        ctx.factor = factor.view([1] * residual.ndim) if factor.is_cuda else factor
        y = torch.empty_like(residual, dtype=torch.result_type(shortcut, residual))
        return torch.addcmul(shortcut, residual, ctx.factor, out=y)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        return grad, torch.mul(grad, ctx.factor, out=torch.empty_like(grad)), None


def add_scaled(shortcut: torch.Tensor, residual: torch.Tensor, factor: float | torch.Tensor) -> torch.Tensor:
    """shortcut + factor * residual, each (B, C, H, W), in one kernel.

    Args:
        shortcut: Output of the shortcut path.
        residual: Output of the branch.
        factor: 1 / p_l; as a tensor (), float32, what is recorded with it follows its value.
    """
    if torch.compiler.is_compiling():  # which fuses it by itself
        return shortcut + scaled(residual, factor)
    if isinstance(factor, torch.Tensor):
        return _AddScaled.apply(shortcut, residual, factor)
    return torch.add(shortcut, residual, alpha=factor)


def scaled(x: torch.Tensor, factor: float | torch.Tensor) -> torch.Tensor:
    """factor * x.

    Args:
        x: Of any shape.
        factor: 1 / p_l; as a tensor (), see `as_tensor`, what is compiled with it follows its value.
    """
    if isinstance(factor, torch.Tensor):  # an operator would round it to the 16 bits of x on a GPU
        return (x.to(torch.promote_types(x.dtype, factor.dtype)) * factor).to(x.dtype)
    return x if factor == 1. else x * factor


@torch.compiler.disable
def as_tensor(factor: float, x: torch.Tensor) -> torch.Tensor:
    """The factor of `x` as a tensor (), for `scaled`."""
    return _as_tensor(factor, x.device, torch.promote_types(x.dtype, torch.float32))


@lru_cache(maxsize=4096)  # a value comes again in each step, and a copy to a GPU would cost as much as it saves
def _as_tensor(value: float, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    # not one of torch.inference_mode, nor one that a selective checkpoint or a vmap knows: it is used again elsewhere
    with torch.inference_mode(False), torch._C._DisableTorchDispatch(), torch._C._DisableFuncTorch():
        return torch.tensor(value, dtype=dtype, device=device)


def on_channels_last(function: Callable[..., torch.Tensor], x: torch.Tensor, kept: torch.Tensor,
                     *samples: torch.Tensor) -> torch.Tensor:
    """function(x, 0, kept, *samples); of a channels_last tensor (B, C, H, W) a channels_last one, without a detour.

    torch's index functions go pixel by pixel there, backward too, and may answer in another memory format.
    """
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        tensors = [tensor.permute(0, 2, 3, 1) for tensor in (x, *samples)]
        return function(tensors[0], 0, kept, *tensors[1:]).permute(0, 3, 1, 2)
    return function(x, 0, kept, *samples)
