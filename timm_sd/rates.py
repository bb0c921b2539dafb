"""The drop path rates: how they are spread over the blocks, and how they change over the epochs."""
from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

SCHEDULES = ('linear', 'uniform')
WHEN = ('standard', 'early', 'late')
CHANGES = ('constant', 'linear')


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f'{name} is {value!r}; choose one of {", ".join(choices)}')


def check_rate(name: str, rate: Any) -> float:
    """The rate as a float; ValueError unless it lies in [0, 1)."""
    try:
        if 0. <= float(rate) < 1.:
            return float(rate)
    except (TypeError, ValueError):
        pass
    raise ValueError(f'{name} is {rate}; it must be a number in [0, 1)')


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
    check_rate('drop_path_rate', drop_path_rate)
    if schedule == 'uniform':
        return [drop_path_rate] * depth
    return [drop_path_rate * block / depth for block in range(1, depth + 1)]


class RateOverTime(NamedTuple):
    """When in a training blocks drop, as in *Dropout Reduces Underfitting* (Liu, Xu et al., arXiv 2303.01500).

    `early` drops in the epochs before the cutoff, for networks that underfit; `late` from the cutoff on, for those that
    overfit; `standard` always. Where they drop, the change `constant` keeps the full rates. The change `linear` lets
    them fall from the full rates in the first epoch to 0 at the cutoff (`early`), or rise from the cutoff to the full
    rates in the last epoch (`late`). `standard` with `linear` rises over the whole training, as NASNet's
    ScheduledDropPath does.

    Attributes:
        when: 'standard', 'early' or 'late'.
        epochs: Of the whole training.
        change: 'constant' or 'linear'.
        cutoff: The epoch, from 0, before which 'early' drops and from which on 'late' does; None of 'standard'.
    """
    when: str
    epochs: int
    change: str = 'constant'
    cutoff: int | None = None

    def check(self) -> None:
        """Raises ValueError unless the training has these epochs, and the cutoff lies within it."""
        check_choice('drop_path_when', self.when, WHEN)
        check_choice('drop_path_change', self.change, CHANGES)
        for name, value in (('epochs', self.epochs), ('drop_path_cutoff', self.cutoff)):
            if value is not None and not isinstance(value, Integral):
                raise ValueError(f'{name} is {value!r}; it must be a whole number')
        if self.epochs < 1:
            raise ValueError(f'the training has {self.epochs} epochs; it must have 1 or more')
        if self.when == 'standard' and self.cutoff is not None:
            raise ValueError(f"drop_path_cutoff is {self.cutoff}, but drop_path_when 'standard' has none; choose "
                             "'early' or 'late', or leave it out")
        if self.when != 'standard' and (self.cutoff is None or self.cutoff < 1):
            raise ValueError(f'drop_path_cutoff is {self.cutoff}; drop_path_when {self.when!r} needs the epoch, 1 or '
                             f'more, at which dropping {"ends" if self.when == "early" else "begins"}')
        if self.cutoff is not None and self.cutoff >= self.epochs:
            raise ValueError(f'drop_path_cutoff is {self.cutoff}, and the training ends after {self.epochs} epochs; '
                             'choose an earlier one')

    def share(self, epoch: float) -> float:
        """The share of the full rates that an epoch has, counted from 0."""
        cutoff = self.cutoff or 0
        if (epoch < cutoff) != (self.when == 'early'):
            return 0.
        if self.change == 'constant':
            return 1.
        share = 1. - epoch / cutoff if self.when == 'early' else (epoch + 1 - cutoff) / (self.epochs - cutoff)
        return min(1., max(0., share))  # of an epoch that is none of the training

    @property
    def is_constant(self) -> bool:
        """Whether the rates are the same in all epochs."""
        return (self.when, self.change, self.cutoff) == ('standard', 'constant', None)

    @property
    def mean_share(self) -> float:
        """The mean of `share` over the epochs."""
        return sum(map(self.share, range(self.epochs))) / self.epochs

    def describe(self) -> str:
        """In words, such as 'early (before epoch 5), linear'."""
        place = {'early': f' (before epoch {self.cutoff})', 'late': f' (from epoch {self.cutoff})'}.get(self.when, '')
        return f'{self.when}{place}, {self.change}'
