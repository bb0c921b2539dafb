"""The kept runs, found by what they were trained by, and what the report says of them in a cell."""
import json
import statistics
from collections.abc import Iterable, Sequence
from itertools import dropwhile, groupby
from pathlib import Path
from typing import Any, NamedTuple

from scipy.stats import ttest_ind

from harness.errors import UserError
from harness.machine import precision as name_of_precision
from harness.run_folder import RunFolder
from paper.experiments import BUDGETS, FITS, Experiment, training_of_experiment, training_of_run


def precision(hardware: dict[str, Any]) -> str:
    """Of a run, or of timed steps."""
    return name_of_precision(hardware['amp'], hardware.get('amp_dtype', 'bfloat16'))


def has_all_cores(hardware: dict[str, Any]) -> bool:
    """Whether a run says that it had all cores of its machine. With `--processes` it has a part of them."""
    return 'cores' in hardware and hardware['threads'] * hardware['processes'] >= hardware['cores']


class Found(NamedTuple):
    """The finished runs of one experiment and budget, by seed: results.json, and the rows of summary.csv."""
    results: list[dict[str, Any]]
    rows: list[list[dict[str, float]]]

    @property
    def errors(self) -> list[float]:
        """Test errors, in percent."""
        return [results['test_best']['top1_err'] for results in self.results]

    @property
    def losses(self) -> list[float]:
        """Training losses of the last epoch."""
        return [rows[-1]['train_loss'] for rows in self.rows]

    @property
    def seconds(self) -> list[float]:
        """Seconds of an epoch's steps; none where a run had a part of the cores, or they were on several machines."""
        hardware = [results['hardware'] for results in self.results]
        comparable = all(map(has_all_cores, hardware)) and len(set(map(_place, hardware))) == 1
        return [results['epoch_seconds'] for results in self.results] if comparable else []

    @property
    def precisions(self) -> list[str]:
        """In which each seed was trained."""
        return [precision(results['hardware']) for results in self.results]

    @property
    def gradients(self) -> list[list[float]]:
        """Of each run `gradient_phases`.

        Raises:
            UserError: If a run did not log its gradients.
        """
        for run, rows in zip(*self, strict=True):
            if 'grad_magnitude' not in rows[0]:
                raise UserError(f'summary.csv of {run["model"]}, drop_path {run["drop_path_rate"]}, seed '
                                f'{run["seed"]}, lacks grad_magnitude for Figure 7; train it again with '
                                '--log-gradients')
        return [gradient_phases(rows) for rows in self.rows]


class KeptRuns:
    """The runs of a folder of run folders.

    Args:
        folder: Of the run folders, whatever their names.

    Raises:
        UserError: If two runs are the same, or one can't be read.
    """

    def __init__(self, folder: Path) -> None:
        # By training and seed: results.json, the rows of summary.csv, the folder's name.
        self.runs: dict[str, dict[int, tuple[dict[str, Any], list[dict[str, float]], str]]] = {}
        for path in sorted(folder.glob('*/results.json')):
            run = RunFolder(path.parent).read_run()
            if run is None:  # a link to nothing
                continue
            results, rows = run
            by_seed = self.runs.setdefault(_key(training_of_run(results)), {})
            if results['seed'] in by_seed:
                raise UserError(f'{path.parent} is a second run of the same flags and seed; remove one of the two')
            by_seed[results['seed']] = results, rows, path.parent.name

    def find(self, experiment: Experiment, budget: str) -> Found:
        """The finished runs of an experiment."""
        if experiment.epochs(budget) is None:
            return Found([], [])
        by_seed = self.runs.get(_key(training_of_experiment(experiment, budget)), {})
        runs = [by_seed[seed] for seed in sorted(by_seed)]
        return Found([results for results, _, _ in runs], [rows for _, rows, _ in runs])

    def names_of_no(self, experiments: Iterable[Experiment]) -> list[str]:
        """The folders of the runs that are of none of these experiments, at no budget."""
        keys = {_key(training_of_experiment(experiment, budget)) for experiment in experiments for budget in BUDGETS
                if experiment.epochs(budget) is not None}
        return sorted(name for key, by_seed in self.runs.items() if key not in keys
                      for _, _, name in by_seed.values())

    def budgets(self, experiments: Iterable[Experiment]) -> list[str]:
        """The budgets that some of them were run at."""
        experiments = list(experiments)
        return [budget for budget in BUDGETS
                if any(self.find(experiment, budget).results for experiment in experiments)]


