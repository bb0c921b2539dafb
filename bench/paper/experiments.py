"""Which trainings each table and figure of the paper takes, and with which flags of train.py.

A training that several of them need is one training: it has one name, one run folder and one results.json.
"""
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from harness.recipes import changed_by_run, changed_from_recipe, command_line, parse_train_flags, read_recipe
from paper import numbers
from timm_sd.rates import RateOverTime, drop_path_rates

# How long a training is: `full` is the recipe's epochs, which are the paper's where the recipe is. `smoke` tries the
# machinery on handwritten digits, by the recipe quickstart, and shows nothing about the paper. `fitted` and `twice` are
# `FITTED_EPOCHS`, and twice as many.
TIMES_FITTED = {'fitted': 1, 'twice': 2}
BUDGETS = ('full', *TIMES_FITTED, 'smoke')
SMOKE_EPOCHS = 4
# A regulariser can be judged where constant depth fits its training images: where the training loss of its last epoch
# is below this, with augmentation and without.
FITS = {True: 0.1, False: 0.02}
# Enough epochs for constant depth to fit, by layers, recipe and augmentation. 24 are enough, the others are guesses
# (results/reproduction/notes.md). Stochastic depth learns more slowly, so a judgement after these epochs alone would be
# biased against it: hence `twice`.
FITTED_EPOCHS = {(38, 'cifar10', False): 24, (38, 'cifar100', False): 60, (38, 'cifar10', True): 100}


@dataclass(frozen=True)
class Experiment:
    """One network trained by one recipe.

    Attributes:
        recipe: Of recipes/.
        depth: Layers.
        drop_path: 1 - p_L.
        schedule: Of the survival probabilities.
        mode: Of dropping.
        scale: 'eval', the paper's, or 'train'.
        augment: Crop and flip.
        lr: The learning rate to begin with, if not the recipe's.
        when: In which epochs blocks drop, see `timm_sd.rates.RateOverTime`.
        change: Likewise.
        cutoff: Likewise, at the budget `full`.
    """
    recipe: str = 'cifar10'
    depth: int = 110
    drop_path: float = 0.5
    schedule: str = 'linear'
    mode: str = 'batch'
    scale: str = 'eval'
    augment: bool = True
    lr: float | None = None
    when: str = 'standard'
    change: str = 'constant'
    cutoff: int | None = None

    @property
    def model(self) -> str:
        if self.recipe == 'imagenet':
            return f'sd_resnet{self.depth}'
        return f'sd_resnet{self.depth}_cifar.{dict(cifar100="c100", svhn="svhn").get(self.recipe, "c10")}'

    @property
    def data(self) -> str:
        """The data set, and the name of a folder that holds a copy of it."""
        return self.recipe.partition('_')[0]

    def epochs(self, budget: str) -> int | None:
        """Of a budget; None where `FITTED_EPOCHS` has none for the depth and the recipe."""
        if budget == 'smoke':
            return SMOKE_EPOCHS
        if budget == 'full':
            return read_recipe(self.recipe)['epochs']
        fitted = FITTED_EPOCHS.get((self.depth, self.recipe, self.augment))
        return fitted and fitted * TIMES_FITTED[budget]

    def over_time(self, budget: str) -> RateOverTime:
        """How the rates change; the cutoff in proportion to the epochs."""
        epochs, full = self.epochs(budget) or 1, read_recipe(self.recipe)['epochs']
        return RateOverTime(self.when, epochs, self.change, self.cutoff and round(self.cutoff * epochs / full))

    @property
    def blocks(self) -> int:
        """The residual blocks."""
        return (self.depth - 2) // 2

    def expected_depth(self, budget: str) -> float:
        """The residual blocks that a training step is expected to run, on the average of all epochs."""
        rates = drop_path_rates(self.blocks, self.drop_path, self.schedule)
        return self.blocks - self.over_time(budget).mean_share * sum(rates)

    def name(self, budget: str, seed: int) -> str:
        """Of the run folder. Mode, scale, augmentation, learning rate and time are named where not the paper's."""
        words = [self.recipe, str(self.depth), f'{1 - self.drop_path:g}-{self.schedule}' if self.drop_path else
                 'constant']
        if self.mode != 'batch':
            words.append(self.mode)
        if self.scale != 'eval':
            words.append(self.scale)
        if not self.augment:
            words.append('plain')
        if self.lr is not None:
            words.append(f'lr{self.lr}')
        if not self.over_time('full').is_constant:
            words += [self.when, self.change, *([str(self.cutoff)] if self.cutoff else [])]
        return '-'.join([*words, budget, str(seed)])

    def flags(self, budget: str, seed: int, data: Path | None) -> list[str]:
        """The command line of train.py, without where to put the run folder.

        Args:
            budget: Of `BUDGETS`.
            seed: Of the run.
            data: Folder that holds a local copy of the data set under its name, or None for the Hub.
        """
        name, epochs = 'quickstart' if budget == 'smoke' else self.recipe, self.epochs(budget)
        changed: dict[str, Any] = dict(
            model=self.model, drop_path=self.drop_path, drop_path_schedule=self.schedule, drop_path_scale=self.scale,
            epochs=epochs, seed=seed, log_gradients=True)
        over_time = self.over_time(budget)
        if not over_time.is_constant:
            changed.update(drop_path_when=self.when, drop_path_change=self.change, drop_path_cutoff=over_time.cutoff)
        if budget in TIMES_FITTED:
            recipe = read_recipe(name)
            # timm's milestone m is the m-th epoch: the first rate holds for m - 1 epochs.
            changed['decay_milestones'] = [round((epoch - 1) * epochs / recipe['epochs']) + 1
                                           for epoch in recipe['decay_milestones']]
            changed.update(warmup_epochs=1, warmup_lr=0.01)  # one epoch, as the paper's ten of 1202 layers
        if self.mode != 'batch':
            changed['drop_path_mode'] = self.mode
        if not self.augment:
            changed.update(crop_padding=0, hflip=0.)
        if self.lr is not None:
            changed['lr'] = self.lr
        if budget == 'smoke':
            changed['img_size'] = 16
        elif data is not None:
            changed['data_dir'] = str(data / self.data)
        return ['-c', name, *command_line(changed)]


