"""The reproduction report: the paper's tables and figures with ours beside them, from the results of finished runs.

A figure is the test error at the epoch of the lowest validation error, in percent, and the mean over seeds with its
standard deviation where there are several. What was not run is an empty cell.
"""
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from harness.files import make_folder, write_atomic
from harness.recipes import read_recipe
from paper import numbers
from paper.beyond import depth_after_training, over_time
from paper.experiments import (
    BY_MODE,
    DEPTH1202,
    EFFECT,
    FIG8_LEFT,
    FIG8_RIGHT,
    FITS,
    PAPER,
    TABLE1,
    TARGETS,
    Experiment,
)
from paper.figures import save_curves, save_map, save_survival
from paper.kept import Found, KeptRuns, cell, epochs_and_budget, fits, machine, machines, seeds, time_ratio, verdict

# The hardware that steps were timed on, and the ratios to constant depth's step: of each mode at scale `train`, and of
# the paper's training.
StepTimes = tuple[dict[str, Any], dict[str, dict[str, float]]]
DATA_NAMES = {'cifar10': 'CIFAR-10+', 'cifar100': 'CIFAR-100+', 'svhn': 'SVHN', 'imagenet': 'ImageNet, top-1',
              'cifar10_unaugmented': 'CIFAR-10', 'cifar100_unaugmented': 'CIFAR-100'}
HOW = f"""A difference of test errors counts where its 95 % interval, by Student's t-test over the seeds, leaves out 0.
An interval that holds 0 does not say that there is no difference: it takes more seeds to tell. All this is about these
test images, which all seeds share. One seed is not judged: it doesn't show how far seeds differ.
Where constant depth does not fit its training images, a regulariser can't be judged: a fit is a training loss below
{FITS[False]} in the last epoch of each seed, or {FITS[True]} with augmentation. A step takes less time where it does so
in three of four turns.

Written by `python bench/reproduce.py report` from [runs/](../runs), the results.json and summary.csv of each finished
run. A figure is the test error (%) at the epoch of the lowest validation error (of ImageNet, at the last epoch): of one
seed, or the mean over several with its standard deviation and their number. The cell of what was not run is empty. A
`+` is with augmentation.

Budgets: `full` is the paper's epochs. `fitted` is the paper's recipe with a first epoch at a learning rate of 0.01 and
its learning rate steps in proportion, in as many epochs as 38 layers at constant depth should need to fit (the column
"p_L = 1 fits" says whether they do). `twice` has twice as many, since stochastic depth learns more slowly. `smoke`
tries the machinery on handwritten digits and says nothing about the paper."""
NOT_RUN = 'not run yet: a pair takes hours on a CPU'
NOT_YET = 'not yet: on a CPU most take days, and the images of SVHN and ImageNet were not at hand'


def budget_label(run: Experiment, budget: str) -> str:
    """A budget with its epochs, for the head of a row."""
    return f'{budget}, {run.epochs(budget)} epochs'


