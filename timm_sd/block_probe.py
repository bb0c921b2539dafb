"""How one residual block can be closed: found not by names but by running it with its branch taken away.

A branch ends in a `drop_path` slot, or in a child of the block whose output is added to the shortcut. The block can be
closed if, without its branches, it returns what some of its children, or none, make of its input.
"""
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from itertools import combinations
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .skippable import features
from .stochastic_depth import Affine

MOST_CHILDREN = 12  # of a block without slots: with more of them there is too much to try

Call = tuple[str, int]  # a child of the block, and the number of its call, from 0: some run twice in a block


@contextmanager
def changed(tensors: list[torch.Tensor], change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Within it the tensors have other values, or another type; afterwards the very memory that they had."""
    before = [(tensor, tensor.data) for tensor in tensors]
    try:
        for tensor, value in before:
            tensor.data = change(value)
        yield
    finally:
        for tensor, value in before:
            tensor.data = value


def other_weights(module: nn.Module) -> Any:
    """Within it the parameters have other values: what holds doesn't hold by initialisation alone."""
    generator = torch.Generator().manual_seed(0)

    def other(value: torch.Tensor) -> torch.Tensor:
        noise = torch.rand(value.shape, generator=generator).to(value.device, value.dtype)
        return value * (0.5 + noise) + 0.1 * noise

    return changed([param for param in module.parameters() if param.is_floating_point()], other)


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
        # The other one has negative values too, or a ReLU behind the addition would look like nothing.
        self.inputs = x, torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
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
        found: list[tuple[tuple[str, ...], torch.Tensor]] = [((), self.inputs[0])]
        for path, x in found:  # which grows meanwhile
            yield path, False, x
            for name in (children, children[:children.index(path[0])] if path else [], [])[len(path)]:
                may_be = not path or any_pair or not any(True for _ in getattr(self.block, name).parameters())
                if may_be and (y := self._through((name,), x)) is not None:
                    found.append(((*path, name), y))
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

    def _through(self, path: tuple[str, ...], x: torch.Tensor) -> torch.Tensor | None:
        """What the children `path` make of `x`; None if they want something else."""
        try:
            for name in path:
                x = getattr(self.block, name)(x.clone())
        except Exception:
            return None
        return x if isinstance(x, torch.Tensor) else None

    def _closes(self, way: Way) -> bool:
        """Whether the way holds for another input too."""
        x = self.inputs[1]
        y = self._through(way.shortcut_path, x)
        return y is not None and _same(F.relu(y) if way.relu_behind else y, self.run(x, way.ends, factor=0.))

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

        self.run(self.inputs[0], way.ends)
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
        candidates = [(self.block, (name,)) for name, _ in self.block.named_parameters(recurse=False)]
        candidates += [(module, names) for module in (*called, *silent)
                       if (names := tuple(name for name, _ in module.named_parameters(recurse=False)))]
        self.run(self.inputs[0], ends)
        before = self.branches

        def halves(call: Call, layer: nn.Module, names: tuple[str, ...]) -> bool:
            with changed([getattr(layer, name) for name in names], lambda value: value / 2):
                self.run(self.inputs[0], ends)
            return torch.allclose(self.branches[call], before[call] / 2, rtol=1e-3, atol=1e-6)

        found = []
        for call in before:
            layer, names = next((choice for choice in candidates if halves(call, *choice)), (None, ()))
            if layer is None:
                return None
            for name in names:  # a weight that is standardised before it is used scales nothing
                others = tuple(other for other in names if other != name)
                if others and halves(call, layer, others):
                    names = others
            found.append(Affine(call[0], layer, names))
        return tuple(found)
