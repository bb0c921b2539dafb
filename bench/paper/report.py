"""The reproduction report: the paper's tables and figures with ours beside them, from the results of finished runs.

A figure is the test error at the epoch of the lowest validation error, in percent, and the mean over seeds with its
standard deviation where there are several. What was not run is an empty cell.
"""
import statistics
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from harness.errors import UserError
from harness.files import make_folder, write_atomic
from harness.recipes import read_recipe
from harness.run_folder import RunFolder
from paper import numbers
from paper.experiments import (
    BUDGETS,
    BY_MODE,
    BY_MODE_AT_RECIPE_LR,
    DEPTH1202,
    FIG8_LEFT,
    FIG8_RIGHT,
    TABLE1,
    Experiment,
    key_of_experiment,
    key_of_run,
)
from paper.figures import save_gradients, save_losses, save_map, save_survival

# The hardware that steps were timed on, and the ratios of each mode's step to constant depth's.
StepTimes = tuple[dict[str, Any], dict[str, dict[str, float]]]
DATA_NAMES = {'cifar10': 'CIFAR-10+', 'cifar100': 'CIFAR-100+', 'svhn': 'SVHN', 'imagenet': 'ImageNet, top-1',
              'cifar10_unaugmented': 'CIFAR-10', 'cifar100_unaugmented': 'CIFAR-100'}
HEAD = """# Reproduction

Written by `python bench/reproduce.py report` from [runs/](../runs), the results.json and summary.csv of each finished
run. A figure is the test error (%) at the epoch of the lowest validation error (of ImageNet, at the last epoch): of one
seed, or the mean over several with its standard deviation and their number. An empty cell was not run. The budgets
`medium` and `short` are the paper's recipe in few epochs, its learning rate steps moved in proportion: only `full` can
be held against the paper. `smoke` tries the machinery on handwritten digits and says nothing about it.
"""


def has_all_cores(hardware: dict[str, Any]) -> bool:
    """Whether a run was made by itself, not with `--processes` beside others."""
    return hardware['threads'] * hardware['processes'] >= hardware.get('cores', 0)


class Found(NamedTuple):
    """The finished runs of one experiment and budget, one a seed: results.json, and the rows of summary.csv."""
    results: list[dict[str, Any]]
    rows: list[list[dict[str, float]]]

    @property
    def errors(self) -> list[float]:
        return [results['test_best']['top1_err'] for results in self.results]

    @property
    def seconds(self) -> list[float]:
        """Seconds of an epoch's steps, of the runs that had all cores."""
        return [results['epoch_seconds'] for results in self.results if has_all_cores(results['hardware'])]


def cell(values: Sequence[float], digits: int = 2) -> str:
    """Mean, and of several the standard deviation and their number; nothing of nothing."""
    spread = f' ± {statistics.stdev(values):.{digits}f} ({len(values)})' if len(values) > 1 else ''
    return f'{statistics.mean(values):.{digits}f}{spread}' if values else ''


def machine(hardware: dict[str, Any]) -> str:
    """The device and the precision."""
    return f'{hardware["device"]}, {"bf16" if hardware["amp"] else "fp32"}'


def machines(*found: Found) -> str:
    """What these runs were made on."""
    return '; '.join(sorted({machine(results['hardware']) for runs in found for results in runs.results}))


def time_ratio(ours: Found, base: Found) -> str:
    """Ratio of the seconds an epoch, if all runs had the same machine to themselves; else nothing."""
    if not (ours.seconds and base.seconds):
        return ''
    keys = ('device', 'amp', 'processes', 'threads', 'cuda_graphs')  # older runs lack the last
    kinds = {tuple(results['hardware'].get(key) or False for key in keys)
             for runs in (ours, base) for results in runs.results}
    return f'{statistics.mean(ours.seconds) / statistics.mean(base.seconds):.3f}' if len(kinds) == 1 else ''


def budget_label(budget: str) -> str:
    """A budget of CIFAR-10 with its epochs, for the head of a row."""
    return f'{budget}, {BUDGETS[budget]["cifar10"]} epochs'


def epochs(*found: Found) -> str:
    """Epochs of these runs."""
    return ', '.join(sorted({str(results['epochs']) for runs in found for results in runs.results}))