def _key(training: dict[str, Any]) -> str:
    return json.dumps(training, sort_keys=True)


def _place(hardware: dict[str, Any]) -> tuple[Any, ...]:
    """What times have to share to be compared."""
    return tuple(hardware.get(key) or False  # older runs lack the last
                 for key in ('device', 'amp', 'processes', 'threads', 'cuda_graphs'))


def fits(constant: Found, run: Experiment) -> bool:
    """Whether constant depth fits its training images, with each seed."""
    return max(constant.losses) < FITS[run.augment]


def verdict(constant: Found, stochastic: Found) -> str:
    """Whether stochastic depth has the lower test error by more than the chance of seeds, by Student's t-test.

    It is about these test images, which all seeds share. One seed is not judged.
    """
    gain = statistics.mean(constant.errors) - statistics.mean(stochastic.errors)
    difference = f'{abs(gain):.2f} {"lower" if gain > 0 else "higher"}'
    if min(len(constant.errors), len(stochastic.errors)) == 1:
        return f'one seed, not judged: {difference}'
    low, high = ttest_ind(constant.errors, stochastic.errors).confidence_interval(0.95)
    said = 'reproduced' if low > 0 else 'not reproduced' if high < 0 else 'not decided by these seeds'
    said = f'{said}: {difference}, 95 % interval ± {(high - low) / 2:.2f}'
    several = len({*constant.precisions, *stochastic.precisions}) > 1
    if several and sorted(constant.precisions) != sorted(stochastic.precisions):
        said += f'; seeds in {", ".join(constant.precisions)} against seeds in {", ".join(stochastic.precisions)}'
    return said


def cell(values: Sequence[float], digits: int = 2) -> str:
    """Mean, and of several the standard deviation and their number; nothing of nothing."""
    spread = f' ± {statistics.stdev(values):.{digits}f} ({len(values)})' if len(values) > 1 else ''
    return f'{statistics.mean(values):.{digits}f}{spread}' if values else ''


def machine(hardware: dict[str, Any]) -> str:
    """The device and the precision."""
    return f'{hardware["device"]}, {precision(hardware)}'


def machines(*found: Found) -> str:
    """What these runs were made on."""
    return '; '.join(sorted({machine(results['hardware']) for runs in found for results in runs.results}))


def time_ratio(ours: Found, base: Found) -> str:
    """Ratio of the seconds an epoch, if all runs had the same machine to themselves; else nothing."""
    both = Found(ours.results + base.results, [])
    if not (ours.seconds and base.seconds and both.seconds):
        return ''
    return f'{statistics.mean(ours.seconds) / statistics.mean(base.seconds):.3f}'


def epochs_and_budget(budget: str, *found: Found) -> str:
    """Two cells: the epochs of these runs, which are of one budget, and its name; empty where nothing was run."""
    epochs = sorted({str(results['epochs']) for runs in found for results in runs.results})
    return f'{", ".join(epochs)} | {budget if epochs else ""}'


def seeds(*found: Found) -> str:
    """Number of seeds of each; nothing where nothing was run."""
    return ', '.join(str(len(runs.results)) for runs in found) if any(runs.results for runs in found) else ''


def gradient_phases(rows: list[dict[str, float]]) -> list[float]:
    """Mean absolute gradient of a run while the learning rate stays the same, in 1e-5, without a warm-up.

    The median over the epochs: in a short phase the first epoch, of untrained weights, would be most of the mean.
    """
    highest = max(row['lr'] for row in rows)
    phases = groupby(dropwhile(lambda row: row['lr'] < highest, rows), key=lambda row: row['lr'])
    return [statistics.median(row['grad_magnitude'] for row in phase) * 1e5 for _, phase in phases]
