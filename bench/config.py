"""Command line of the bench scripts: timm's flags, recipes as their defaults, and one line for a user's mistake."""
import argparse
import difflib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import yaml
from safetensors import SafetensorError
from timm.models import load_model_config_from_hf, parse_model_name

import timm_sd  # noqa: F401  (registers the models)

RECIPES = Path(__file__).parent / 'recipes'
# flags that change nothing that is computed: they may differ between a run and its resumption
FREE = ('resume', 'output', 'experiment', 'log_interval', 'checkpoint_hist', 'data_dir', 'threads', 'require_processes',
        'grad_checkpointing')
# timm's schedules that follow from the epoch alone: a resume needs nothing but its number
SCHEDULES = ('multistep', 'step', 'cosine', 'tanh', 'poly', 'wsd', 'constant')


class UserError(Exception):
    """A mistake the user can mend: its message names the thing, the value and the way out, in one line."""


class RankError(UserError):
    """One that a process may meet alone, such as a damaged image in its part: it speaks up, whatever its rank."""


def run(main: Callable[[], Any]) -> None:
    """Runs a script's `main`; a `UserError` becomes one line on stderr and exit status 2."""
    try:
        main()
    except UserError as error:
        if isinstance(error, RankError) or os.environ.get('LOCAL_RANK', '0') == '0':
            print(f'{Path(sys.argv[0]).name}: error: {error}', file=sys.stderr, flush=True)
        sys.exit(2)


def nearest(name: str, names: Iterable[str]) -> str:
    """The names most like `name`, for an error message."""
    names = list(names)
    return ', '.join(difflib.get_close_matches(name, names, n=4, cutoff=0.3) or sorted(names)[:8])


@contextmanager
def user_errors(what: str) -> Iterator[None]:
    """Turns what timm raises on a wrong value into a UserError that begins with `what`."""
    try:
        yield
    except (AssertionError, KeyError, TypeError, ValueError, RuntimeError, OSError, SafetensorError) as error:
        raise UserError(f'{what}: {" ".join(str(error).split())[:300] or type(error).__name__}') from error


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def check_model_name(name: str) -> str:
    """The registered name that timm's `name` means; of a Hub repository or a folder its config.json says it.

    Raises:
        UserError: If there is none, with the nearest names.
    """
    with user_errors(f'--model {name}'):
        source, place = parse_model_name(name)
        if source == 'hf-hub':
            name = load_model_config_from_hf(place)[1]
        elif source:
            name = json.loads(Path(place, 'config.json').read_text())['architecture']
    if not timm.is_model(name):
        raise UserError(f'no model {name!r}; nearest: {nearest(name, timm.list_models() + timm.list_models("sd_*"))}')
    return name


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong flag is one line too, without the usage of fifty flags in front of it."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message: str) -> Any:
        raise UserError(f'{message}; --help lists the flags')


def read_recipe(name: str) -> dict[str, Any]:
    """The recipe of a name or YAML file: flags and their values.

    Raises:
        UserError: If there is none, or it is no mapping.
    """
    path = Path(name) if name.endswith(('.yaml', '.yml')) else RECIPES / f'{name}.yaml'
    if not path.is_file():
        recipes = [recipe.stem for recipe in RECIPES.glob('*.yaml')]
        raise UserError(f'no recipe {name!r}; nearest: {nearest(name, recipes)}, or give a YAML file')
    try:
        recipe = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f'recipe {path}: {" ".join(str(error).split())}') from error
    if not isinstance(recipe, dict):
        raise UserError(f'recipe {path} must be a mapping of flag names to values')
    return recipe


def number(kind: type, low: float, high: float = float('inf')) -> Callable[[str], Any]:
    """An argparse type: a number in [low, high]."""
    def convert(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f'{text} must lie in [{low}, {high}]')
        return value
    convert.__name__ = kind.__name__  # argparse: 'invalid int value'
    return convert


def rate(text: str) -> float:
    """An argparse type: a drop path rate."""
    value = float(text)
    if not 0. <= value < 1.:
        raise argparse.ArgumentTypeError(f'{text} must lie in [0, 1)')
    return value


count, fraction, positive = number(int, 1), number(float, 0, 1), number(float, 0)


def _key_value(text: str) -> list[Any]:
    key, equals, value = text.partition('=')
    if not equals:
        raise argparse.ArgumentTypeError(f'{text!r} is not of the form key=value')
    return [key, yaml.safe_load(value)]


