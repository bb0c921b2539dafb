"""The reproduction report: the paper's tables and figures with ours beside them, from the results of finished runs.

A figure is the test error at the epoch of the lowest validation error, in percent, and the mean over seeds with its
standard deviation where there are several. What was not run is an empty cell.
"""
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.files import make_folder, write_atomic
from harness.recipes import read_recipe
from paper import numbers
from paper.experiments import BY_MODE, DEPTH1202, EFFECT, FIG8_LEFT, FIG8_RIGHT, FITS, PAPER, TABLE1, Experiment
from paper.figures import save_curves, save_map, save_survival
from paper.kept import Found, KeptRuns, cell, epochs, machine, machines, seeds, time_ratio

# The hardware that steps were timed on, and the ratios of each mode's step to constant depth's.
StepTimes = tuple[dict[str, Any], dict[str, dict[str, float]]]
DATA_NAMES = {'cifar10': 'CIFAR-10+', 'cifar100': 'CIFAR-100+', 'svhn': 'SVHN', 'imagenet': 'ImageNet, top-1',
              'cifar10_unaugmented': 'CIFAR-10', 'cifar100_unaugmented': 'CIFAR-100'}
HOW = f"""A difference counts where it is more than twice its standard error: over the seeds, or with one seed over
the 10,000 test images. 38 layers can show the effect; only 110 layers and 500 epochs can be held against the paper's
numbers.

Written by `python bench/reproduce.py report` from [runs/](../runs), the results.json and summary.csv of each finished
run. A figure is the test error (%) at the epoch of the lowest validation error (of ImageNet, at the last epoch): of one
seed, or the mean over several with its standard deviation and their number. An empty cell was not run. A `+` is with
augmentation.

Budgets: `full` is the paper's epochs. `fitted` is the fewest, of those tried, in which 38 layers at constant depth fit
their training images: a training loss below {FITS[False]} at the end, {FITS[True]} with augmentation. It is the paper's
recipe, its learning rate steps in proportion, with a first epoch at 0.01. `twice` is twice as many epochs, since
stochastic depth fits later. `smoke` tries the machinery on handwritten digits and says nothing about the paper."""
WHY_NOT_YET = 'one of 110 layers takes two CPU cores a day or more'


def budget_label(run: Experiment, budget: str) -> str:
    """A budget with its epochs, for the head of a row."""
    return f'{budget}, {run.epochs(budget)} epochs'


def verdict(constant: Sequence[float], stochastic: Sequence[float], images: int) -> str:
    """Whether stochastic depth has the lower test error (%), by more than chance: twice the standard error.

    Args:
        constant: Errors at constant depth, one a seed.
        stochastic: Likewise with stochastic depth.
        images: That one error is of.
    """
    def variance(errors: Sequence[float]) -> float:
        if len(errors) > 1:
            return statistics.variance(errors) / len(errors)
        return errors[0] * (100 - errors[0]) / images

    gain = statistics.mean(constant) - statistics.mean(stochastic)
    chance = 2 * (variance(constant) + variance(stochastic)) ** 0.5
    if abs(gain) <= chance:
        return f'no difference: {gain:.2f} ± {chance:.2f}'
    return f'{"reproduced" if gain > 0 else "not reproduced, the opposite"}: {gain:.2f} ± {chance:.2f}'


