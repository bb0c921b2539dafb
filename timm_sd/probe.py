"""Finds the residual blocks of any timm model.

timm marks its residual blocks with `drop_path` slots. Which of them a closed gate may skip isn't read off their names
but tried: the model runs once, and a block can be closed if, with nothing in its slots, it returns what its shortcut
does.
"""
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import DropPath
from timm.models import get_model_input_config
from torch import nn

from .stochastic_depth import Residual

# Modules that, one behind the other, are what is beside the branch, as `SkippableBlock.shortcut_path`. Besides them the
# identity and each single module of a block are tried.
_SHORTCUTS = (
    ('downsample', 'act3'), ('downsample', 'act2'),  # ResNet, RegNet: projection, and activation behind the addition
    ('shortcut', 'act'),                             # ByobNet: likewise
    ('cpe1', 'cpe2'),                                # DaViT: convolutional position encodings
    ('res_scale1', 'res_scale2'),                    # MetaFormer: learned scales of the shortcut
)


class _Probe(nn.Module):
    """In a slot while the model is looked at: notes what the branch returns, and takes it away if told to."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: torch.Tensor | None = None
        self.address = 0
        self.closed = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # a copy: timm's ResNet adds the shortcut in place
        self.seen, self.address = x.clone(), x.data_ptr()
        return x * 0. if self.closed else x


def drop_path_slots(block: nn.Module) -> tuple[str, ...]:
    """Names of the attributes of `block` that hold a drop path, or would if its rate were above 0."""
    values = {**block.__dict__, **block._modules}
    return tuple(name for name, value in values.items()
                 if re.fullmatch(r'(\w+_)?drop_path\d*', name)
                 and (value is None or isinstance(value, (nn.Identity, DropPath))))


@contextmanager
def _probes(model: nn.Module) -> Iterator[dict[nn.Module, dict[str, _Probe]]]:
    """Within it the model is in evaluation mode, with a `_Probe` in each slot of each block."""
    blocks = {block: slots for block in model.modules() if (slots := drop_path_slots(block))}
    before = [(block, slot, getattr(block, slot)) for block, slots in blocks.items() for slot in slots]
    training = {module: module.training for module in model.modules()}
    probes = {block: {slot: _Probe() for slot in slots} for block, slots in blocks.items()}
    for block, of_block in probes.items():
        for slot, probe in of_block.items():
            setattr(block, slot, probe)
    model.eval()
    try:
        yield probes
    finally:
        for block, slot, value in before:
            setattr(block, slot, value)
        for module, mode in training.items():
            module.training = mode


@contextmanager
def _other_weights(module: nn.Module) -> Iterator[None]:
    """Within it the parameters of `module` have other values: what holds now doesn't hold by initialisation alone."""
    before = [(param, param.clone()) for param in module.parameters()]
    generator = torch.Generator().manual_seed(0)
    for param, value in before:
        noise = torch.rand(value.shape, generator=generator).to(value.device, value.dtype)
        param.copy_(value * (0.5 + noise) + 0.1 * noise)
    try:
        yield
    finally:
        for param, value in before:
            param.copy_(value)


def _last_affine(block: nn.Module, probe: _Probe, args: tuple, kwargs: dict[str, Any]) -> nn.Module | None:
    """The layer whose own parameters scale what goes into the slot, or None."""
    outputs: list[tuple[nn.Module, Any]] = []
    layers = [layer for layer in block.modules() if any(True for _ in layer.parameters(recurse=False))]
    hooks = [layer.register_forward_hook(lambda layer, _, y: outputs.append((layer, y))) for layer in layers]

    def branch() -> torch.Tensor:
        block.forward(args[0].clone(), *args[1:], **kwargs)
        assert probe.seen is not None
        return probe.seen

    before = branch()
    for hook in hooks:
        hook.remove()
    last = [layer for layer, output in outputs if isinstance(output, torch.Tensor)
            and output.data_ptr() == probe.address and output.shape == before.shape]
    if not last:
        return None
    params = [(param, param.clone()) for param in last[-1].parameters(recurse=False)]
    for param, value in params:
        # A branch of half the parameters must give half the output. It does not where the weights are standardised
        # first, or an activation follows.
        param.copy_(value / 2)
    halved = branch()
    for param, value in params:
        param.copy_(value)
    return last[-1] if torch.allclose(halved, before / 2, rtol=1e-3, atol=1e-6) else None


