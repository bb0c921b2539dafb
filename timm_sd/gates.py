"""The gates of stochastic depth: how likely each block is dropped, and the draws of one network.

A draw is made on the host before the block runs, once for the mini-batch and identically on every rank.
"""
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

SCHEDULES = ('linear', 'uniform')


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f'{name} is {value!r}; choose one of {", ".join(choices)}')


def drop_path_rates(depth: int, drop_path_rate: float, schedule: str = 'linear') -> list[float]:
    """The drop path rate 1 - p_l of each of `depth` blocks.

    `linear` is the paper's eq. 4, p_l = 1 - (l / L)(1 - p_L) for l = 1..L: the first block is already dropped at times
    and the last at exactly `drop_path_rate`. This is not timm's rule, idx / (n - 1), which never drops the first.

    Args:
        depth: Number of residual blocks, L.
        drop_path_rate: Rate of the last block, 1 - p_L, in [0, 1).
        schedule: 'linear' or 'uniform' (every block at `drop_path_rate`).

    Returns:
        The rates of block 1, ..., block L.

    Raises:
        ValueError: If the rate or the schedule isn't one of these.
    """
    check_choice('drop_path_schedule', schedule, SCHEDULES)
    if not 0. <= drop_path_rate < 1.:
        raise ValueError(f'drop_path_rate is {drop_path_rate}; it must lie in [0, 1)')
    if schedule == 'uniform':
        return [drop_path_rate] * depth
    return [drop_path_rate * block / depth for block in range(1, depth + 1)]


class Draw(NamedTuple):
    """The gates of one forward pass.

    Attributes:
        open: One bool a block.
        key: What they were drawn from; the subsets of mode 'subset' follow from it too.
    """
    open: list[bool]
    key: str


class DepthGates:
    """The gates of one network: a Bernoulli draw for each block and mini-batch.

    A draw is a function of (seed, epoch, step) alone, so it is the same on every rank and world size, and the same
    again after a resume. `step` counts the training forward passes of the epoch. In a loop that never calls `set_epoch`
    all of training is epoch 0, and the steps go on counting.

    Attributes:
        drop_path_rates: 1 - p_l of each block.
        open: The last draw, one bool a block.
    """

    def __init__(self, rates: Sequence[float], seed: int = 0) -> None:
        self.drop_path_rates = list(rates)
        self.seed = seed
        self.epoch = 0
        self.step = 0
        self.open = [True] * len(self.drop_path_rates)
        self._last_asked = len(self.open)
        self._recomputed = Draw(self.open, '')
        self._draw_of: dict[StorageWeakRef, Draw] = {}

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__, _draw_of={})  # a copy has forward passes of its own

    def ask(self, index: int, x: torch.Tensor) -> Draw:
        """The draw that block `index` (from 0) with the input `x` runs by; the first block of a forward pass draws.

        Drawn here rather than in a hook of the model, so that forward_features, forward_intermediates and timm's
        feature wrappers, which never call the model itself, get one draw a pass too. The blocks ask in order, so one
        that comes no later than the last one has begun a new pass.

        A checkpointed block asks again when it is recomputed, maybe after other forward passes. Its input, kept alive
        for that, tells which pass it belongs to; those behind it in the same checkpoint get new inputs, and follow it.
        """
        storage = StorageWeakRef(x.untyped_storage())  # unlike an address, never reused while it is remembered
        if torch._C._current_graph_task_id() != -1:  # within a backward pass: a recomputation
            self._recomputed = self._draw_of.get(storage, self._recomputed)
            return self._recomputed
        if index <= self._last_asked:
            key = f'{self.seed}/{self.epoch}/{self.step}'
            self.draw()
            self._recomputed = Draw(self.open, key)
            self._draw_of = {known: draw for known, draw in self._draw_of.items() if not known.expired()}
        self._last_asked = index
        self._draw_of[storage] = self._recomputed
        return self._recomputed

    def draw(self) -> list[bool]:
        """Draws the gates of the next step: b_l ~ Bernoulli(p_l), True for open."""
        # A string seed goes through SHA-512, documented to be stable, so neighbouring steps are independent streams.
        # torch's generators stay untouched: a drop path must not shift the augmentation or dropout of its rank.
        uniform = random.Random(f'{self.seed}/{self.epoch}/{self.step}').random
        self.open = [uniform() >= rate for rate in self.drop_path_rates]
        self.step += 1
        return self.open

    def set_epoch(self, epoch: int) -> None:
        """Starts an epoch: the draws that follow are those of its steps 0, 1, ..."""
        self.epoch, self.step = epoch, 0

    @property
    def expected_depth(self) -> float:
        """Expected number of open blocks, the sum of p_l: (3L - 1) / 4 for the linear schedule at p_L = 0.5."""
        return sum(1. - rate for rate in self.drop_path_rates)

    def state_dict(self) -> dict:
        """What is needed to go on drawing: seed, epoch and step."""
        return dict(seed=self.seed, epoch=self.epoch, step=self.step)

    def load_state_dict(self, state: dict) -> None:
        """Goes on where `state_dict` was taken."""
        self.seed, self.epoch, self.step = state['seed'], state['epoch'], state['step']