class Report:
    """Writes REPRODUCTION.md with its pictures beside it.

    Args:
        results: Holds runs/, and reproduction/ for the report, with notes.md if there is something to say of the runs.
        step_times: Of each mode, one for each machine; see `StepTimes`.
    """

    def __init__(self, results: Path, step_times: Sequence[StepTimes] = ()) -> None:
        self.folder, self.times, self.kept = results / 'reproduction', step_times, KeptRuns(results / 'runs')
        self.find, self.budgets = self.kept.find, self.kept.budgets

    def budgets_or_full(self, experiments: Iterable[Experiment]) -> list[str]:
        """The budgets that some of them were run at; `full` if there are none, for its empty cells."""
        return self.budgets(experiments) or ['full']

    def summary(self) -> str:
        """What was reproduced, what was not yet, and why."""
        lines = ['| from constant to stochastic depth | the paper | ours | what ours says |', '|---|---|---|---|']
        for data, runs in EFFECT.items():
            beside = numbers.BESIDE_38[data]
            head = (f'| test error (%), {DATA_NAMES[data]}, p_L = {beside.p_last} | {beside.errors[1.]:.2f} to '
                    f'{beside.errors[beside.p_last]:.2f}, {beside.where}')
            compared = self.compared(runs, beside.p_last)
            if not compared:
                lines.append(f'{head} |  | {NOT_RUN} |')
            for budget, found in compared:
                constant, stochastic = found[1.], found[beside.p_last]
                said = verdict(constant, stochastic) if fits(constant, runs[1.]) else (
                    f'says nothing: constant depth does not fit, training loss {cell(constant.losses, 3)}')
                lines.append(f'{head} | {cell(constant.errors)} to {cell(stochastic.errors)}, 38 layers, '
                             f'{budget_label(runs[1.], budget)} | {said} |')
        hours = numbers.TABLE2['cifar10']
        lines.append("| time, constant depth's = 1, 110 layers, p_L = 0.5 "
                     f'| {hours.stochastic / hours.constant:.2f} for the training, Table 2 '
                     f'| {" | ".join(self.time_saved())} |')
        done = sum(bool(self.find(run, 'full').results) for run in PAPER)
        lines.append(f'| all trainings of Tables 1 and 2, Figures 3, 7 and 8 and 1202 layers | {len(PAPER)}, of 50 to '
                     f'500 epochs | {done} | {"done" if done == len(PAPER) else NOT_YET} |')
        return '\n'.join(lines)

    def time_saved(self) -> tuple[str, str]:
        """Ratios of the paper's step to constant depth's on each machine, and whether it takes less time."""
        ratios: dict[str, list[dict[str, float]]] = {}
        for hardware, timed in self.times:
            for name in timed.keys() & {'batch', 'paper'}:  # both scales drop the same blocks
                ratios.setdefault(machine(hardware), []).append(timed[name])
        medians = {where: sorted(f'{ratio["median"]:.2f}' for ratio in found) for where, found in ratios.items()}
        steps = '; '.join(f'{" to ".join(dict.fromkeys((found[0], found[-1])))} on {where}'
                          for where, found in sorted(medians.items()))
        slow = ', '.join(sorted(where for where, found in ratios.items() if any(ratio['q3'] >= 1 for ratio in found)))
        if not steps:
            return '', 'not measured'
        return f'for a step: {steps}', 'less time' + (f'; not in every measurement on {slow}' if slow else '')

    def effect(self) -> str:
        """Test errors of 38 layers, and whether constant depth fits."""
        rates = (1., 0.8, 0.5)
        lines = ['## 38 layers, which a CPU can train\n',
                 "The paper trained for 500 epochs, and without augmentation 110 layers: these smaller trainings don't "
                 'repeat its tables. p_L = 1 is constant depth. Training losses are those of the last epoch, taken '
                 'while blocks are dropped where p_L is below 1.\n',
                 '| data | whose | training loss, p_L = 1 | 0.8 | 0.5 | p_L = 1 fits | test error, p_L = 1 | 0.8 | 0.5 '
                 '| seeds | on |', '|---|---|---|---|---|---|---|---|---|---|---|']
        for data, runs in EFFECT.items():
            beside = numbers.BESIDE_38[data]
            errors = [f'{beside.errors[p_last]:.2f}' if p_last in beside.errors else '' for p_last in rates]
            lines.append(f'| {DATA_NAMES[data]} | paper, {beside.where} | | | | | {" | ".join(errors)} | | |')
            for budget in self.budgets(runs.values()):
                found = [self.find(runs[p_last], budget) for p_last in rates]
                fit = '' if budget == 'smoke' or not found[0].losses else 'yes' if fits(found[0], runs[1.]) else 'no'
                cells = [*(cell(each.losses, 4) for each in found), fit, *(cell(each.errors) for each in found)]
                lines.append(f'| {DATA_NAMES[data]} | {budget_label(runs[1.], budget)} | {" | ".join(cells)} '
                             f'| {seeds(*found)} | {machines(*found)} |')
        return '\n'.join(lines)

    def pairs(self, title: str, runs: dict[str, tuple[Experiment, Experiment]], errors: dict[str, numbers.Pair]) -> str:
        """Test errors at constant and stochastic depth, a row for each data set and budget."""
        lines = [f'## {title}\n',
                 '| data | paper: constant | stochastic | ours: constant | stochastic | epochs | budget | seeds | on |',
                 '|---|---|---|---|---|---|---|---|---|']
        for data, (constant, stochastic) in runs.items():
            for budget in self.budgets_or_full((constant, stochastic)):
                ours = [self.find(run, budget) for run in (constant, stochastic)]
                lines.append(f'| {DATA_NAMES[data]} | {errors[data].constant:.2f} | {errors[data].stochastic:.2f} '
                             f'| {cell(ours[0].errors)} | {cell(ours[1].errors)} | {epochs_and_budget(budget, *ours)} '
                             f'| {seeds(*ours)} | {machines(*ours)} |')
        return '\n'.join(lines)

    def table2(self) -> str:
        """Training time."""
        lines = ['## Table 2: training time\n',
                 "The paper's are hours of the whole training, ours seconds of an epoch's steps (the median). The cell "
                 'is empty where a run had a part of the cores, or the runs had several machines. Steps timed in turns '
                 'are in [bench/README.md](../../README.md).\n',
                 '| data | paper: constant | stochastic | ratio '
                 '| ours: constant | stochastic | ratio | epochs | budget | on |',
                 '|---|---|---|---|---|---|---|---|---|---|']
        for data, hours in numbers.TABLE2.items():
            for budget in self.budgets_or_full(TABLE1[data]):
                constant, stochastic = (self.find(run, budget) for run in TABLE1[data])
                lines.append(f'| {DATA_NAMES[data]} | {hours.constant:.1f} h | {hours.stochastic:.1f} h '
                             f'| {hours.stochastic / hours.constant:.3f} | {cell(constant.seconds, 0)} '
                             f'| {cell(stochastic.seconds, 0)} | {time_ratio(stochastic, constant)} '
                             f'| {epochs_and_budget(budget, constant, stochastic)} '
                             f'| {machines(constant, stochastic)} |')
        return '\n'.join(lines)

    def compared(self, runs: dict[float, Experiment], p_last: float) -> list[tuple[str, dict[float, Found]]]:
        """The budgets at which both p_L = 1 and another were run, the longest last, with the runs by p_L."""
        budgets = sorted((budget for budget in self.budgets(runs.values()) if budget != 'smoke'),
                         key=lambda budget: runs[1.].epochs(budget) or 0)
        found = [(budget, {value: self.find(run, budget) for value, run in runs.items()}) for budget in budgets]
        return [(budget, by_rate) for budget, by_rate in found if by_rate[1.].results and by_rate[p_last].results]

    def curves(self) -> str:
        """Figures 3 and 7: the last training losses and the gradients by phase; pictures of the longest runs."""
        target, pictures = numbers.FIG3, {}
        losses = ['## Figures 3 and 7: training loss, error and gradients\n',
                  'The training loss of the last epoch. The pictures show one seed of the longest runs, and validation '
                  'errors, since the test images are looked at once, when a run is finished.\n',
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
            for budget, found in self.compared(runs, 0.5):
                label = f'{runs[1.].depth} layers, {DATA_NAMES[data]}, {budget_label(runs[1.], budget)}'
                pair = found[1.], found[0.5]
                losses.append(f'| {label} | {cell(pair[0].losses, 4)} | {cell(pair[1].losses, 4)} |')
                magnitudes = {p_last: each.gradients for p_last, each in found.items()}
                phases = zip(*(zip(*magnitudes[p_last], strict=True) for p_last in (1., 0.5)), strict=True)
                for phase, (constant, stochastic) in enumerate(phases, 1):
                    ratio = statistics.mean(stochastic) / statistics.mean(constant)
                    gradients.append(
                        f'| {label} | {phase} | {cell(constant, 3)} | {cell(stochastic, 3)} | {ratio:.1f} |')
                by_seed = {p_last: {results['seed']: rows for results, rows in zip(*each, strict=True)}
                           for p_last, each in found.items()}
                shared = by_seed[1.].keys() & by_seed[0.5].keys()
                if shared:
                    seed, stem = min(shared), f'curves-{runs[1.].depth}-{data}'
                    pictures[stem] = f'{stem}-{budget}-{seed}.png', f'{label}, seed {seed}', {
                        p_last: rows[seed] for p_last, rows in by_seed.items() if seed in rows}
        for file, title, rows in pictures.values():
            save_curves(rows, title, self.folder / file)
        shown = [f'\n![{title}: training loss, validation error and gradient by epoch]({file})'
                 for file, title, _ in pictures.values()]
        return '\n'.join([*losses, *gradients, *shown])

    def survival(self) -> str:
        """Figure 8, left: test error over p_L, by schedule."""
        lines = ['## Figure 8, left: p_L and the schedule, 110 layers on CIFAR-10+\n']
        for budget in self.budgets_or_full(FIG8_LEFT.values()):
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
        for budget in self.budgets_or_full(FIG8_RIGHT.values()):
            label = budget_label(FIG8_RIGHT[38, 1.], budget)  # the only layers of all budgets
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
                 'random samples (DINOv2). Scale `eval` trains as the paper does, `train` as timm does '
                 '([README](../../../README.md)).\n',
                 '| dropped | scale | learning rate | test error | epochs | budget | seeds | on |',
                 '|---|---|---|---|---|---|---|---|']
        for budget in self.budgets_or_full(BY_MODE.values()):
            for name, run in [('nothing', constant), ('batch', stochastic), *BY_MODE.items()]:
                found = self.find(run, budget)
                lines.append(f'| {name} | {run.scale if run.drop_path else ""} | {run.lr or rate} '
                             f'| {cell(found.errors)} | {epochs_and_budget(budget, found)} | {seeds(found)} '
                             f'| {machines(found)} |')
        return '\n'.join([*lines, self.step_times()])

    def step_times(self) -> str:
        """What a step of each way takes, a row for each machine that throughput.py measured them on."""
        rows = []
        for hardware, ratios in self.times:
            cells = ['{median:.2f} ({q1:.2f} to {q3:.2f})'.format(**ratios[mode]) if mode in ratios else ''
                     for mode in BY_MODE]
            if any(cells[1:]):  # batch was timed beside another
                rows.append(f'| {machine(hardware)} | {" | ".join(cells)} |')
        head = ['\nSteps of scale `train` timed in turns, in those of constant depth: the median and the quartiles of '
                'each measurement.\n',
                f'| on | {" | ".join(BY_MODE)} |', '|---' * (len(BY_MODE) + 1) + '|']
        return '\n'.join([*head, *rows]) if rows else ''

    def write(self) -> Path:
        """Writes everything; returns the path of REPRODUCTION.md."""
        make_folder(self.folder, '--results')
        parts = ['# Reproduction', self.summary(), HOW, self.effect(),
                 self.pairs('Table 1: test error', TABLE1, numbers.TABLE1), self.table2(), self.curves(),
                 self.survival(), self.depth_map(),
                 self.pairs('1202 layers', {'cifar10': DEPTH1202}, {'cifar10': numbers.DEPTH1202}), self.modes(),
                 over_time(self.kept, self.folder), depth_after_training(self.kept, self.folder)]
        others = self.kept.names_of_no([run for runs in TARGETS.values() for run in runs])
        if others:
            parts.append(f'## In no table\n\nKept runs of other flags, epochs or data than these: {", ".join(others)}.')
        notes = self.folder / 'notes.md'  # what a person has to say of the results
        if notes.exists():
            parts.append(notes.read_text())
        path = self.folder / 'REPRODUCTION.md'
        write_atomic(path, ('\n\n'.join(part.strip() for part in parts if part) + '\n').encode())
        return path
