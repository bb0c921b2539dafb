"""Makes a finished run's weights public.

    python bench/publish.py RUN_FOLDER --repo ORG/NAME              # puts it on the Hub
    python bench/publish.py RUN_FOLDER --repo ORG/NAME --dry-run    # writes the repository folder, for reading
    python bench/publish.py RUN_FOLDER --bundle                     # into the package, the card under hub_cards/

A repository holds model.safetensors, config.json, README.md (the card), results.json, summary.csv, curves.png and
gates.png; never a pickle. The card is built from results.json; nothing in it is typed by hand.
"""
import harness.interrupts  # noqa: F401  (before the imports that take seconds)

# isort: split
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from huggingface_hub.utils import validate_repo_id

import timm_sd
from harness.card import (
    DATASETS,
    Comparison,
    channels_of,
    classes_and_size,
    dataset_of,
    full_name,
    method_of,
    over_time_of,
)
from harness.cli import Parser, add_flags, flag, make_settings, run_script
from harness.errors import UserError, user_errors
from harness.files import folder_in_one_piece
from harness.paths import CARDS, RECIPES, RESULTS
from harness.recipes import changed_by_run, effective, is_packaged, read_recipe
from harness.repository import copy_weights, read_run, write_card_folder, write_repository
from harness.upload import UploadSettings, upload
from paper import numbers
from timing.contestants import Variant
from timing.rows import find_row

# Flags that a card has a place of its own for.
SAID_ELSEWHERE = ('model', 'epochs', 'fingerprint', 'extended', 'initial_checkpoint')
PRETRAINED = Path(timm_sd.__file__).parent / 'pretrained'
TIMING = RESULTS / 'timing'
# The paper's augmentation, and what others there are.
AUGMENTS = ('crop_padding', 'hflip', 'vflip', 'reprob', 'mixup', 'cutmix')


@dataclass(frozen=True)
class TargetSettings:
    """Where to."""
    repo: str | None = flag(None, 'the Hub repository', metavar='ORG/NAME')
    dry_run: bool = flag(False, 'write the repository to RUN_FOLDER/hub/ instead')
    bundle: bool = flag(False, 'into the package and hub_cards/ instead')


def whose_recipe(results: dict[str, Any]) -> str:
    """Whose the recipe of a run is, in words for its card."""
    recipe = results['recipe']
    if recipe in numbers.EPOCHS:
        of_paper = read_recipe(recipe)['dataset'] == dataset_of(results)
        return "the paper's recipe" if of_paper else "the paper's recipe on other data"
    return "this project's recipe" if is_packaged(recipe) else "a user's recipe"


def compare(results: dict[str, Any]) -> Comparison:
    """The figures of others for a run, how it was trained, and the saving that was measured for its network."""
    name, args, recipe = full_name(results), effective(results['args']), results['recipe']
    mode, schedule, scale = method_of(results)
    depth_and_tag = numbers.depth_and_tag(name)
    return Comparison(
        paper=numbers.errors_of(name, augment=any(args.get(key) for key in AUGMENTS)),
        public=numbers.PUBLIC.get(depth_and_tag) if depth_and_tag else None,
        recipe_of=whose_recipe(results), epochs=(read_recipe(recipe) if is_packaged(recipe) else results)['epochs'],
        changed={flag: value for flag, value in changed_by_run(results).items() if flag not in SAID_ELSEWHERE},
        saving=None if over_time_of(results) else find_row(  # measured at a rate that stays
            TIMING, name.partition('.')[0], Variant(mode, results['drop_path_rate'], schedule, scale)))


def check_stands_for(results: dict[str, Any], name: str) -> None:
    """Raises UserError unless a run was trained on what the tag of its model stands for, and as it is.

    A folder must have the fingerprint that a recipe of this package knows, not one that a user gave.
    """
    cfg: Any = timm.get_pretrained_cfg(name)
    dataset, data = dataset_of(results), results['data']
    recipes = [read_recipe(path.stem) for path in RECIPES.glob('*.yaml')]
    known = {recipe.get('fingerprint') for recipe in recipes if recipe.get('dataset') == dataset} - {None}
    if 'hub' not in data and not known & {data.get('content'), data.get('fingerprint')}:
        raise UserError(f'no recipe of this package knows {data.get("folder")!r} as a copy of {dataset}; publish it '
                        'with --repo')
    classes, size = classes_and_size(results)
    found = (classes, channels_of(results), size, results['test_split'])
    wanted = (cfg.num_classes, cfg.input_size[0], cfg.input_size[-1], 'test')
    if found != wanted:
        raise UserError(f'{name} stands for {wanted}, its classes, channels, pixels and test split, and the run has '
                        f'{found}; publish it with --repo')


def bundle(run_folder: Path) -> None:
    """Copies a finished run's weights into the package and its results under hub_cards/."""
    results = read_run(run_folder)
    name = full_name(results)
    if name.partition('.')[2] not in DATASETS:
        raise UserError(f'the package holds no {name}, only the tags {", ".join(DATASETS)}; publish it with --repo')
    check_stands_for(results, name)
    with folder_in_one_piece(CARDS / name) as folder:
        write_card_folder(run_folder, results, compare(results), folder)
        copy_weights(run_folder, results, PRETRAINED / f'{name}.safetensors')
    print(f'bundled {name}: test error {results["test_best"]["top1_err"]} %')


def main() -> None:
    """Parses the command line, and publishes."""
    parser = Parser('Makes the weights of a finished run public.')
    parser.add_argument('run_folder', type=Path)
    add_flags(parser, TargetSettings, UploadSettings)
    args = parser.parse_args()
    run_folder, target = args.run_folder, make_settings(TargetSettings, args)
    if target.bundle and (target.repo or target.dry_run):
        raise UserError('--bundle goes into the package, --repo and --dry-run to the Hub; give one of them')
    if target.bundle:
        bundle(run_folder)
        return
    if target.repo is None:
        raise UserError('--repo is not given; give ORG/NAME, or --bundle')
    with user_errors('--repo'):
        validate_repo_id(target.repo)
    results = read_run(run_folder)
    comparison = compare(results)
    if target.dry_run:
        with folder_in_one_piece(run_folder / 'hub') as folder:
            write_repository(run_folder, results, comparison, folder, target.repo)
        print(f'wrote {run_folder / "hub"}')
    else:
        print(upload(run_folder, results, comparison, target.repo, make_settings(UploadSettings, args)))


if __name__ == '__main__':
    run_script(main)
