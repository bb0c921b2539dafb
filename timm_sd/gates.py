"""The gates of stochastic depth: how likely each block is dropped, and which blocks are open in a forward pass.

A draw is made on the host before the block runs, once for the mini-batch and identically on every rank.
"""
import random
import threading
from collections.abc import Sequence
from typing import Any

import torch

from .rates import RateOverTime, check_choice, check_rate, drop_path_rates
from .recomputation import Draw, Pass, PassMemory, in_backward

MODES = ('batch', 'subset', 'sample')
SCALES = ('train', 'eval')

_lock = threading.Lock()


class DepthGates:
    """The rates of one network, and its gates: a Bernoulli draw for each block and training forward pass.

    A draw is a function of (seed, epoch, step) alone, so it is the same on every rank and world size, and the same
    again after a resume. `step` counts the training forward passes of the epoch. In a loop that never calls `set_epoch`
    all of training is epoch 0, and the steps go on counting. torch.manual_seed has no say: two networks of the same
    seed and depth draw the same gates, so give one of them another seed if theirs must differ.

    Several threads may run forward passes at once: each has a draw of its own. Within a thread one pass ends before the
    next begins: a network that is run stage by stage, with two batches in turn, gets more draws than passes.

    Activation checkpointing runs a block once more within the backward pass. It restores the state of torch's CPU
    generator for that, and the state tells which forward pass is meant. So that no two states are the same, each block
    draws one number from that generator in a pass that may be recomputed (under torch.no_grad, or with hooks on saved
    tensors). Other passes leave torch's generators alone. Where two passes could be meant it is an error. No other
    thread may seed the generator meanwhile, which would disturb the masks of dropout too.

    Attributes:
        open: The last draw, one bool a block.
        seed: Seed of the draws.
        epoch: Epoch of the draws.
        step: Number of draws in this epoch.
        active: Whether a rate was ever above 0; before that no gate is asked.
        over_time: How the rates change with the epoch; None if they don't.
        survival_probs: p_l of each block, (L,) on the CPU. Always the same tensor, so that what is compiled in mode
            'sample' reads the new values.
        mode: 'batch', 'subset' or 'sample', see `make_skippable`; in mode 'sample' timm's DropPath draws, and no gate.
        scale: 'train' or 'eval', see `make_skippable`.

    Args:
        depth: Number of residual blocks, L.
        drop_path_rate: Rate of the last block, 1 - p_L, in [0, 1).
        schedule: 'linear' or 'uniform', see `drop_path_rates`.
        mode: 'batch', 'subset' or 'sample'.
        scale: 'train' or, in mode 'batch' alone, 'eval'; by default the paper's, 'eval', where it can be.
        seed: Seed of the draws.

    Raises:
        ValueError: If the rate, schedule, mode or scale isn't one of these, or mode and scale don't go together.
    """

    def __init__(self, depth: int, drop_path_rate: float, schedule: str = 'linear', mode: str = 'batch',
                 scale: str | None = None, seed: int = 0) -> None:
        scale = scale or ('eval' if mode == 'batch' else 'train')
        check_choice('drop_path_mode', mode, MODES)
        check_choice(f'drop_path_scale in mode {mode!r}', scale, SCALES if mode == 'batch' else ('train',))
        self.schedule, self.mode, self.scale = schedule, mode, scale
        self.seed, self.epoch, self.step = seed, 0, 0
        self.open = [True] * depth
        self.active = False
        self.over_time: RateOverTime | None = None
        self.survival_probs = torch.ones(depth, device='cpu')
        self.__setstate__({})
        self.drop_path_rates = drop_path_rates(depth, drop_path_rate, schedule)

    # --- rates

    @property
    def drop_path_rates(self) -> Sequence[float]:
        """1 - p_l of each block. Can be set between any two passes, to as many rates in [0, 1) as there are blocks."""
        return self._rates

    @drop_path_rates.setter
    def drop_path_rates(self, rates: Sequence[float]) -> None:
        if self.over_time is not None:
            raise ValueError(f'the drop path rates follow the epoch, {self.over_time.describe()}; end that by '
                             "set_drop_path_when('standard', epochs) before others are set")
        self._set_full_rates(rates)
        self._follow_epoch()

    def _set_full_rates(self, rates: Sequence[float]) -> None:
        """Sets what the rates of an epoch are a share of."""
        if len(rates) != len(self.open):
            raise ValueError(f'{len(rates)} drop path rates for {len(self.open)} blocks')
        self._full_rates = tuple(check_rate(f'drop_path_rate of block {block}', rate)
                                 for block, rate in enumerate(rates, start=1))
        # A network that never had a rate stays a plain one, which torch.compile takes whole. One that had asks its
        # gates even at rate 0: a recomputation may belong to a pass before that.
        self.active = self.active or any(self._full_rates)

    def set_drop_path_rate(self, drop_path_rate: float) -> None:
        """Spreads another rate over the blocks, by the schedule of the first one.

        With scale 'eval' the stored weights stay: evaluation is the same, an open branch in training is divided by the
        new p_l, and the paper's start value remains that of the first rate.

        Args:
            drop_path_rate: Rate of the last block, 1 - p_L, in [0, 1).

        Raises:
            ValueError: If it doesn't lie there, or the rates change with the epoch.
        """
        self.drop_path_rates = drop_path_rates(len(self.open), drop_path_rate, self.schedule)

    def set_drop_path_when(self, when: str, epochs: int, change: str = 'constant', cutoff: int | None = None) -> None:
        """Lets the rates change over the training, up to those that are set now. See `RateOverTime`.

        The rates follow from the epoch alone: `set_epoch` sets them, and a resumed training needs no more than that. A
        change of rates leaves the stored network as it is, with both scales: it evaluates the same before and after.

        Args:
            when: 'early', 'late' or 'standard'; 'standard' with the change 'constant' removes an earlier schedule.
            epochs: Of the whole training.
            change: 'constant' or 'linear'.
            cutoff: Epoch at which dropping ends ('early') or begins ('late').

        Raises:
            ValueError: If an argument isn't one of these, or all rates are 0.
        """
        over_time = RateOverTime(when, epochs, change, cutoff)
        over_time.check()
        if not over_time.is_constant and not any(self._full_rates):
            raise ValueError(f'drop_path_when is {when!r}, drop_path_change {change!r}, but all drop path rates are 0; '
                             'set a rate above 0 first')
        self.over_time = None if over_time.is_constant else over_time
        self._epoch_is_told = False
        self._follow_epoch()

    def _follow_epoch(self) -> None:
        """Sets the rates of this epoch."""
        share = 1. if self.over_time is None else self.over_time.share(self.epoch)
        self._rates = tuple(share * rate for rate in self._full_rates)
        with torch.no_grad():
            self.survival_probs.copy_(1. - torch.tensor(self._rates, device='cpu'))
        self._pass.draw = None  # what this thread runs next is another pass

    def check_epoch(self) -> None:
        """Raises RuntimeError if the rates follow the epoch, and `set_epoch` was not called."""
        if self.over_time is not None and not self._epoch_is_told:
            raise RuntimeError('the drop path rates change with the epoch, and none was begun; call '
                               'depth_gates(model).set_epoch(epoch) at the start of each')

    @property
    def expected_depth(self) -> float:
        """Expected number of open blocks, the sum of p_l: (3L - 1) / 4 for the linear schedule at p_L = 0.5."""
        return sum(1. - rate for rate in self.drop_path_rates)

    @property
    def mean_depth(self) -> float:
        """Expected number of open blocks on the average of all epochs; `expected_depth` where rates don't change."""
        share = 1. if self.over_time is None else self.over_time.mean_share
        return sum(1. - share * rate for rate in self._full_rates)

    # --- draws

    def set_epoch(self, epoch: int) -> None:
        """Starts an epoch: the draws that follow are those of its steps 0, 1, ... Passes before can't be recomputed."""
        self.epoch, self.step, self._epoch_is_told = epoch, 0, True
        self._follow_epoch()
        self._memory.clear()

    def draw(self) -> list[bool]:
        """Draws the gates of the next step: b_l ~ Bernoulli(p_l), True for open."""
        self.check_epoch()
        # A string seed goes through SHA-512, documented to be stable, so neighbouring steps are independent streams.
        uniform = random.Random(self._key()).random
        self.open = [uniform() >= rate for rate in self.drop_path_rates]
        self.step += 1
        return self.open

    def _key(self) -> str:
        return f'{self.seed}/{self.epoch}/{self.step}'

    @torch.compiler.disable
    def ask(self, index: int) -> Draw:
        """The draw that block `index` (from 0) runs by; the first block of a forward pass draws.

        Drawn here rather than in a hook of the model, so that forward_features, forward_intermediates and timm's
        feature wrappers, which never call the model itself, get one draw a pass too. The blocks ask in order, so one
        that comes no later than the last one has begun a new pass.

        Raises:
            RuntimeError: If the block runs within a backward pass, and which forward pass it repeats can't be told; or
                if this forward pass repeats the random numbers of one that was run to be repeated.
        """
        if in_backward():
            return self._memory.recall(index)
        current = self._pass
        if current.draw is None or index <= current.last_block:
            with _lock:
                key = self._key()
                self.draw()
                current.draw = Draw(tuple(self.open), self._rates, key)
            current.begun = current.repeats = False
        current.last_block = index
        self._memory.note(index, current, current.draw)
        return current.draw

    def remembers(self, index: int) -> bool:
        """Whether block `index` runs within a backward pass, with the random numbers of a pass that had gates."""
        return self._memory.knows(index)

    # --- copies and resumes

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on drawing, in the middle of an epoch too: seed, epoch, step and rates."""
        return dict(seed=self.seed, epoch=self.epoch, step=self.step, active=self.active,
                    drop_path_rates=list(self._full_rates), over_time=self.over_time and list(self.over_time))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken, with its rates, and its schedule over time or none.

        Raises:
            ValueError: If it was taken of a network of another depth.
        """
        self._set_full_rates(state['drop_path_rates'])
        over_time = state.get('over_time', self.over_time)  # an older version's state has none
        self.over_time = over_time and RateOverTime(*over_time)
        self.seed, self.epoch, self.step, self._epoch_is_told = state['seed'], state['epoch'], state['step'], True
        self.active = self.active or state['active']
        self._follow_epoch()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items()
                if name not in ('_pass', '_memory')}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # not copied: a copy has forward passes of its own
        self._pass, self._memory = Pass(), PassMemory(len(self.open))