@cache
def training_of_experiment(experiment: Experiment, budget: str) -> dict[str, Any]:
    """What an experiment is trained by: recipe, data set, epochs, and every flag that differs from the recipe's."""
    flags = vars(parse_train_flags(experiment.flags(budget, 0, None)))
    return dict(changed_from_recipe(flags), recipe=flags['config'], dataset=flags['dataset'], epochs=flags['epochs'])


def training_of_run(results: dict[str, Any]) -> dict[str, Any]:
    """What a finished run was trained by, from its results.json. The name of its folder does not matter."""
    return dict(changed_by_run(results), **{key: results[key] for key in ('recipe', 'dataset', 'epochs')})


def with_and_without(**kwargs: Any) -> tuple[Experiment, Experiment]:
    """Constant depth, and the paper's stochastic depth."""
    return Experiment(drop_path=0., **kwargs), Experiment(**kwargs)


def ending_in(p_last: float, **kwargs: Any) -> Experiment:
    """Stochastic depth that ends in p_L; at 1 it is constant depth, whatever the schedule."""
    if p_last == 1:
        return Experiment(drop_path=0., **{**kwargs, 'schedule': 'linear'})
    return Experiment(drop_path=round(1 - p_last, 4), **kwargs)


TABLE1 = {
    'cifar10': with_and_without(), 'cifar100': with_and_without(recipe='cifar100'),
    'svhn': with_and_without(recipe='svhn', depth=152), 'imagenet': with_and_without(recipe='imagenet', depth=152),
    'cifar10_unaugmented': with_and_without(augment=False),
    'cifar100_unaugmented': with_and_without(recipe='cifar100', augment=False),
}
DEPTH1202 = with_and_without(recipe='cifar10_1202', depth=1202)
FIG8_LEFT = {(schedule, p_last): ending_in(p_last, schedule=schedule)
             for schedule, errors in numbers.FIG8_LEFT.items() for p_last in errors}
FIG8_RIGHT = {(depth, p_last): ending_in(p_last, depth=depth)
              for p_last in numbers.FIG8_RIGHT for depth in numbers.DEPTHS}
# The three modes at the same rates. 'train' is the only scale that all of them have. At it 110 layers hardly learned by
# the recipe's learning rate of 0.1 (results/reproduction/notes.md).
BY_MODE = {mode: Experiment(mode=mode, scale='train', lr=0.01) for mode in ('batch', 'sample', 'subset')}
# Not in the paper: 38 layers, for the budgets `fitted` and `twice`, which a CPU can train.
EFFECT = {data: {p_last: ending_in(p_last, depth=38, recipe=recipe, augment=augment) for p_last in (1., 0.8, 0.5)}
          for data, recipe, augment in (('cifar10_unaugmented', 'cifar10', False),
                                        ('cifar100_unaugmented', 'cifar100', False), ('cifar10', 'cifar10', True))}

# Not in the paper: rates that change over the training. 20 layers in 30 epochs.
_SHORT: dict[str, Any] = dict(recipe='cifar10_30', depth=20, scale='train')
OVER_TIME = {
    'constant depth': Experiment(drop_path=0., **_SHORT),
    'p_L = 0.8': Experiment(drop_path=0.2, **_SHORT),
    'p_L = 0.5': Experiment(**_SHORT),
    'p_L = 0.5, early, linear': Experiment(when='early', change='linear', cutoff=15, **_SHORT),
    'p_L = 0.5, late': Experiment(when='late', cutoff=15, **_SHORT),
}

TARGETS: dict[str, list[Experiment]] = {
    'table1': [run for pair in TABLE1.values() for run in pair],
    'table2': [run for data in numbers.TABLE2 for run in TABLE1[data]],
    'fig3': list(TABLE1['cifar10']),
    'fig7': list(TABLE1['cifar10']),
    'fig8_left': list(FIG8_LEFT.values()),
    'fig8_right': list(FIG8_RIGHT.values()),
    'depth1202': list(DEPTH1202),
    'modes': [TABLE1['cifar10'][0], *BY_MODE.values()],
}
PAPER = list(dict.fromkeys(run for name, runs in TARGETS.items() if name != 'modes' for run in runs))
TARGETS['all'] = list(dict.fromkeys([*PAPER, *TARGETS['modes']]))
TARGETS['over_time'] = list(OVER_TIME.values())
TARGETS['effect'] = [run for runs in EFFECT.values() for run in runs.values()]