def gradient_phases(rows: list[dict[str, float]]) -> list[float]:
    """Mean absolute gradient of a run while the learning rate stays the same, in 1e-5.

    The median over the epochs: in a short phase the first epoch, of untrained weights, would be most of the mean.
    """
    return [statistics.median(row['grad_magnitude'] for row in phase) * 1e5
            for _, phase in groupby(rows, key=lambda row: row['lr'])]


class Report:
    """Finds the runs, and writes REPRODUCTION.md with its pictures beside them.

    Args:
        results: Holds runs/, and reproduction/ for the report, with notes.md if there is something to say of the runs.
        step_times: Of each mode, one for each machine; see `StepTimes`.

    Raises:
        UserError: If two runs are the same, or one can't be read.
    """

    def __init__(self, results: Path, step_times: Sequence[StepTimes] = ()) -> None:
        self.folder, self.times = results / 'reproduction', step_times
        self.runs: dict[str, Found] = {}
        for path in sorted((results / 'runs').glob('*/results.json')):
            folder = RunFolder(path.parent)
            run = folder.read_results()
            if run is None:  # a link to nothing
                continue
            found = self.runs.setdefault(key_of_run(run), Found([], []))
            if run['seed'] in (other['seed'] for other in found.results):
                raise UserError(f'{path.parent} is a second run of the same flags and seed; remove one of the two')
            found.results.append(run)
            found.rows.append(folder.read_summary())

    def find(self, experiment: Experiment, budget: str) -> Found:
        """Its finished runs."""
        return self.runs.get(key_of_experiment(experiment, budget), Found([], []))

    def budgets(self, experiments: Iterable[Experiment]) -> list[str]:
        """The budgets that some of them were run at; the first one if there are none, for its empty cells."""
        experiments = list(experiments)
        return [budget for budget in BUDGETS
                if any(self.find(experiment, budget).results for experiment in experiments)] or [next(iter(BUDGETS))]

    def pairs(self, title: str, runs: dict[str, tuple[Experiment, Experiment]], errors: dict[str, numbers.Pair]) -> str:
        """Test errors at constant and stochastic depth, a row for each data set and budget."""
        lines = [f'## {title}\n',
                 '| data | paper: constant | stochastic | ours: constant | stochastic | epochs | budget | seeds | on |',
                 '|---|---|---|---|---|---|---|---|---|']
        for data, (constant, stochastic) in runs.items():
            for budget in self.budgets((constant, stochastic)):
                ours = [self.find(run, budget) for run in (constant, stochastic)]
                seeds = f'{len(ours[0].results)} and {len(ours[1].results)}' if epochs(*ours) else ''
                lines.append(f'| {DATA_NAMES[data]} | {errors[data].constant:.2f} | {errors[data].stochastic:.2f} '
                             f'| {cell(ours[0].errors)} | {cell(ours[1].errors)} | {epochs(*ours)} '
                             f'| {budget if seeds else ""} | {seeds} | {machines(*ours)} |')
        return '\n'.join(lines)

    def table2(self) -> str:
        """Training time."""
        lines = ['## Table 2: training time\n',
                 "The paper's are hours of the whole training, ours seconds of an epoch's steps (the median), of runs "
                 'made one after the other; of runs made side by side the cell is empty. Steps timed in turns are in '
                 '[bench/README.md](../../README.md).\n',
                 '| data | paper: constant | stochastic | ratio '
                 '| ours: constant | stochastic | ratio | epochs | budget | on |',
                 '|---|---|---|---|---|---|---|---|---|---|']
        for data, hours in numbers.TABLE2.items():
            for budget in self.budgets(TABLE1[data]):
                constant, stochastic = (self.find(run, budget) for run in TABLE1[data])
                lines.append(f'| {DATA_NAMES[data]} | {hours.constant:.1f} h | {hours.stochastic:.1f} h '
                             f'| {hours.stochastic / hours.constant:.3f} | {cell(constant.seconds, 0)} '
                             f'| {cell(stochastic.seconds, 0)} | {time_ratio(stochastic, constant)} '
                             f'| {epochs(constant, stochastic)} '
                             f'| {budget if epochs(constant, stochastic) else ""} | {machines(constant, stochastic)} |')
        return '\n'.join(lines)

    def curves(self) -> str:
        """Figures 3 and 7, drawn from the first seed of each run of CIFAR-10."""
        target = numbers.FIG3
        parts = [f"""## Figure 3: training loss and test error on CIFAR-10+

Final training loss in the paper: {target.constant:g} at constant depth, {target.stochastic:g} with stochastic.
Ours by validation error, since the test images are looked at once, when a run is finished; drawn is the first seed.
""", """## Figure 7: gradients of the first block's first convolution

Mean absolute gradient in the three phases of the learning rate, the median of their epochs, in 1e-5; drawn is the first
seed.

| | phase | constant | stochastic | ratio |
|---|---|---|---|---|"""]
        for phase, pair in enumerate(numbers.FIG7):
            parts[1] += (f'\n| paper | {phase + 1} | {pair.constant * 1e5:.3f} | {pair.stochastic * 1e5:.3f} '
                         f'| {pair.stochastic / pair.constant:.1f} |')
        pictures: list[str] = []
        for budget in self.budgets(TABLE1['cifar10']):
            found = [self.find(run, budget) for run in TABLE1['cifar10']]
            if not all(runs.rows for runs in found):
                continue
            for runs in found:
                for run, rows in zip(*runs, strict=True):
                    if 'grad_magnitude' not in rows[0]:
                        raise UserError(f'summary.csv of {run["model"]}, drop_path {run["drop_path_rate"]}, seed '
                                        f'{run["seed"]}, lacks grad_magnitude for Figure 7; train it again with '
                                        '--log-gradients')
            losses = [cell([rows[-1]['train_loss'] for rows in runs.rows], 4) for runs in found]
            parts[0] += (f'\nOurs, `{budget}`, {epochs(*found)} epochs: {losses[0]} and {losses[1]}.\n'
                         f'\n![training loss and validation error](fig3-{budget}.png)\n')
            phases = zip(*(zip(*map(gradient_phases, runs.rows), strict=True) for runs in found), strict=True)
            for number, (constant, stochastic) in enumerate(phases, 1):
                ratio = statistics.mean(stochastic) / statistics.mean(constant)
                parts[1] += (f'\n| `{budget}`, {epochs(*found)} epochs | {number} | {cell(constant, 3)} '
                             f'| {cell(stochastic, 3)} | {ratio:.1f} |')
            pictures.append(f'![gradient magnitudes](fig7-{budget}.png)')
            first = found[0].rows[0], found[1].rows[0]
            save_losses(*first, self.folder / f'fig3-{budget}.png')
            save_gradients(*first, self.folder / f'fig7-{budget}.png')
        return '\n\n'.join([*parts, *pictures])

    def survival(self) -> str:
        """Figure 8, left: test error over p_L, by schedule."""
        lines = ['## Figure 8, left: p_L and the schedule, 110 layers on CIFAR-10+\n']
        for budget in self.budgets(FIG8_LEFT.values()):
            probabilities = sorted({p_last for _, p_last in FIG8_LEFT})
            lines += ['| | ' + ' | '.join(f'{value:g}' for value in probabilities) + ' |',
                      '|---' * (len(probabilities) + 1) + '|']
            ours: dict[str, dict[float, float]] = {}
            for schedule, errors in numbers.FIG8_LEFT.items():
                found = {value: self.find(FIG8_LEFT[schedule, value], budget) for value in errors}
                ours[schedule] = {value: statistics.mean(runs.errors) for value, runs in found.items() if runs.errors}
                for who, cells in (('paper', {value: f'{error:.2f}' for value, error in errors.items()}),
                                   (budget_label(budget), {value: cell(runs.errors) for value, runs in found.items()})):
                    lines.append(f'| {who}, {schedule} | ' + ' | '.join(
                        cells.get(value, '') for value in probabilities) + ' |')
            if any(ours.values()):
                save_survival(ours, numbers.FIG8_LEFT, budget_label(budget), self.folder / f'fig8_left-{budget}.png')
                lines.append(f'\n![test error over p_L](fig8_left-{budget}.png)\n')
        return '\n'.join(lines)

    def depth_map(self) -> str:
        """Figure 8, right: test error over depth and p_L."""
        lines = ['## Figure 8, right: depth and p_L on CIFAR-10+, linear decay\n']
        for budget in self.budgets(FIG8_RIGHT.values()):
            lines += [f"The paper's / ours ({budget_label(budget)}):\n",
                      '| p_L | ' + ' | '.join(f'{depth} layers' for depth in numbers.DEPTHS) + ' |',
                      '|---' * (len(numbers.DEPTHS) + 1) + '|']
            ours: dict[float, dict[int, float]] = {}
            for p_last, errors in numbers.FIG8_RIGHT.items():
                found = {depth: self.find(FIG8_RIGHT[depth, p_last], budget) for depth in numbers.DEPTHS}
                ours[p_last] = {depth: statistics.mean(runs.errors) for depth, runs in found.items() if runs.errors}
                lines.append(f'| {p_last:g} | ' + ' | '.join(
                    f'{errors[depth]:.2f} / {cell(found[depth].errors)}' for depth in numbers.DEPTHS) + ' |')
            if any(ours.values()):
                save_map(numbers.FIG8_RIGHT, ours, budget_label(budget), self.folder / f'fig8_right-{budget}.png')
                lines.append(f'\n![test error over depth and p_L](fig8_right-{budget}.png)\n')
        return '\n'.join(lines)

    def modes(self) -> str:
        """Beyond the paper: the three ways of dropping at the same rates."""
        constant, stochastic = TABLE1['cifar10']
        rate = read_recipe('cifar10')['lr']
        lines = ['## Beyond the paper: what is dropped\n',
                 '110 layers on CIFAR-10+, p_L = 0.5, linear decay. `batch`: a block for the whole mini-batch (the '
                 "paper); `sample`: for each sample by itself (timm's DropPath); `subset`: for a fixed number of "
                 'random samples (DINOv2). Scale `eval` multiplies the branch by p_l in evaluation (the paper), '
                 '`train` divides it by p_l in training.\n',
                 '| dropped | scale | learning rate | test error | epochs | budget | seeds | on |',
                 '|---|---|---|---|---|---|---|---|']
        rows = [('nothing', constant), ('batch', stochastic), *BY_MODE.items(), *BY_MODE_AT_RECIPE_LR.items()]
        for budget in self.budgets([*BY_MODE.values(), *BY_MODE_AT_RECIPE_LR.values()]):
            for name, run in rows:
                found = self.find(run, budget)
                lines.append(f'| {name} | {run.scale if run.drop_path else ""} | {run.lr or rate} '
                             f'| {cell(found.errors)} | {epochs(found)} | {budget} | {len(found.results) or ""} '
                             f'| {machines(found)} |')
        return '\n'.join([*lines, self.step_times()])

    def step_times(self) -> str:
        """What a step of each way takes, a row for each machine that throughput.py measured them on."""
        rows = []
        for hardware, ratios in self.times:
            cells = ['{median:.2f} ({q1:.2f} to {q3:.2f})'.format(**ratios[mode]) if mode in ratios else ''
                     for mode in BY_MODE]
            rows.append(f'| {machine(hardware)} | {" | ".join(cells)} |')
        head = ['\nSteps of scale `train` timed in turns, in those of constant depth, the median and the quartiles:\n',
                f'| on | {" | ".join(BY_MODE)} |', '|---' * (len(BY_MODE) + 1) + '|']
        return '\n'.join([*head, *rows]) if rows else ''

    def write(self) -> Path:
        """Writes everything; returns the path of REPRODUCTION.md."""
        make_folder(self.folder, '--results')
        parts = [HEAD, self.pairs('Table 1: test error', TABLE1, numbers.TABLE1), self.table2(), self.curves(),
                 self.survival(), self.depth_map(),
                 self.pairs('1202 layers', {'cifar10': DEPTH1202}, {'cifar10': numbers.DEPTH1202}), self.modes()]
        notes = self.folder / 'notes.md'  # what a person has to say of the results
        if notes.exists():
            parts.append(notes.read_text())
        path = self.folder / 'REPRODUCTION.md'
        write_atomic(path, ('\n\n'.join(part.strip() for part in parts) + '\n').encode())
        return path