class Report:
    """Writes REPRODUCTION.md with its pictures beside it.

    Args:
        results: Holds runs/, and reproduction/ for the report, with notes.md if there is something to say of the runs.
        step_times: Of each mode, one for each machine; see `StepTimes`.
    """

    def __init__(self, results: Path, step_times: Sequence[StepTimes] = ()) -> None:
        self.folder, self.times = results / 'reproduction', step_times
        kept = KeptRuns(results / 'runs')
        self.find, self.budgets = kept.find, kept.budgets

    def summary(self) -> str:
        """What was reproduced, what was not yet, and why."""
        lines = ['| | the paper, 110 layers | ours, 38 layers | |', '|---|---|---|---|']
        for data, runs in EFFECT.items():
            pair, ours, said = numbers.TABLE1[data], '', 'not run'
            for label, found in self.compared(runs):  # of the longest
                constant, stochastic = found[1.].errors, found[0.5].errors
                ours = f'{cell(constant)} to {cell(stochastic)}, {label}'
                said = verdict(constant, stochastic, images=10_000)
            lines.append(f'| test error by stochastic depth, {DATA_NAMES[data]} '
                         f'| {pair.constant:.2f} to {pair.stochastic:.2f} | {ours} | {said} |')
        paper = numbers.TABLE2['cifar10']
        steps = [f'{ratios["batch"]["median"]:.2f} ({machine(hardware)})' for hardware, ratios in self.times
                 if 'batch' in ratios]
        lines.append(f"| training time, in constant depth's | {paper.stochastic / paper.constant:.2f} "
                     f'| of a step of 110 layers: {", ".join(steps)} | {"reproduced" if steps else "not run"} |')
        done = sum(bool(self.find(run, 'full').results) for run in PAPER)
        lines.append(f'| all {len(PAPER)} trainings of Tables 1 and 2, Figures 3, 7 and 8 and 1202 layers | 500 epochs '
                     f'| {done} run | {"done" if done == len(PAPER) else f"not yet: {WHY_NOT_YET}"} |')
        return '\n'.join(lines)

    def effect(self) -> str:
        """Test errors of 38 layers at the budgets at which constant depth fits."""
        rates = (1., 0.8, 0.5)
        lines = ['## Where constant depth fits: 38 layers\n',
                 "Not the paper's table, which is of 110 layers and 500 epochs; a CPU can train these. L is the "
                 'training loss of the last epoch, E the test error; p_L = 1 is constant depth.\n',
                 '| data | budget, epochs | constant depth fits | L: p_L = 1 | 0.8 | 0.5 | E: p_L = 1 | 0.8 | 0.5 '
                 '| seeds | on |', '|---|---|---|---|---|---|---|---|---|---|---|']
        for data, runs in EFFECT.items():
            pair = numbers.TABLE1[data]
            lines.append(f'| {DATA_NAMES[data]} | paper, 110 layers, 500 epochs | | | | | {pair.constant:.2f} | '
                         f'| {pair.stochastic:.2f} | | |')
            for budget in self.budgets(runs.values()):
                found = [self.find(runs[p_last], budget) for p_last in rates]
                label = budget_label(runs[1.], budget) if epochs(*found) else ''
                fits = ''
                if found[0].losses:
                    fits = 'yes' if statistics.mean(found[0].losses) < FITS[runs[1.].augment] else 'no'
                cells = [*(cell(runs.losses, 4) for runs in found), *(cell(runs.errors) for runs in found)]
                lines.append(f'| {DATA_NAMES[data]} | {label} | {fits} | {" | ".join(cells)} | {seeds(*found)} '
                             f'| {machines(*found)} |')
        return '\n'.join(lines)

    def pairs(self, title: str, runs: dict[str, tuple[Experiment, Experiment]], errors: dict[str, numbers.Pair]) -> str:
        """Test errors at constant and stochastic depth, a row for each data set and budget."""
        lines = [f'## {title}\n',
                 '| data | paper: constant | stochastic | ours: constant | stochastic | epochs | budget | seeds | on |',
                 '|---|---|---|---|---|---|---|---|---|']
        for data, (constant, stochastic) in runs.items():
            for budget in self.budgets((constant, stochastic)):
                ours = [self.find(run, budget) for run in (constant, stochastic)]
                lines.append(f'| {DATA_NAMES[data]} | {errors[data].constant:.2f} | {errors[data].stochastic:.2f} '
                             f'| {cell(ours[0].errors)} | {cell(ours[1].errors)} | {epochs(*ours)} '
                             f'| {budget if epochs(*ours) else ""} | {seeds(*ours)} | {machines(*ours)} |')
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

    def compared(self, runs: dict[float, Experiment]) -> list[tuple[str, dict[float, Found]]]:
        """The budgets at which both p_L = 1 and 0.5 were run, the longest last: a label, and what was found by p_L."""
        by_epochs = sorted(self.budgets(runs.values()), key=lambda budget: runs[1.].epochs(budget) or 0)
        found = [(budget_label(runs[1.], budget), {p_last: self.find(run, budget) for p_last, run in runs.items()})
                 for budget in by_epochs]
        return [(label, of_budget) for label, of_budget in found if of_budget[1.].results and of_budget[0.5].results]

    def curves(self) -> str:
        """Figures 3 and 7: the last training losses and the gradients by phase; pictures of the longest runs."""
        target, pictures = numbers.FIG3, {}
        losses = ['## Figures 3 and 7: training loss, error and gradients\n',
                  'The training loss of the last epoch. Its error is the validation error, since the test images are '
                  'looked at once, when a run is finished. Drawn is the first seed of the longest runs.\n',
                  '| | constant | stochastic, p_L = 0.5 |', '|---|---|---|',
                  f'| paper, 110 layers, CIFAR-10+ | {target.constant:g} | {target.stochastic:g} |']
        gradients = ["\nMean absolute gradient of the first block's first convolution in the three phases of the "
                     'learning rate, the median of their epochs, in 1e-5.\n',
                     '| | phase | constant | stochastic, p_L = 0.5 | ratio |', '|---|---|---|---|---|']
        gradients += [f'| paper, 110 layers, CIFAR-10+ | {phase} | {pair.constant * 1e5:.3f} '
                      f'| {pair.stochastic * 1e5:.3f} | {pair.stochastic / pair.constant:.1f} |'
                      for phase, pair in enumerate(numbers.FIG7, 1)]
        groups = [('cifar10', dict(zip((1., 0.5), TABLE1['cifar10'], strict=True))), *EFFECT.items()]
        for data, runs in groups:
            for budget, found in self.compared(runs):
                label, pair = f'{runs[1.].depth} layers, {DATA_NAMES[data]}, {budget}', (found[1.], found[0.5])
                losses.append(f'| {label} | {cell(pair[0].losses, 4)} | {cell(pair[1].losses, 4)} |')
                phases = zip(*(zip(*each.gradients, strict=True) for each in pair), strict=True)
                for phase, (constant, stochastic) in enumerate(phases, 1):
                    ratio = statistics.mean(stochastic) / statistics.mean(constant)
                    gradients.append(
                        f'| {label} | {phase} | {cell(constant, 3)} | {cell(stochastic, 3)} | {ratio:.1f} |')
                pictures[f'curves-{runs[1.].depth}-{data}.png'] = label, {
                    p_last: each.rows[0] for p_last, each in found.items() if each.rows}
        for file, (_, rows) in pictures.items():
            save_curves(rows, self.folder / file)
        shown = [f'\n{label}:\n\n![training loss, validation error and gradient by epoch]({file})'
                 for file, (label, _) in pictures.items()]
        return '\n'.join([*losses, *gradients, *shown])

    def survival(self) -> str:
        """Figure 8, left: test error over p_L, by schedule."""
        lines = ['## Figure 8, left: p_L and the schedule, 110 layers on CIFAR-10+\n']
        for budget in self.budgets(FIG8_LEFT.values()):
            probabilities, label = sorted({p_last for _, p_last in FIG8_LEFT}), budget_label(Experiment(), budget)
            lines += ['| | ' + ' | '.join(f'{value:g}' for value in probabilities) + ' |',
                      '|---' * (len(probabilities) + 1) + '|']
            ours: dict[str, dict[float, float]] = {}
            for schedule, errors in numbers.FIG8_LEFT.items():
                found = {value: self.find(FIG8_LEFT[schedule, value], budget) for value in errors}
                ours[schedule] = {value: statistics.mean(runs.errors) for value, runs in found.items() if runs.errors}
                for who, cells in (('paper', {value: f'{error:.2f}' for value, error in errors.items()}),
                                   (label, {value: cell(runs.errors) for value, runs in found.items()})):
                    lines.append(f'| {who}, {schedule} | ' + ' | '.join(
                        cells.get(value, '') for value in probabilities) + ' |')
            if any(ours.values()):
                save_survival(ours, numbers.FIG8_LEFT, label, self.folder / f'fig8_left-{budget}.png')
                lines.append(f'\n![test error over p_L](fig8_left-{budget}.png)\n')
        return '\n'.join(lines)

    def depth_map(self) -> str:
        """Figure 8, right: test error over depth and p_L."""
        lines = ['## Figure 8, right: depth and p_L on CIFAR-10+, linear decay\n']
        for budget in self.budgets(FIG8_RIGHT.values()):
            label = budget_label(Experiment(), budget)
            lines += [f"The paper's / ours ({label}):\n",
                      '| p_L | ' + ' | '.join(f'{depth} layers' for depth in numbers.DEPTHS) + ' |',
                      '|---' * (len(numbers.DEPTHS) + 1) + '|']
            ours: dict[float, dict[int, float]] = {}
            for p_last, errors in numbers.FIG8_RIGHT.items():
                found = {depth: self.find(FIG8_RIGHT[depth, p_last], budget) for depth in numbers.DEPTHS}
                ours[p_last] = {depth: statistics.mean(runs.errors) for depth, runs in found.items() if runs.errors}
                lines.append(f'| {p_last:g} | ' + ' | '.join(
                    f'{errors[depth]:.2f} / {cell(found[depth].errors)}' for depth in numbers.DEPTHS) + ' |')
            if any(ours.values()):
                save_map(numbers.FIG8_RIGHT, ours, label, self.folder / f'fig8_right-{budget}.png')
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
        for budget in self.budgets(BY_MODE.values()):
            for name, run in [('nothing', constant), ('batch', stochastic), *BY_MODE.items()]:
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
        parts = ['# Reproduction', self.summary(), HOW, self.effect(),
                 self.pairs('Table 1: test error', TABLE1, numbers.TABLE1), self.table2(), self.curves(),
                 self.survival(), self.depth_map(),
                 self.pairs('1202 layers', {'cifar10': DEPTH1202}, {'cifar10': numbers.DEPTH1202}), self.modes()]
        notes = self.folder / 'notes.md'  # what a person has to say of the results
        if notes.exists():
            parts.append(notes.read_text())
        path = self.folder / 'REPRODUCTION.md'
        write_atomic(path, ('\n\n'.join(part.strip() for part in parts) + '\n').encode())
        return path
