"""The trainings of a table or figure: which ones, how far they are, and training what isn't complete."""
import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from harness.cli import KEY_VALUES, drop_rate, flag, positive_int
from harness.errors import UserError, one_line, user_errors
from harness.files import make_folder, write_atomic
from harness.machine import cores
from harness.paths import RESULTS, TRAIN
from harness.results import without_paths
from harness.run_folder import RunFolder
from paper.experiments import BUDGETS, TARGETS, TIMES_FITTED, Experiment, training_of_experiment, training_of_run


@dataclass(frozen=True)
class ChoiceSettings:
    """Which runs."""
    budget: str = flag('full', "full: the recipe's epochs; fitted: about as many as 38 layers at constant depth need "
                               'to fit; twice: twice that; smoke: a trial on digits', choices=BUDGETS)
    seeds: list[int] = flag([0], 'a run for each', type=int, nargs='+', metavar='SEED')
    data: Path | None = flag(None, 'holds cifar10/, svhn/ ... (default: the Hub)', type=Path, metavar='FOLDER')
    recipe: list[str] | None = flag(None, 'only these recipes', nargs='+',
                                    choices=sorted({run.recipe for runs in TARGETS.values() for run in runs}))
    depth: list[int] | None = flag(None, 'only these depths', type=positive_int, nargs='+')
    drop_path: list[float] | None = flag(None, 'only these 1 - p_L', type=drop_rate, nargs='+')
    augment: bool | None = flag(None, 'only with augmentation, or without', action=argparse.BooleanOptionalAction)


@dataclass(frozen=True)
class RunSettings:
    """How they are run, and where."""
    processes: int = flag(1, 'runs at the same time on one device, each on its part of the cores', type=positive_int,
                          metavar='N')
    cluster: str | None = flag(None, "submitit's name of a cluster: slurm, or local to try it here, all at once")
    cluster_options: dict[str, Any] = flag({}, "submitit's, such as timeout_min=1440 slurm_partition=gpu "
                                           'gpus_per_node=1', **KEY_VALUES)
    amp: bool | None = flag(None, "train.py's: all runs in bf16 autocast, or none (default: each as is faster there)",
                            action=argparse.BooleanOptionalAction)
    grad_checkpointing: bool = flag(False, "train.py's, where 1202 layers don't fit")
    cuda_graphs: bool = flag(False, "train.py's, with what else keeps a GPU from waiting (not yet run on one)")
    output: str = flag('output/reproduce', 'folder of the run folders')
    results: str | None = flag(None, 'folder of the report, and of what it is made from (default: results/ beside this '
                                     'script, for the budget smoke --output)')


