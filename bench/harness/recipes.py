"""The flags of train.py, and recipes: YAML files that say what the command line leaves open."""
import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from harness.cli import Parser, add_flags, flag, make_settings, unmet
from harness.data.settings import AugmentationSettings, ImageSettings, SplitSettings
from harness.data.sources import SourceSettings
from harness.errors import UserError, nearest
from harness.files import read_mapping
from harness.launch import LaunchSettings
from harness.loss import LossSettings
from harness.network import DepthSettings, NetworkSettings
from harness.optimizer import OptimizerSettings
from harness.paths import RECIPES
from harness.resume import MAY_DIFFER, FolderSettings
from harness.tracking import TrackingSettings
from harness.training import TrainingSettings


@dataclass(frozen=True)
class RecipeSettings:
    """Recipe."""
    config: str = flag('quickstart', 'recipe', short='-c', metavar='NAME_OR_FILE')


@dataclass(frozen=True)
class TrainFlags:
    """All flags of train.py: the settings of each part, and `record`, every flag by name for args.yaml."""
    recipe: RecipeSettings
    source: SourceSettings
    splits: SplitSettings
    images: ImageSettings
    network: NetworkSettings
    depth: DepthSettings
    optimizer: OptimizerSettings
    augmentation: AugmentationSettings
    loss: LossSettings
    training: TrainingSettings
    folder: FolderSettings
    launch: LaunchSettings
    tracking: TrackingSettings
    record: dict[str, Any]


SETTINGS_CLASSES: dict[str, Any] = {field.name: field.type for field in fields(TrainFlags) if field.name != 'record'}


def train_parser() -> Parser:
    """The flags of train.py, named as timm's where timm has them."""
    parser = Parser('Trains a network with stochastic depth.')
    add_flags(parser, *SETTINGS_CLASSES.values())
    return parser


def group_flags(args: argparse.Namespace) -> TrainFlags:
    """What was parsed, part by part."""
    return TrainFlags(**{name: make_settings(cls, args) for name, cls in SETTINGS_CLASSES.items()}, record=vars(args))


def _recipe_file(name: str, beside: str = '') -> str:
    """The file of a recipe's name or file; of a file that another one names, beside that one."""
    if not name.endswith(('.yaml', '.yml')):
        return str(RECIPES / f'{name}.yaml')
    return os.path.normpath(os.path.join(os.path.dirname(beside), name))


def _read_recipe_file(file: str, name: str) -> dict[str, Any]:
    if not os.path.exists(file):
        recipes = [recipe.stem for recipe in RECIPES.glob('*.yaml')]
        raise UserError(f'no recipe {name!r}; nearest: {nearest(name, recipes)}, or give a YAML file')
    return read_mapping(Path(file), yaml.safe_load, 'a recipe is a YAML file that maps the names of flags to values')


def read_recipe(name: str) -> dict[str, Any]:
    """The recipe of a name or YAML file: flags and their values. `config` in it names one that it builds on.

    Raises:
        UserError: If there is none, or it can't be read, is no mapping, or builds on itself.
    """
    recipe: dict[str, Any] = {}
    files = [_recipe_file(name)]
    while True:
        own = _read_recipe_file(files[-1], name)
        name = str(own.pop('config', None) or '')
        recipe = {**own, **recipe}
        if not name:
            return recipe
        files.append(_recipe_file(name, beside=files[-1]))
        if files[-1] in files[:-1]:
            raise UserError(f'recipe {name!r} builds on itself')


def command_line(flags: dict[str, Any]) -> list[str]:
    """Flags by name as a command line, so that a recipe's values are checked as the user's are."""
    line = []
    for name, value in flags.items():
        words = name.replace('_', '-')
        if isinstance(value, bool):
            line.append(f'--{words}' if value else f'--no-{words}')
        elif isinstance(value, dict):
            line += [f'--{words}', *(f'{key}={entry if isinstance(entry, str) else json.dumps(entry)}'
                                     for key, entry in value.items())]
        elif value is not None and value != []:
            line += [f'--{words}', *(str(entry) for entry in (value if isinstance(value, list) else [value]))]
    return line


