"""How one residual block can be closed: found not by names but by running it with its branch taken away.

A branch ends in a `drop_path` slot, or in a child of the block whose output is added to the shortcut. The block can be
closed if, without its branches, it returns what some of its children, or none, make of its input.
"""
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from itertools import combinations
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .scaled_block import features
from .stochastic_depth import Affine

MOST_CHILDREN = 12  # of a block without slots: with more of them there is too much to try

Call = tuple[str, int]  # a child of the block, and the number of its call, from 0: some run twice in a block


@contextmanager
def changed(tensors: Sequence[torch.Tensor], change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Within it the tensors have other values, or another type; afterwards the very memory that they had."""
    before = [(tensor, tensor.data) for tensor in tensors]
    try:
        for tensor, value in before:
            tensor.data = change(value)
        yield
    finally:
        for tensor, value in before:
            tensor.data = value


@contextmanager
def training_mode(model: nn.Module, mode: bool) -> Iterator[None]:
    """Within it all modules are in training mode, or in evaluation; `train` of a module may do more than that."""
    before = {module: module.training for module in model.modules()}
    try:
        for module in before:
            module.training = mode
        yield
    finally:
        for module, was in before.items():
            module.training = was


def other_values(module: nn.Module) -> Any:
    """Within it parameters and buffers aren't those of the start, by which a branch or a shift may be zero."""
    generator = torch.Generator().manual_seed(0)

    def other(value: torch.Tensor) -> torch.Tensor:
        noise = torch.rand(value.shape, generator=generator).to(value.device, value.dtype)
        return value * (0.5 + noise) + 0.1 * noise

    tensors = [*module.parameters(), *module.buffers()]
    return changed([tensor for tensor in tensors if tensor.is_floating_point()], other)


def _noise(like: torch.Tensor) -> torch.Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(like)


def _same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    corner = (slice(2),) * ours.ndim  # first: most differ there already
    return all(torch.allclose(*pair, rtol=1e-5, atol=1e-6)  # another memory layout rounds differently
               for pair in ((ours[corner], theirs[corner]), (ours, theirs)))


class Way(NamedTuple):
    """How a block can be closed.

    Attributes:
        ends: The children in which its branches end.
        shortcut_path: See `SkippableBlock`.
        relu_behind: See `SkippableBlock`.
    """
    ends: tuple[str, ...]
    shortcut_path: tuple[str, ...]
    relu_behind: bool


class BlockProbe:
    """Runs one block again and again.

    Args:
        block: The block.
        x: Its input, (B, ...).
        args: Its other arguments.
        kwargs: Its named arguments.
    """

    def __init__(self, block: nn.Module, x: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> None:
        self.block, self.args, self.kwargs = block, args, kwargs
        # The other one has negative and large values too: a ReLU or a clamp behind the addition does something.
        self.inputs = x, 30. * _noise(x)
        self.branches: dict[Call, torch.Tensor] = {}  # what the children `ends` returned in the last run

    def run(self, x: torch.Tensor, ends: tuple[str, ...] = (), factor: float = 1., only: Call | None = None) -> Any:
        """What the block returns if what its children `ends` return is multiplied by `factor`.

        With `only` that of this call is, and that of the others by 0.
        """
        self.branches = {}

        def scale(child: nn.Module, args: tuple, output: Any) -> Any:
            name = children[child]
            call = name, sum(end == name for end, _ in self.branches)
            y = features(output)
            self.branches[call] = y.clone()  # timm's ResNet adds the shortcut in place
            y = y * factor if factor and only in (None, call) else torch.zeros_like(y)
            return (y, *output[1:]) if isinstance(output, tuple) else y

        children = {getattr(self.block, name): name for name in ends}
        with ExitStack() as hooks:
            for child in children:
                hooks.callback(child.register_forward_hook(scale).remove)
            return features(self.block.forward(x.clone(), *self.args, **self.kwargs))

    @contextmanager
    def _other_arguments(self) -> Iterator[None]:
        """Within it the other arguments aren't those of the start: a position encoding may be zero there."""
        args, kwargs = self.args, self.kwargs

        def other(value: Any) -> Any:
            return _noise(value) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

        self.args, self.kwargs = tuple(map(other, args)), {name: other(value) for name, value in kwargs.items()}
        try:
            yield
        finally:
            self.args, self.kwargs = args, kwargs

    def find_way(self, slots: tuple[str, ...]) -> Way | None:
        """How the block can be closed: by its slots, or else by another child; without slots by two of them too."""
        children = self._called(dict(self.block.named_children()))
        if not slots and len(children) > MOST_CHILDREN:
            return None
        singles = list(combinations([name for name in children if name not in slots], 1))
        pairs = [first + second for first, second in combinations(singles, 2)]
        x = self.inputs[0]
        shape = self.run(x).shape

        @cache
        def closed(ends: tuple[str, ...]) -> torch.Tensor:
            return self.run(x, ends, factor=0.)

        for choices in ([slots], singles) if slots else (singles + pairs,):
            for path, relu, y in self._shortcuts(children, bool(slots)):
                for ends in choices if y.shape == shape else ():
                    way = Way(ends, path, relu)
                    if _same(y, closed(ends)) and self._closes(way) and (ends == slots or self._adds(way)):
                        return way
        return None

    def _shortcuts(self, children: list[str], any_pair: bool) -> Iterator[tuple[tuple[str, ...], bool, torch.Tensor]]:
        """What may be beside a branch, the simplest first: the identity, a child, two, and a ReLU behind them.

        Args:
            children: Names, the last to return first.
            any_pair: Whether the second of two may have parameters, or must be an activation.

        Yields:
            Names of children, whether there is a ReLU behind them, and what both make of the input.
        """
        def has_parameters(name: str) -> bool:
            return any(True for _ in getattr(self.block, name).parameters())

        found: list[tuple[tuple[str, ...], torch.Tensor]] = [((), self.inputs[0])]
        for path, x in found:  # which grows meanwhile
            yield path, False, x
            if not path:
                names = sorted(children, key=has_parameters)
            elif len(path) == 1:  # children that are called later
                names = [name for name in children[:children.index(path[0])] if any_pair or not has_parameters(name)]
            else:
                continue
            found += [((*path, name), y) for name in names if (y := self._tried(name, x)) is not None]
        for path, x in found:
            yield path, True, F.relu(x)

    def _called(self, modules: dict[Any, nn.Module]) -> list[Any]:
        """The keys of those of `modules` that return features in a run, the last to return first."""
        called: list[Any] = []
        with ExitStack() as hooks:
            for key, module in modules.items():
                def note(module: nn.Module, args: tuple, output: Any, key: Any = key) -> None:
                    if isinstance(features(output), torch.Tensor):
                        called.append(key)
                hooks.callback(module.register_forward_hook(note).remove)
            self.run(self.inputs[0])
        return list(dict.fromkeys(reversed(called)))

    def _through(self, path: tuple[str, ...], x: torch.Tensor) -> torch.Tensor:
        """What the children `path` make of `x`."""
        for name in path:
            x = getattr(self.block, name)(x.clone())
        return x

    def _tried(self, name: str, x: torch.Tensor) -> torch.Tensor | None:
        """What a child makes of `x`; None if it wants something else."""
        try:
            y = self._through((name,), x)
        except Exception:
            return None
        return y if isinstance(y, torch.Tensor) else None

    def _closes(self, way: Way) -> bool:
        """Whether the way holds for other inputs too, and in training: there may be dropout beside the branch."""
        def holds() -> bool:
            y = self._through(way.shortcut_path, self.inputs[1])
            return _same(F.relu(y) if way.relu_behind else y, self.run(self.inputs[1], way.ends, factor=0.))

        with self._other_arguments():
            if not holds():
                return False
            with training_mode(self.block, True), changed(list(self.block.buffers()), torch.Tensor.clone), \
                    torch.random.fork_rng():
                try:
                    return holds()
                except ValueError:  # batch norm wants more than the one value of a small picture
                    return True

    def _adds(self, way: Way) -> bool:
        """Whether what is added to the shortcut is proportional to what the ends return, in each of their calls."""
        sums: list[torch.Tensor] = []  # what goes into an activation behind the addition

        def is_added(call: Call) -> bool:
            values = []
            for factor in (0., 1., 2.):
                sums.clear()
                output = self.run(self.inputs[0], way.ends, factor, call)
                values.append(sums[-1] if sums else output)
            positive = torch.stack(values).amin(0) > 0  # where a ReLU behind the addition does nothing
            zero, one, two = (value[positive] if way.relu_behind else value for value in values)
            return bool((one != zero).any()) and torch.allclose(two - zero, 2 * (one - zero), rtol=1e-3, atol=1e-5)

        self.run(self.inputs[1], way.ends)
        others = self.branches
        self.run(self.inputs[0], way.ends)
        if all(torch.equal(branch, others[call]) for call, branch in self.branches.items() if call in others):
            return False  # nothing of the input is in it, as in a position encoding
        calls = list(self.branches)
        if all(map(is_added, calls)):
            return True
        with ExitStack() as hooks:
            for name in way.shortcut_path[-1:]:
                hooks.callback(getattr(self.block, name).register_forward_pre_hook(
                    lambda _, args: sums.append(args[0].clone())).remove)
            return bool(way.shortcut_path) and all(map(is_added, calls))

    def find_affine(self, ends: tuple[str, ...]) -> tuple[Affine, ...] | None:
        """For each branch the parameters that scale it: half of them make half of it. None if a branch has none.

        The last ones that do: something that isn't linear may follow others.
        """
        modules = {module: module for module in self.block.modules() if module is not self.block}
        called = self._called(modules)
        silent = [module for module in modules if module not in called]  # such as MultiheadAttention's last layer
        layers = [(self.block, (name,)) for name, _ in self.block.named_parameters(recurse=False)]
        layers += [(module, tuple(dict(module.named_parameters(recurse=False)))) for module in (*called, *silent)]
        self.run(self.inputs[0], ends)
        before = self.branches

        def halves(call: Call, layer: nn.Module, names: tuple[str, ...], tolerance: float) -> bool:
            with changed([getattr(layer, name) for name in names], lambda value: value / 2):
                self.run(self.inputs[0], ends)
            half = before[call] / 2
            return bool((self.branches[call] - half).norm() <= tolerance * half.norm())

        def find(call: Call) -> Affine | None:
            for layer, names in layers:
                # Nearly, for a weight that is standardised before it is used scales nothing: then without it.
                if names and halves(call, layer, names, tolerance=1e-2):
                    for part in (*combinations(names, len(names) - 1), names):
                        if part and halves(call, layer, part, tolerance=1e-4):
                            return Affine(call[0], layer, part)
            return None

        found = [find(call) for call in before]
        return None if None in found else tuple(found)  # type: ignore[arg-type]