class Run(NamedTuple):
    """One training.

    Attributes:
        experiment: What is trained.
        budget: For how long, see `BUDGETS`.
        seed: Of the run.
        output: Folder of the run folders while they train.
        results: Folder of the results of complete runs.
    """
    experiment: Experiment
    budget: str
    seed: int
    output: Path
    results: Path

    @property
    def name(self) -> str:
        return self.experiment.name(self.budget, self.seed)

    @property
    def epochs(self) -> int:
        epochs = self.experiment.epochs(self.budget)
        assert epochs is not None  # `choose_runs` refuses the others
        return epochs

    @property
    def is_complete(self) -> bool:
        return self.read_results(self.results) is not None

    def read_results(self, place: Path) -> dict[str, Any] | None:
        """The run's results.json in a folder of run folders; None before it is complete.

        Raises:
            UserError: If it can't be read, or is that of another training: the report would not take it for this one.
        """
        folder = RunFolder(place / self.name)
        results = folder.read_results()
        if results is None:
            return None
        expected = dict(training_of_experiment(self.experiment, self.budget), seed=self.seed)
        found = dict(training_of_run(results), seed=results['seed'])
        if found['dataset'] != expected['dataset']:
            raise UserError(f'{folder.path} was trained on {found["dataset"]!r}, which is no copy of '
                            f'{expected["dataset"]} that the recipe knows; see --fingerprint of train.py, or take the '
                            'data from the Hub')
        the_recipes = "the recipe's"
        differing = [f'{key} {found.get(key, the_recipes)} instead of {expected.get(key, the_recipes)}'
                     for key in {**expected, **found} if found.get(key) != expected.get(key)]
        if differing:
            raise UserError(f'{folder.path} is no run of budget {self.budget}: it has {", ".join(differing)}; '
                            'move it elsewhere')
        return results

    def is_recorded(self, settings: RunSettings) -> bool:
        """Whether its steps become CUDA graphs: where --cuda-graphs asks for it, and it can be."""
        return settings.cuda_graphs and self.experiment.mode == 'batch' and self.experiment.recipe != 'imagenet'

    def epochs_done(self) -> int:
        """Rows of the run's summary.csv; after a kill some may be trained again, see --checkpoint-interval.

        Raises:
            UserError: See `read_results`.
        """
        for place in (self.results, self.output):
            self.read_results(place)
        return max(RunFolder(place / self.name).epochs_written() for place in (self.results, self.output))

    def copy_results(self) -> None:
        """Copies what the report reads, if the training is complete; see `read_results`."""
        folder, copy = self.output / self.name, self.results / self.name
        results = self.read_results(self.output)
        if results is not None:
            RunFolder(folder).read_run()  # is it whole?
            make_folder(copy, '--results')
            write_atomic(copy / 'summary.csv', (folder / 'summary.csv').read_bytes())
            RunFolder(copy).write_results(without_paths(results))  # last: it marks the copy as complete

    def command(self, data: Path | None, threads: int | None, settings: RunSettings) -> list[str]:
        """The command line that trains it, or goes on with it.

        Args:
            data: Folder that holds local copies of the data sets, or None for the Hub.
            threads: CPU threads, or None for all that there are.
            settings: Of all runs.
        """
        line = [sys.executable, TRAIN, *self.experiment.flags(self.budget, self.seed, data), '--output',
                str(self.output), '--experiment', self.name, '--resume', 'auto']
        if threads is not None:
            line += ['--threads', str(threads)]
        if settings.amp is not None:
            line.append('--amp' if settings.amp else '--no-amp')
        if self.is_recorded(settings):
            line += ['--cuda-graphs', '--validation-batch-size', '1000', '--checkpoint-interval', '10']
        return line + ['--grad-checkpointing'] * settings.grad_checkpointing


def results_folder(settings: RunSettings, budget: str) -> Path:
    """--results, or its default."""
    return Path(settings.results or (settings.output if budget == 'smoke' else RESULTS))


def choose_runs(target: str, choice: ChoiceSettings, settings: RunSettings) -> list[Run]:
    """The runs that the flags name.

    Raises:
        UserError: If one of them isn't there, or its data, or the target doesn't have the budget.
    """
    if choice.budget in TIMES_FITTED and target != 'effect':
        raise UserError(f'--budget {choice.budget} has epochs for the 38 layers of effect alone; choose effect, or '
                        'another budget')
    if settings.cuda_graphs and settings.grad_checkpointing:
        raise UserError('--cuda-graphs can not record --grad-checkpointing; leave out one of them')
    experiments = list(dict.fromkeys(TARGETS[target]))
    given = {key: getattr(choice, key) for key in ('recipe', 'depth', 'drop_path', 'augment')}
    filters = {key: values if isinstance(values, list) else [values]
               for key, values in given.items() if values is not None}
    for key, values in filters.items():
        available = sorted({getattr(experiment, key) for experiment in experiments})
        for value in values:
            if value not in available:
                raise UserError(f'{target} has no run of --{key.replace("_", "-")} {value}; '
                                f'it has {" ".join(map(str, available))}')
    chosen = [experiment for experiment in experiments
              if all(getattr(experiment, key) in values for key, values in filters.items())]
    if not chosen:
        raise UserError(f'{target} has no run that is of {" and ".join(map(str, filters.values()))} at once')
    if choice.data is not None and choice.budget != 'smoke':
        missing = sorted({experiment.data for experiment in chosen if not (choice.data / experiment.data).is_dir()})
        if missing:
            raise UserError(f'--data {choice.data} lacks {", ".join(missing)}; choose what is there with --recipe')
    output, results = Path(settings.output), results_folder(settings, choice.budget) / 'runs'
    return [Run(experiment, choice.budget, seed, output, results)
            for experiment in chosen for seed in dict.fromkeys(choice.seeds)]