def parse_train_flags(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of train.py: those of the command line, and the recipe's where it says nothing.

    Values of the recipe that have no effect with the flags of the command line are dropped.

    Args:
        argv: The command line, by default this process's.

    Raises:
        UserError: If a flag, the recipe or a key in it is unknown, a value has the wrong type or size, or a flag would
            do nothing.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = train_parser()
    args = parser.parse_args(argv)
    typed = _typed(parser, argv)
    recipe = read_recipe(args.config)
    for key in recipe:
        if key not in args:
            raise UserError(f'recipe key {key!r} is no flag; nearest: {nearest(str(key), vars(args))}')
    for one, other in (('val_per_class', 'val_fraction'), ('val_fraction', 'val_per_class')):
        if one in typed:  # the command line's choice, not the recipe's
            recipe.pop(other, None)
    lacks = without_effect(vars(parser.parse_args(command_line(recipe))))
    for key in sorted(_read_recipe_file(_recipe_file(args.config), args.config).keys() & lacks):  # not its base's
        raise UserError(f'recipe {args.config}: {key} does nothing without {lacks[key]}')
    lacks = without_effect(vars(parser.parse_args([*command_line(recipe), *argv])))
    for key in sorted(typed & lacks.keys()):
        raise UserError(f'--{key.replace("_", "-")} does nothing without {lacks[key]}; leave it out')
    recipe = {key: value for key, value in recipe.items() if key not in lacks}
    return parser.parse_args([*command_line(recipe), *argv])


def _typed(parser: Parser, argv: Sequence[str]) -> set[str]:
    """The flags that stand in a command line."""
    nothing = object()
    unset = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args([])), nothing))
    return {key for key, value in vars(parser.parse_args(argv, unset)).items() if value is not nothing}


def without_effect(flags: dict[str, Any]) -> dict[str, str]:
    """The flags of train.py that would do nothing, and the flag that each lacks; see `unmet`."""
    return unmet(flags, *SETTINGS_CLASSES.values())


def effective(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags of a run that had an effect. What an older version did not know yet was the default."""
    unknown = dict(vars(train_parser().parse_args([])), amp_dtype='bfloat16', initial_sha256=None)
    flags = {**unknown, **flags}
    lacks = without_effect(flags)
    return {key: value for key, value in flags.items() if key not in lacks}


def is_packaged(recipe: str) -> bool:
    """Whether recipes/ has a recipe of this name."""
    return (RECIPES / f'{recipe}.yaml').exists()


def changed_from_recipe(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that say something else than their recipe does."""
    # Recorded elsewhere, or without effect.
    elsewhere = {*MAY_DIFFER, 'config', 'seed', 'amp', 'amp_dtype', 'log_gradients'}
    flags, recipe = effective(flags), vars(parse_train_flags(['-c', flags['config']]))
    return {key: flags[key] for key, value in recipe.items()
            if key in flags and flags[key] != value and key not in elsewhere}


def changed_by_run(results: dict[str, Any]) -> dict[str, Any]:
    """The flags by which a finished run differs from the packaged recipe of its recipe's name, as it is today.

    The recipe may have been changed since, or been another file of the same name. Of a recipe that is not packaged it
    is what the run recorded.
    """
    args = results['args']
    extended = dict(extended=args['extended']) if args.get('extended') else {}  # it was finished before, after so many
    if not is_packaged(results['recipe']):
        return {**results['changed_from_recipe'], **extended}
    changed = {**changed_from_recipe(dict(args, config=results['recipe'])), **extended}
    if changed.get('drop_path_mode') == 'batch':  # which is the default
        del changed['drop_path_mode']
    if args.get('global_batch_size', args['batch_size']) != args['batch_size']:  # on several processes
        changed['global_batch_size'] = args['global_batch_size']
    return changed