@torch.no_grad()
def residual_blocks(model: nn.Module, scale: str = 'train') -> tuple[list[Residual], int]:
    """The residual blocks of a timm model that can be closed, and how many can't.

    Runs the model once, in evaluation mode, on a random picture of its input size.

    Args:
        model: The model.
        scale: With 'eval', looks for the last affine layer of each branch too.

    Returns:
        The blocks in the order of the forward pass, and the number of those that change the shape on their way.

    Raises:
        ValueError: If a block runs twice in one forward pass, or can't absorb p_l with scale 'eval'.
    """
    found: list[Residual] = []
    stay_open: list[nn.Module] = []
    inputs: dict[nn.Module, torch.Tensor | None] = {}
    last_output: list[Any] = []  # of the last block found
    direct: dict[nn.Module, bool] = {}  # whether that is a block's input

    def look(block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        used = {slot: probe for slot, probe in probes[block].items() if probe.seen is not None}
        if not used:
            return  # a block without a shortcut, such as EfficientNet's where the shape changes
        before = [*stay_open, *(residual.block for residual in found)]
        if block in before:
            raise ValueError(f'{names[block]} runs twice in one forward pass; a block has one gate')
        x = inputs.pop(block)
        # several tensors, as CrossViT's blocks take, or a block around another one, as SwiftFormer's
        if x is None or any(module in before for module in block.modules()):
            stay_open.append(block)
            return
        args = (x, *args[1:])
        with _other_weights(block):
            for probe in used.values():
                probe.closed = True
            # with negative values too, or a ReLU behind the addition would look like nothing
            closed = [(y, block.forward(y.clone(), *args[1:], **kwargs)) for y in (x, x - x.mean())]
            for probe in used.values():
                probe.closed = False
            path = _shortcut_path(block, closed)
            if path is None:  # a ReLU that is no module
                path = _shortcut_path(block, closed[:1])
        if path is None:
            stay_open.append(block)
            return
        last = [_last_affine(block, probe, args, kwargs) for probe in used.values()] if scale == 'eval' else []
        if None in last:
            raise ValueError(f"drop_path_scale is 'eval', but the branch of {names[block]} ends in nothing that can "
                             "absorb p_l; use 'train'")
        if found and direct[block] and parent(found[-1].block) == parent(block):
            found[-1] = found[-1]._replace(chained=True)
        found.append(Residual(
            block, tuple(used), path, tuple(layer for layer in last if layer is not None), chained=False,
            nonnegative=bool((x >= 0).all())))
        last_output[:] = [output]

    def keep_input(block: nn.Module, args: tuple) -> tuple | None:
        for probe in probes[block].values():
            probe.seen = None
        inputs[block] = None
        if not args or not isinstance(args[0], torch.Tensor):
            return None
        direct[block] = any(x is args[0] for x in last_output)
        x = args[0] / args[0].abs().max().clamp(min=1.)  # a thousand untrained layers would overflow in evaluation
        inputs[block] = x.clone()
        return x, *args[1:]

    def parent(block: nn.Module) -> str:
        return names[block].rpartition('.')[0]

    names = {module: name for name, module in model.named_modules()}
    example = next(model.parameters())
    size = get_model_input_config(model)['input_size']
    x = torch.rand(1, *size, generator=torch.Generator().manual_seed(0)).to(example.device, example.dtype)
    with _probes(model) as probes:
        hooks = [hook for block in probes for hook in (
            block.register_forward_pre_hook(keep_input), block.register_forward_hook(look, with_kwargs=True))]
        try:
            model(x)
        finally:
            for hook in hooks:
                hook.remove()
    return found, len(stay_open)


def _shortcut_path(block: nn.Module, closed: list[tuple[torch.Tensor, Any]]) -> tuple[str, ...] | None:
    """The modules that turn each input into the closed block's output, or None if that takes more than these."""
    # the last activation rather than another one that does the same
    for path in ((), *_SHORTCUTS, *((name,) for name, _ in reversed(list(block.named_children())))):
        modules: list[Any] = [getattr(block, name, None) for name in path]
        if all(_gives(modules, x, output) for x, output in closed):
            return path
    return None


def _gives(modules: list[Any], x: torch.Tensor, output: Any) -> bool:
    """Whether `modules`, one behind the other, turn `x` into `output`."""
    y = x.clone()
    try:
        for module in modules:
            y = module(y)
    except (RuntimeError, TypeError, ValueError, AssertionError):  # a module that wants something else
        return False
    return isinstance(y, torch.Tensor) and isinstance(output, torch.Tensor) and y.shape == output.shape \
        and torch.allclose(y, output, rtol=1e-5, atol=1e-6)  # another memory layout rounds differently
