"""Finds the residual blocks of a network, by running it once; block_probe.py tries each.

timm marks its residual blocks with `drop_path` slots, torchvision and transformers mark some of theirs. In a network
without slots any module may be a residual block; in one with slots no other is.
"""
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from timm.models import get_model_input_config
from torch import nn

from .block_probe import BlockProbe, changed, other_values, training_mode
from .scaled_block import features
from .skippable import OWN_SLOT, SkippableBlock
from .stochastic_depth import Residual

HALF = torch.bfloat16, torch.float16


def drop_path_slots(block: nn.Module) -> tuple[str, ...]:
    """Names of the attributes of `block` that hold a drop path, or would if its rate were above 0."""
    def is_slot(name: str, value: Any) -> bool:
        if isinstance(value, nn.Module) and re.search('(DropPath|StochasticDepth)(Slot)?$', type(value).__name__):
            return True  # of any library
        return (value is None or type(value) is nn.Identity) \
            and re.fullmatch(r'(\w+_)?(drop_path|stochastic_depth)\d*', name) is not None

    return tuple(name for name, value in {**block.__dict__, **block._modules}.items() if is_slot(name, value))


class _Slot(nn.Identity):
    """In a slot while the model is looked at: notes whether it is called."""
    called = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.called = True
        return x


@contextmanager
def _ready(model: nn.Module, slots: dict[nn.Module, tuple[str, ...]]) -> Iterator[None]:
    """Within it the model is in evaluation mode, in float32, with a `_Slot` in each slot; afterwards as it was."""
    before = [(block, name, getattr(block, name)) for block, names in slots.items() for name in names]
    half = [param for param in model.parameters() if param.dtype in HALF]  # in which too much would look equal
    try:
        for block, name, _ in before:
            setattr(block, name, _Slot())
        with training_mode(model, False), changed(half, torch.Tensor.float), \
                changed(list(model.buffers()), lambda value: value.float() if value.dtype in HALF else value.clone()):
            yield
    finally:
        for block, name, value in before:
            if value is None:
                del block._modules[name]
            setattr(block, name, value)


