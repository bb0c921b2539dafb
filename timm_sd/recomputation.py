"""How a block that activation checkpointing recomputes finds the gates of its own forward pass.

Checkpointing runs a block once more within the backward pass, and restores the state of torch's CPU generator for
that. So the state tells which forward pass is meant. Where two passes could be meant it is an error, never a choice.
"""
import threading
from typing import Any, NamedTuple

import torch

# A recomputation finds its own pass among so many of the last ones.
REMEMBERED_PASSES = 100
# The beginnings of so many passes are kept, to detect one whose random numbers repeat.
REMEMBERED_BEGINNINGS = 100_000


class Draw(NamedTuple):
    """The gates of one forward pass.

    Attributes:
        open: One bool a block.
        rates: The drop path rates they were drawn with.
        key: What they were drawn from; the subsets of mode 'subset' follow from it too.
    """
    open: tuple[bool, ...]
    rates: tuple[float, ...]
    key: str


class Pass(threading.local):
    """The forward pass that a thread is in.

    Attributes:
        draw: Its gates; None before the first pass.
        last_block: Index of the last block that asked.
        begun: Whether its beginning is remembered.
        repeats: Whether it began with the random numbers of an earlier pass whose gates are forgotten.
    """
    draw: Draw | None = None
    last_block = -1
    begun = False
    repeats = False


class PassMemory:
    """The draws of the last forward passes that may be recomputed, by block and state of the generator.

    Args:
        depth: Number of residual blocks.
    """

    def __init__(self, depth: int) -> None:
        self.depth, self.lock = depth, threading.Lock()
        # None if two passes had the block and the state.
        self.draws: dict[tuple[int, int], Draw | None] = {}
        self.beginnings: dict[tuple[int, int], None] = {}
        self.threads: set[int] = set()

    def clear(self) -> None:
        """Forgets all passes."""
        self.draws.clear()
        self.beginnings.clear()
        self.threads.clear()

    def knows(self, index: int) -> bool:
        """Whether block `index` runs within a backward pass, with the random numbers of a pass that had gates."""
        return in_backward() and (index, _generator_state()) in self.draws

    def note(self, index: int, current: Pass, draw: Draw) -> None:
        """Notes the generator's state and the draw of block `index`, if this pass may be recomputed.

        The forward pass of a reentrant checkpoint and the first one of GradCache run without gradients, that of a
        checkpoint that isn't reentrant with hooks on saved tensors.

        Raises:
            RuntimeError: If the pass repeats the random numbers of one that was run to be repeated.
        """
        if torch._C._are_functorch_transforms_active():
            return  # where checkpointing doesn't work
        grad = torch.is_grad_enabled()
        may_be_recomputed = not grad or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        if not may_be_recomputed and not self.draws:
            return
        place = index, _generator_state()
        with self.lock:
            known = self.draws.get(place, draw)
            if not current.begun:
                current.repeats = place in self.beginnings and place not in self.draws
                if may_be_recomputed:
                    current.begun = True
                    self.beginnings[place] = None
            if current.repeats or known != draw:
                if grad:
                    raise RuntimeError(
                        f'block {index + 1}: this forward pass has the random numbers of an earlier one, and other '
                        'gates. To recompute a pass outside of backward, as GradCache does, needs its gates; if it is '
                        'a new pass, do not seed torch as before the earlier one')
                known = None
            if may_be_recomputed:
                self.draws[place] = known
                self.threads.add(threading.get_ident())
                _forget_first(self.draws, REMEMBERED_PASSES * self.depth)
                _forget_first(self.beginnings, REMEMBERED_BEGINNINGS)
        if may_be_recomputed:
            _advance_generator()

    def recall(self, index: int) -> Draw:
        """The draw of the forward pass that block `index` repeats within a backward pass.

        Raises:
            RuntimeError: If it can't be told.
        """
        place, name = (index, _generator_state()), f'block {index + 1} runs within a backward pass'
        if len(self.threads) > 1:
            raise RuntimeError(f'{name}, and several threads, which share the random numbers, ran forward passes that '
                               'may be meant; checkpoint in one thread alone, or call set_epoch when the others end')
        if place not in self.draws:
            raise RuntimeError(f'{name}, and none of the last {REMEMBERED_PASSES} forward passes had its random '
                               'numbers; activation checkpointing must restore them (preserve_rng_state=True)')
        draw = self.draws[place]
        if draw is None:
            raise RuntimeError(f'{name}, and two forward passes had its random numbers but other gates; do not seed '
                               'torch to the same state before two passes that are recomputed')
        _advance_generator()
        return draw


def in_backward() -> bool:
    """Whether a backward pass is running in this thread."""
    return torch._C._current_graph_task_id() != -1


def _forget_first(remembered: dict[Any, Any], size: int) -> None:
    """Forgets what was noted first, until so many are left."""
    while len(remembered) > size:
        del remembered[next(iter(remembered))]


def _generator_state() -> int:
    """Stands for the state of torch's CPU generator."""
    return hash(torch.default_generator.get_state().numpy().tobytes())


def _advance_generator() -> None:
    with torch._C._DisableTorchDispatch():  # a selective checkpoint would take the number from its cache
        torch.rand((), device='cpu')
