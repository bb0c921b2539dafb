"""Which trainings each table and figure of the paper takes, and with which flags of train.py.

A training that several of them need is one training: it has one name, one run folder and one results.json.
"""
import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from harness.recipes import changed_from_recipe, command_line, parse_train_flags, read_recipe
from paper import numbers

# Epochs of each recipe by budget; the recipe's milestones and warm-up shrink with them. `smoke` tries the machinery
# on handwritten digits, by the recipe quickstart, and shows nothing about the paper.
BUDGETS: dict[str, dict[str, int]] = dict(
    full={recipe: numbers.EPOCHS[recipe] for recipe in ('cifar10', 'cifar100', 'svhn', 'imagenet', 'cifar10_1202')},
    medium=dict(cifar10=16, cifar100=16, svhn=8, imagenet=8, cifar10_1202=16),
    short=dict(cifar10=8, cifar100=8, svhn=4, imagenet=4, cifar10_1202=8),
    smoke=dict(cifar10=4, cifar100=4, svhn=4, imagenet=4, cifar10_1202=4),
)


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
    """
    recipe: str = 'cifar10'
    depth: int = 110
    drop_path: float = 0.5
    schedule: str = 'linear'
    mode: str = 'batch'
    scale: str = 'eval'
    augment: bool = True
    lr: float | None = None

    @property
    def model(self) -> str:
        if self.recipe == 'imagenet':
            return f'sd_resnet{self.depth}'
        return f'sd_resnet{self.depth}_cifar.{dict(cifar100="c100", svhn="svhn").get(self.recipe, "c10")}'

    @property
    def data(self) -> str:
        """The data set, and the name of a folder that holds a copy of it."""
        return self.recipe.partition('_')[0]

    def dataset(self, budget: str) -> str:
        """The data set by its recipe's name."""
        return read_recipe('quickstart' if budget == 'smoke' else self.recipe)['dataset']

    def name(self, budget: str, seed: int) -> str:
        """Of the run folder. Mode, scale, augmentation and learning rate are named where they aren't the paper's."""
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
        return '-'.join([*words, budget, str(seed)])

    def flags(self, budget: str, seed: int, data: Path | None) -> list[str]:
        """The command line of train.py, without where to put the run folder.

        Args:
            budget: Of `BUDGETS`.
            seed: Of the run.
            data: Folder that holds a local copy of the data set under its name, or None for the Hub.
        """
        name = 'quickstart' if budget == 'smoke' else self.recipe
        recipe, epochs = read_recipe(name), BUDGETS[budget][self.recipe]
        changed: dict[str, Any] = dict(
            model=self.model, drop_path=self.drop_path, drop_path_schedule=self.schedule, drop_path_scale=self.scale,
            epochs=epochs, seed=seed, log_gradients=True)
        if epochs != recipe['epochs']:
            part = epochs / recipe['epochs']
            milestones = recipe.get('decay_milestones', [recipe['epochs'] / 2, recipe['epochs'] * 3 / 4])
            shrunk: list[int] = []
            for epoch in milestones:
                # timm's milestone m is the m-th epoch: the first rate holds for m - 1 epochs. No phase is lost.
                shrunk.append(max(round((epoch - 1) * part) + 1, shrunk[-1] + 1 if shrunk else 1))
            changed['decay_milestones'] = shrunk
            warmup = recipe.get('warmup_epochs', 0)
            changed['warmup_epochs'] = max(1, round(warmup * part)) if warmup else 0
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


def _key(recipe: str, dataset: str, changed: dict[str, Any]) -> str:
    changed = {name: value for name, value in changed.items() if (name, value) != ('drop_path_mode', 'batch')}
    return json.dumps([recipe, dataset, changed], sort_keys=True)


@cache
def key_of_experiment(experiment: Experiment, budget: str) -> str:
    """What an experiment is trained by at a budget: recipe, data set, and every flag that differs from the recipe's."""
    flags = vars(parse_train_flags(experiment.flags(budget, 0, None)))
    return _key(flags['config'], flags['dataset'], changed_from_recipe(flags))


def key_of_run(results: dict[str, Any]) -> str:
    """What a finished run was trained by, from its results.json. The name of its folder does not matter."""
    return _key(results['recipe'], results['dataset'], results['changed_from_recipe'])


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
BY_MODE_AT_RECIPE_LR = {mode: replace(experiment, lr=None) for mode, experiment in BY_MODE.items()}

TARGETS: dict[str, list[Experiment]] = {
    'table1': [run for pair in TABLE1.values() for run in pair],
    'table2': [run for data in numbers.TABLE2 for run in TABLE1[data]],
    'fig3': list(TABLE1['cifar10']),
    'fig7': list(TABLE1['cifar10']),
    'fig8_left': list(FIG8_LEFT.values()),
    'fig8_right': list(FIG8_RIGHT.values()),
    'depth1202': list(DEPTH1202),
    'modes': [TABLE1['cifar10'][0], *BY_MODE.values()],
    'modes_recipe_lr': list(BY_MODE_AT_RECIPE_LR.values()),
}
TARGETS['all'] = list(dict.fromkeys(run for name, runs in TARGETS.items() if name != 'modes_recipe_lr' for run in runs))