class _KeyValues(argparse.Action):
    """timm's `--model-kwargs key=value ...`."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, dict(values))


def add_key_values(parser: argparse._ActionsContainer, flag: str, help: str | None = None) -> None:
    """A flag of any number of KEY=VALUE, which becomes a dict."""
    parser.add_argument(flag, nargs='*', type=_key_value, action=_KeyValues, default={}, metavar='KEY=VALUE', help=help)


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say what the data is, common to train.py and validate.py."""
    group = parser.add_argument_group('data')
    group.add_argument('--dataset', help="Hub data set ORG/NAME[@REVISION], folder of parquet files, or 'digits', "
                                         'which ships with scikit-learn')
    group.add_argument('--dataset-config', help='configuration of a Hub data set that has several')
    group.add_argument('--data-dir', help='local folder to load instead of --dataset')
    group.add_argument('--streaming', action=argparse.BooleanOptionalAction, default=False,
                       help='read a data set as it comes in, without a copy on the disk')
    group.add_argument('--input-key', help='column of the images; found by its type if there is only one')
    group.add_argument('--target-key', help='column of the labels; found by its type if there is only one')
    group.add_argument('--num-classes', type=int, help='checked against the data')
    group.add_argument('--img-size', type=count, help='side in pixels; images of another size are resized')
    group.add_argument('--mean', type=float, nargs='+', help="mean of each channel (default: the model's)")
    group.add_argument('--std', type=float, nargs='+', help="standard deviation of each channel (default: the model's)")
    group.add_argument('-b', '--batch-size', type=count, default=128, help='images a process and step')
    group.add_argument('--in-memory', action=argparse.BooleanOptionalAction, default=True,
                       help='decode all images once into memory, for small ones; otherwise --workers read them')
    group.add_argument('-j', '--workers', type=count, default=4,
                       help='processes that read where not --in-memory')


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say what the network is, common to train.py and validate.py."""
    group = parser.add_argument_group('model')
    group.add_argument('--model', default='sd_resnet110_cifar', help="timm's name of the network")
    group.add_argument('--pretrained', action=argparse.BooleanOptionalAction, default=False,
                       help='start from the published weights')
    add_key_values(group, '--model-kwargs')
    group.add_argument('--amp', action=argparse.BooleanOptionalAction, help='bf16 autocast (default: if faster)')
    group.add_argument('--channels-last', action=argparse.BooleanOptionalAction, default=True)


def train_parser() -> argparse.ArgumentParser:
    """The flags of train.py, as far as they exist timm's own."""
    parser = Parser('Trains a network with stochastic depth.')
    parser.add_argument('-c', '--config', default='quickstart', metavar='NAME_OR_FILE', help='recipe')
    add_data_flags(parser)
    parser.add_argument('--train-split', default='train', help="'+' joins several")
    parser.add_argument('--val-split', help='split to select by (default: held out of the training split)')
    parser.add_argument('--test-split', default='test')
    parser.add_argument('--val-per-class', type=count, nargs='+', default=[500],
                        help='images of each class held out for validation, one number for each joined split')
    add_model_flags(parser)
    group = parser.add_argument_group('stochastic depth')
    group.add_argument('--drop-path', type=rate, help="1 - p_L (default: the model's)")
    group.add_argument('--drop-path-schedule', choices=timm_sd.SCHEDULES)
    group.add_argument('--drop-path-mode', choices=timm_sd.MODES)
    group.add_argument('--drop-path-scale', choices=timm_sd.SCALES)
    group.add_argument('--grad-checkpointing', action=argparse.BooleanOptionalAction, default=False,
                       help='recompute activations to save memory')
    group.add_argument('--compile', choices=('blocks', 'model'),
                       help="torch.compile: 'blocks' compiles each residual branch and leaves the gates outside")
    group.add_argument('--torchcompile-mode', help='of torch.compile, such as reduce-overhead (CUDA graphs)')

    group = parser.add_argument_group('optimisation')
    group.add_argument('--opt', default='sgd', help="timm's name; its sgd is Nesterov")
    group.add_argument('--lr', type=positive, default=0.1)
    group.add_argument('--momentum', type=fraction, default=0.9)
    group.add_argument('--weight-decay', type=positive, default=1e-4)
    group.add_argument('--filter-bias-and-bn', action=argparse.BooleanOptionalAction, default=False,
                       help='no weight decay on biases and BN (the paper decays all)')
    group.add_argument('--grad-accum-steps', type=count, default=1, help='batches an update')
    group.add_argument('--smoothing', type=fraction, default=0., help='label smoothing')
    group.add_argument('--epochs', type=count, default=500)
    group.add_argument('--sched', default='multistep', choices=SCHEDULES)
    group.add_argument('--sched-on-updates', action=argparse.BooleanOptionalAction, default=False,
                       help='step the schedule every update')
    group.add_argument('--decay-milestones', type=count, nargs='+', default=[250, 375], metavar='EPOCH')
    group.add_argument('--decay-rate', type=positive, default=0.1)
    group.add_argument('--min-lr', type=positive, default=0.)
    group.add_argument('--warmup-epochs', type=number(int, 0), default=0)
    group.add_argument('--warmup-lr', type=positive, default=1e-5)
    group.add_argument('--warmup-constant', action=argparse.BooleanOptionalAction, default=False,
                       help='stay at --warmup-lr instead of climbing from it')

    group = parser.add_argument_group('augmentation')
    group.add_argument('--crop-padding', type=number(int, 0), default=4, help='in memory: zeros around, then a crop')
    group.add_argument('--hflip', type=fraction, default=0.5, help='probability of a horizontal flip')
    group.add_argument('--scale', type=fraction, nargs=2, default=[0.08, 1.], help='not in memory: area of a crop')
    group.add_argument('--color-jitter', type=positive, default=0.4, help='not in memory: strength')
    group.add_argument('--aa', help="not in memory: timm's auto-augment policy, such as rand-m9-mstd0.5")

    group = parser.add_argument_group('run')
    group.add_argument('--seed', type=int, default=0)
    group.add_argument('--output', default='output/train', help='folder of the run folders')
    group.add_argument('--experiment', help='name of the run folder (default: time, model and image size)')
    group.add_argument('--resume', help="'auto', or a run folder to go on with")
    group.add_argument('--require-processes', type=count, metavar='N', help='fail unless N processes train together')
    group.add_argument('--threads', type=count, help='CPU threads a process (default: cores / processes)')
    group.add_argument('--checkpoint-hist', type=count, default=2, help='checkpoints to keep')
    group.add_argument('--eval-interval', type=count, metavar='UPDATES', help='validate within the epochs too')
    group.add_argument('--log-gradients', action=argparse.BooleanOptionalAction, default=False,
                       help="mean absolute gradient of the first block's first layer, by epoch, into summary.csv")
    group.add_argument('--log-interval', type=count, default=20, help='steps between updates of the progress bar')
    return parser