def example_arguments(model: nn.Module, example_input: Any = None) -> tuple[tuple, dict[str, Any]]:
    """What to call the model with: random numbers of its input size, or of the shapes in `example_input`."""
    name, params = type(model).__name__, list(model.parameters())
    if not params:
        raise ValueError(f'{name} has no parameters, so a residual block could not be told from others')
    if any(param.is_meta for param in params):
        raise ValueError(f'{name} is on the meta device, where nothing can be tried; call to_empty and load weights '
                         'before stochastic depth is added')
    if example_input is None:
        if not hasattr(model, 'pretrained_cfg'):
            raise ValueError(f"{name} is none of timm's networks, so its input size is not known; pass "
                             'example_input=torch.zeros(1, 3, 224, 224), or what it is called with')
        example_input = torch.zeros(1, *get_model_input_config(model)['input_size'])
    generator = torch.Generator().manual_seed(0)

    def random(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if value.is_floating_point():  # what holds for zeros doesn't hold for all
            value = torch.randn(value.shape, generator=generator).to(params[0].dtype)
        return value.to(params[0].device)

    if isinstance(example_input, dict):
        return (), {key: random(value) for key, value in example_input.items()}
    return tuple(map(random, example_input if isinstance(example_input, tuple | list) else (example_input,))), {}


class Found(NamedTuple):
    """The residual blocks of a network.

    Attributes:
        closable: Those that can be closed, in the order of the forward pass.
        stay_open: Those with slots that can't.
    """
    closable: list[Residual]
    stay_open: list[nn.Module]


class _Search:
    """The hooks that look at each block while the model runs once."""

    def __init__(self, model: nn.Module, slots: dict[nn.Module, tuple[str, ...]], scale: str) -> None:
        self.slots, self.scale = slots, scale
        self.names = {module: name for name, module in model.named_modules()}
        self.closable: dict[nn.Module, Residual] = {}
        self.stay_open: list[nn.Module] = []
        self.inputs: dict[nn.Module, torch.Tensor] = {}
        self.nonnegative: dict[nn.Module, bool] = {}  # whether the input was, as behind a ReLU
        self.before: dict[nn.Module, nn.Module] = {}  # the block whose output a block is given
        self.last_block: nn.Module | None = None
        self.last_output: Any = None
        self.last_version = 0
        self.trying = False

    def keep_input(self, block: nn.Module, args: tuple) -> tuple | None:
        if self.trying:
            return None
        for name in self.slots.get(block, ()):
            getattr(block, name).called = False
        self.inputs.pop(block, None)
        if not args or not isinstance(args[0], torch.Tensor) or not args[0].is_floating_point():
            return None
        # not if something wrote into it on the way, such as a ReLU in place
        if self.last_block is not None and args[0] is self.last_output and args[0]._version == self.last_version:
            self.before[block] = self.last_block
        x = args[0] / args[0].abs().max()  # a thousand untrained layers overflow in evaluation, or die away
        self.nonnegative[block] = bool((x >= 0).all())
        if not x.isfinite().all():
            x = torch.ones_like(x)
        self.inputs[block] = x.clone()
        return x, *args[1:]

    def look(self, block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        slots = tuple(name for name in self.slots.get(block, ()) if getattr(block, name).called)
        if self.trying or (self.slots and not slots):
            return  # without a shortcut, as EfficientNet's blocks are where the shape changes
        if block in self.closable or block in self.stay_open:
            raise ValueError(f'{self.names[block]} runs twice in one forward pass; a block has one gate')
        residual = self._try(block, slots, args, kwargs, output)
        if residual is not None:
            self.closable[block] = residual
            self.last_block, self.last_output = block, features(output)
            self.last_version = self.last_output._version
        elif slots:
            self.stay_open.append(block)

    def _try(self, block: nn.Module, slots: tuple[str, ...], args: tuple, kwargs: dict[str, Any],
             output: Any) -> Residual | None:
        x = self.inputs.pop(block, None)
        passes_on = _passed_on(output, args[1:])
        # several tensors, as CrossViT's blocks take and return, or a block around another one, as SwiftFormer's
        if x is None or passes_on is None or any(inner in self.closable for inner in block.modules()):
            return None
        self.trying = True
        probe = BlockProbe(block, x, args[1:], kwargs)
        with other_values(block):
            way = probe.find_way(slots)
            last_affine = probe.find_affine(way.ends) if way and self.scale == 'eval' else ()
        self.trying = False
        if way is None:
            return None
        taken = {*SkippableBlock.__annotations__, OWN_SLOT} & {
            *vars(block), *block._modules, *block._parameters, *block._buffers}
        if taken and not isinstance(block, SkippableBlock):
            raise ValueError(f'{self.names[block]} has an attribute {min(taken)!r} of its own; that name is taken')
        if last_affine is None:
            raise ValueError(f"drop_path_scale is 'eval', but the branch of {self.names[block]} ends in nothing that "
                             "can absorb p_l; use 'train'")
        if not torch.equal(args[0], x):
            self.before.pop(block, None)  # it writes into its input
        slots, ends = (slots, ()) if way.ends == slots else ((), way.ends)
        return Residual(
            block, slots=slots, branch_ends=ends, shortcut_path=way.shortcut_path, relu_behind=way.relu_behind,
            last_affine=last_affine, chained=False, nonnegative=self.nonnegative[block],
            returns_tuple=isinstance(output, tuple), passes_on=passes_on)

    def found(self) -> Found:
        """What was found, but for sums of layers beside each other, as in Inceptions: no residual blocks."""
        identities = {(type(block), residual.branch_ends) for block, residual in self.closable.items()
                      if not _projects(residual)}
        closable = {block: residual for block, residual in self.closable.items()
                    if residual.slots or (type(block), residual.branch_ends) in identities}
        parents = {block: self.names[block].rpartition('.')[0] for block in closable}
        chained = {before for block, before in self.before.items()
                   if block in closable and before in closable and parents[block] == parents[before]}
        return Found([residual._replace(chained=block in chained) for block, residual in closable.items()],
                     self.stay_open + [block for block in self.closable if block not in closable and self.slots])


def _passed_on(output: Any, args: tuple) -> tuple[int, ...] | None:
    """`SkippableBlock.passes_on` of a block's output; None if that holds more than a closed block could return."""
    def place(value: Any) -> int | None:
        if value is None:
            return -1
        if not isinstance(value, list | tuple) or not all(isinstance(size, int) for size in value):
            return None
        # the size of a feature map, as in MViT
        return next((index for index, arg in enumerate(args)
                     if isinstance(arg, list | tuple) and list(arg) == list(value)), None)

    if not isinstance(features(output), torch.Tensor):
        return None
    places = [place(value) for value in output[1:]] if isinstance(output, tuple) else []
    return None if None in places else tuple(places)  # type: ignore[arg-type]


def _projects(residual: Residual) -> bool:
    """Whether the shortcut has parameters."""
    return any(True for name in residual.shortcut_path for _ in getattr(residual.block, name).parameters())


@torch.no_grad()
def residual_blocks(model: nn.Module, scale: str = 'train', example_input: Any = None) -> Found:
    """The residual blocks of a network.

    Runs the model once, in evaluation mode, and leaves it as it was.

    Args:
        model: The model.
        scale: With 'eval', looks for the last affine layer of each branch too.
        example_input: What the model is called with: a tensor, a tuple of arguments or a dict of named ones. Floating
            point numbers in it are replaced by random ones. By default a picture of the size that timm knows.

    Raises:
        ValueError: If the model can't be tried, a block runs twice in one forward pass, or can't absorb p_l with scale
            'eval'.
    """
    slots = {block: names for block in model.modules() if (names := drop_path_slots(block))}
    found = _search(model, slots, slots, scale, example_input)
    if not found.closable and not found.stay_open:
        others = [block for block in model.modules() if block is not model and any(True for _ in block.children())
                  and not isinstance(block, nn.Sequential | nn.ModuleList | nn.ModuleDict)]
        found = _search(model, others, {}, scale, example_input)
    return found


def _search(model: nn.Module, blocks: Iterable[nn.Module], slots: dict[nn.Module, tuple[str, ...]], scale: str,
            example_input: Any) -> Found:
    """What is found among `blocks`, by their `slots` if they have any."""
    search = _Search(model, slots, scale)
    with _ready(model, slots), ExitStack() as hooks:
        for block in blocks:
            hooks.callback(block.register_forward_pre_hook(search.keep_input).remove)
            hooks.callback(block.register_forward_hook(search.look, with_kwargs=True).remove)
        args, kwargs = example_arguments(model, example_input)
        try:
            model(*args, **kwargs)
        except (RuntimeError, TypeError, AttributeError, LookupError, AssertionError) as error:
            raise ValueError(f'{type(model).__name__} can not be run with what example_input describes: '
                             f'{" ".join(str(error).split())[:200]}') from error
    return search.found()