def make_executor(settings: RunSettings) -> tuple[Any, int | None]:
    """What the runs are handed to, and the threads of each; None where a cluster's node says how many."""
    if settings.cluster is None:
        return ThreadPoolExecutor(settings.processes), max(1, cores() // settings.processes)
    if settings.processes > 1:
        raise UserError(f'--processes {settings.processes} is for this machine; how many runs of --cluster '
                        f'{settings.cluster} go on at a time is up to it')
    try:
        import submitit
    except ImportError as error:
        raise UserError("--cluster wants submitit; install it with: pip install -e '.[cluster]'") from error
    try:
        executor = submitit.AutoExecutor(Path(settings.output, 'submitit'), cluster=settings.cluster)
        executor.update_parameters(**{'name': 'timm-sd', 'timeout_min': 24 * 60, **settings.cluster_options})
    except Exception as error:  # submitit raises many kinds: a wrong option, no such cluster
        raise UserError(f'--cluster {settings.cluster}: {one_line(error, 200)}') from error
    return executor, None


class Children:
    """Trainings in processes of their own. They end with this one, unless it is killed: then they go on."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[Any]] = []
        self.stopped = False

    def run(self, line: list[str], **kwargs: Any) -> None:
        """`subprocess.run` with check=True."""
        with subprocess.Popen(line, **kwargs) as process:
            self.processes.append(process)
            if self.stopped:
                process.terminate()
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, line)

    def stop(self) -> None:
        """Ends those that go on, and those that begin meanwhile; each has its checkpoint."""
        self.stopped = True
        for process in self.processes:
            process.terminate()


def failure_reason(error: Exception, log: str | None) -> str:
    """Why a run failed, in one line: train.py's error, else the last line of its log, else the executor's error."""
    lines = [line for line in (log or '').splitlines() if line.strip()]
    if not lines and isinstance(error, subprocess.CalledProcessError):  # its text is the whole command line
        return f'exit status {error.returncode}'
    return next((line for line in reversed(lines) if 'error: ' in line), lines[-1] if lines else str(error))


def train(runs: list[Run], data: Path | None, settings: RunSettings) -> None:
    """Trains what isn't complete, each run from its last checkpoint.

    Args:
        runs: Of one `choose_runs`.
        data: Folder that holds local copies of the data sets, or None for the Hub.
        settings: How they are run.

    Raises:
        UserError: If some fail; the others go on meanwhile.
    """
    make_folder(runs[0].results, '--results')
    make_folder(runs[0].output, '--output')
    for run in runs:
        if not run.is_complete:
            run.copy_results()  # a kill may have come between its end and the copy
    left = [run for run in runs if not run.is_complete]
    executor, threads = make_executor(settings)
    logs: dict[Run, Path] = {}
    if settings.cluster is None and settings.processes > 1:  # one run by itself shows its progress bar instead
        logs = {run: run.output / f'{run.name}.log' for run in left}
    jobs: dict[Run, Any] = {}
    failed: list[str] = []
    children = Children()
    start = partial(subprocess.run, check=True) if settings.cluster else children.run
    with ExitStack() as stack:
        stack.callback(children.stop)
        try:
            for run in left:
                # Into files: a pipe would end a training when this process is killed.
                stderr = stack.enter_context(logs[run].open('w')) if logs else None
                line = run.command(data, threads, settings)
                with user_errors(f'--cluster {settings.cluster}'):  # submitit's: no such partition
                    jobs[run] = executor.submit(start, line, stdout=subprocess.DEVNULL, stderr=stderr)
            for run, job in tqdm(jobs.items(), unit='run', desc=f'{len(runs) - len(left)} of {len(runs)} done before'):
                try:
                    job.result()
                    run.copy_results()
                except UserError as error:
                    failed.append(f'{run.name}: {error}')
                except Exception as error:  # a training's, or submitit's
                    log = job.stderr() if settings.cluster else logs[run].read_text() if logs else None
                    failed.append(f'{run.name}: {failure_reason(error, log)}')
        finally:
            for job in jobs.values():
                if not job.done():
                    job.cancel()
    if failed:
        raise UserError(f'{len(failed)} of {len(left)} runs failed; {"; ".join(failed)}')