def validate_parser() -> argparse.ArgumentParser:
    """The flags of validate.py."""
    parser = Parser('Evaluates a registered model or a checkpoint.')
    add_data_flags(parser)
    add_model_flags(parser)
    parser.add_argument('--split', default='test')
    parser.add_argument('--checkpoint', help='safetensors file, such as model.safetensors of a run folder')
    parser.add_argument('--results-file', help='CSV to write')
    parser.set_defaults(model=None, dataset='uoft-cs/cifar10', amp=False)
    return parser


def tokens(recipe: dict[str, Any]) -> list[str]:
    """A recipe as a command line, so that its values are checked as the user's are."""
    line = []
    for key, value in recipe.items():
        flag = f'--{key.replace("_", "-")}'
        if isinstance(value, bool):
            line.append(flag if value else f'--no-{flag[2:]}')
        elif isinstance(value, dict):
            line += [flag, *(f'{name}={entry}' for name, entry in value.items())]
        elif value is not None:
            line += [flag, *(str(entry) for entry in (value if isinstance(value, list) else [value]))]
    return line


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line; what it doesn't say, the recipe says that `-c` names, where there is that flag.

    Raises:
        UserError: If a flag, the recipe or a key in it is unknown, or a value has the wrong type or size.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if 'config' not in args:
        return args
    recipe = read_recipe(args.config)
    for key in recipe:
        if key == 'config' or key not in args:
            raise UserError(f'recipe key {key!r} is no flag; nearest: {nearest(key, vars(args))}')
    return parser.parse_args([*tokens(recipe), *argv])


def changed_from_recipe(args: dict[str, Any]) -> dict[str, Any]:
    """The flags that say something else than the recipe they were parsed over."""
    own = {*FREE, 'config', 'seed', 'amp', 'log_gradients'}  # said elsewhere, or changes nothing
    recipe = vars(parse(train_parser(), ['-c', args['config']]))
    return {key: args[key] for key, value in recipe.items() if args[key] != value and key not in own}
