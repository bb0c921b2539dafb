"""Re-runs the paper: one command a table or figure, resumable, and a report of what was run.

    python bench/reproduce.py table1 --recipe cifar10 --budget short --data FOLDER  # trains what is missing
    python bench/reproduce.py fig8_right --depth 20 38 --plan    # lists it, with an estimate of the time
    python bench/reproduce.py all --cluster slurm                # hands it to a cluster (submitit)
    python bench/reproduce.py report                             # writes REPRODUCTION.md and its pictures

A run that is complete is not started again, a half-done one goes on from its last checkpoint: after a kill, run the
same line again. The report is made from each finished run's results.json and summary.csv, copied to results/runs/.
"""
import argparse
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tqdm import tqdm

import timm_sd
from config import Parser, UserError, add_key_values, cores, count, parse, rate, run, user_errors
from contestants import Contestant, Entry, build
from experiments import BUDGETS, TARGETS, Experiment
from report import Report
from run_folder import RunFolder, without_paths, write_atomic

TRAIN = str(Path(__file__).parent / 'train.py')
# of each data set, in training, and validated in an epoch: of SVHN 24 times; digits of 16 px cost a quarter
IMAGES = dict(digits=(1297 / 4, 140 / 4), cifar10=(45000, 5000), cifar100=(45000, 5000), svhn=(598388, 24 * 6000))


def reproduce_parser() -> Parser:
    """The flags."""
    parser = Parser("Re-runs the paper's tables and figures.")
    parser.add_argument('target', choices=[*TARGETS, 'report'], help='table or figure; report writes REPRODUCTION.md')
    parser.add_argument('--budget', choices=BUDGETS, default='full', help="the paper's epochs, or less")
    parser.add_argument('--seeds', type=int, nargs='+', default=[0], metavar='SEED', help='a run for each')
    parser.add_argument('--data', type=Path, metavar='FOLDER', help='holds cifar10/, svhn/ ... (default: the Hub)')
    parser.add_argument('--recipe', choices=BUDGETS['full'], nargs='+', help='only these data sets')
    parser.add_argument('--depth', type=count, nargs='+', help='only these depths')
    parser.add_argument('--drop-path', type=rate, nargs='+', help='only these 1 - p_L')
    parser.add_argument('--processes', type=count, default=1, metavar='N',
                        help='runs at the same time on one device, each on its part of the cores')
    parser.add_argument('--cluster', help="submitit's name of a cluster: slurm, or local to try it here, all at once")
    add_key_values(parser, '--cluster-options',
                   help="submitit's, such as timeout_min=1440 slurm_partition=gpu gpus_per_node=1")
    parser.add_argument('--grad-checkpointing', action='store_true', help="train.py's, where 1202 layers don't fit")
    parser.add_argument('--plan', action='store_true', help='list the runs and an estimate of their time; run nothing')
    parser.add_argument('--output', default='output/reproduce', help='folder of the run folders')
    parser.add_argument('--results', help='folder of the report, and of what it is made from (default: results/ beside '
                                          'this script, for the budget smoke --output)')
    return parser


def chosen(args: Any) -> list[tuple[Experiment, int]]:
    """The experiments and seeds that the flags name.

    Raises:
        UserError: If one of them isn't there, or its data.
    """
    there = TARGETS[args.target]
    wanted = {key: values for key in ('recipe', 'depth', 'drop_path') if (values := getattr(args, key)) is not None}
    for key, values in wanted.items():
        has = sorted({getattr(experiment, key) for experiment in there})
        for value in values:
            if value not in has:
                raise UserError(f'{args.target} has no run of --{key.replace("_", "-")} {value}; '
                                f'it has {" ".join(map(str, has))}')
    runs = [(experiment, seed) for experiment in there for seed in args.seeds
            if all(getattr(experiment, key) in values for key, values in wanted.items())]
    if not runs:
        raise UserError(f'{args.target} has no run that is of {" and ".join(map(str, wanted.values()))} at once')
    if args.data is not None and args.budget != 'smoke':
        missing = sorted({run.data for run, _ in runs if not (args.data / run.data).is_dir()})
        if missing:
            raise UserError(f'--data {args.data} lacks {", ".join(missing)}; choose what is there with --recipe')
    return list(dict.fromkeys(runs))


def done(args: Any, name: str) -> int:
    """Epochs that are done, by the run's own summary.csv, or of a complete run all of them."""
    return max(RunFolder(place).epochs_written() for place in (Path(args.results, 'runs', name),
                                                               Path(args.output, name)))


def epoch_seconds(experiment: Experiment, budget: str, step: float) -> float:
    """Estimate from a step of constant depth: shortened by the blocks that drop, with validation, a third of its cost.

    Args:
        experiment: What to train.
        budget: Of `BUDGETS`.
        step: Seconds of a step of 128 images at constant depth.
    """
    blocks = (experiment.depth - 2) // 2
    rates = timm_sd.drop_path_rates(blocks, experiment.drop_path, experiment.schedule)
    open_share = 1 - sum(rates) / blocks if experiment.mode == 'batch' else 1.  # subset saves, but copies too
    train, validation = IMAGES['digits' if budget == 'smoke' else experiment.data]
    return step * (train * open_share + validation / 3) / 128


def print_plan(runs: list[tuple[Experiment, int]], args: Any) -> None:
    """The runs, how far they are, and how long the rest takes, one after the other."""
    flags = argparse.Namespace(amp=None, batch_size=128, steps=3, grad_checkpointing=args.grad_checkpointing)
    steps: dict[int, float] = {}  # seconds, by depth
    total = 0.
    print(f'{"run":44}{"epochs":>8}{"done":>6}{"hours left":>12}')
    for experiment, seed in runs:
        name, epochs = experiment.name(args.budget, seed), BUDGETS[args.budget][experiment.recipe]
        left, hours = epochs - done(args, name), 0.
        if left and experiment.data != 'imagenet':
            if experiment.depth not in steps:
                timed = min(152, experiment.depth)  # what is deeper takes long to try; time is linear in the blocks
                contestant = Contestant(build(f'sd_resnet{timed}_cifar', Entry('constant', 0.)), flags)
                turns = [contestant.seconds(contestant.bare, 0) for _ in range(3)]  # the first warms up
                steps[experiment.depth] = statistics.mean(turns[1:]) * (experiment.depth - 2) / (timed - 2)
            hours = left * epoch_seconds(experiment, args.budget, steps[experiment.depth]) / 3600
        total += hours
        estimate = '?' if left and experiment.data == 'imagenet' else f'{hours:.2f}'
        print(f'{name:44}{epochs:8}{epochs - left:6}{estimate:>12}', flush=True)
    print(f'about {total:.1f} hours on this machine, one after the other, from a step timed now; ImageNet is not in it')


def make_folder(path: Path, flag: str) -> None:
    """Makes a folder; UserError that names its flag if it can't."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'{path} can not be written ({error.strerror}); choose another with {flag}') from error


def keep(name: str, args: Any) -> None:
    """Copies what the report reads, if this run is complete."""
    run, place = Path(args.output, name), Path(args.results, 'runs', name)
    results = RunFolder(run).read_results()
    if results is not None:
        make_folder(place, '--results')
        write_atomic(place / 'summary.csv', (run / 'summary.csv').read_bytes())
        RunFolder(place).write_results(without_paths(results))  # last: it says that the other is there


def make_executor(args: Any) -> tuple[Any, int | None]:
    """What the runs are handed to, and the threads of each."""
    if args.cluster is not None and args.processes > 1:
        raise UserError(f'--processes {args.processes} is for this machine; how many runs of --cluster {args.cluster} '
                        'go on at a time is up to it')
    if args.cluster is None:
        return ThreadPoolExecutor(args.processes), max(1, cores() // args.processes)
    try:
        import submitit
    except ImportError as error:
        raise UserError("--cluster wants submitit; install it with: pip install -e '.[cluster]'") from error
    try:
        executor = submitit.AutoExecutor(Path(args.output, 'submitit'), cluster=args.cluster)
        executor.update_parameters(**{'name': 'timm-sd', 'timeout_min': 24 * 60, **args.cluster_options})
    except Exception as error:  # submitit's own, of a wrong option, or of a cluster that isn't there
        raise UserError(f'--cluster {args.cluster}: {" ".join(str(error).split())[:200]}') from error
    return executor, None  # the node knows how many cores it gives


def command(experiment: Experiment, seed: int, threads: int | None, args: Any) -> list[str]:
    """The command line that trains a run, or goes on with it in the precision that it was begun in."""
    name = experiment.name(args.budget, seed)
    begun = RunFolder(Path(args.output, name)).read_args()
    return [sys.executable, TRAIN, *experiment.flags(args.budget, seed, args.data), '--output', args.output,
            '--experiment', name, '--resume', 'auto', *(['--threads', str(threads)] if threads else []),
            *(['--amp' if begun['amp'] else '--no-amp'] if begun else []),
            *(['--grad-checkpointing'] if args.grad_checkpointing else [])]


def reason(error: Exception, log: str | None) -> str:
    """Why a run failed, in one line: what train.py says of it, or the end of its traceback, or the engine's word."""
    lines = [line for line in (log or '').splitlines() if line.strip()]
    if not lines and isinstance(error, subprocess.CalledProcessError):  # whose text is the whole command line
        return f'exit status {error.returncode}'
    return next((line for line in reversed(lines) if 'error: ' in line), lines[-1] if lines else str(error))


def train_one(line: list[str], log: Path | None) -> None:
    """Runs train.py. Where several run, what it says goes to a file: a pipe would end it with this process.

    Raises:
        CalledProcessError: If it fails.
    """
    with log.open('w') if log else nullcontext() as stderr:  # one by itself shows its own bar
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL, stderr=stderr)


def train(runs: list[tuple[Experiment, int]], args: Any) -> None:
    """Trains what isn't complete, each run from its last checkpoint.

    Raises:
        UserError: If some fail; the others go on meanwhile.
    """
    kept = Path(args.results, 'runs')
    make_folder(kept, '--results')
    make_folder(Path(args.output), '--output')
    places = {experiment.name(args.budget, seed): (experiment, seed) for experiment, seed in runs}
    for name in places:
        if not (kept / name / 'results.json').exists():
            keep(name, args)  # a kill may have come between a run's end and this
    left = [name for name in places if not (kept / name / 'results.json').exists()]
    executor, threads = make_executor(args)
    several = args.cluster is None and args.processes > 1
    logs = {name: Path(args.output, f'{name}.log') for name in left} if several else {}
    jobs: dict[str, Any] = {}
    failed = []
    try:
        for name in left:
            with user_errors(f'--cluster {args.cluster}'):  # submitit's, of a partition that isn't there
                jobs[name] = executor.submit(train_one, command(*places[name], threads, args), logs.get(name))
        for name, job in tqdm(jobs.items(), unit='run', desc=f'{args.target}, {len(places) - len(left)} done before'):
            try:
                job.result()
            except Exception as error:  # a training's, or submitit's
                log = job.stderr() if args.cluster else logs[name].read_text() if logs else None
                failed.append(f'{name}: {reason(error, log)}')
            else:
                keep(name, args)
    finally:
        for job in jobs.values():
            if not job.done():
                job.cancel()
    if failed:
        raise UserError(f'{len(failed)} of {len(jobs)} runs failed; {"; ".join(failed)}')


def main() -> None:
    """Plans, trains or reports."""
    args = parse(reproduce_parser())
    args.results = args.results or (args.output if args.budget == 'smoke' else str(Path(__file__).parent / 'results'))
    if args.target == 'report':
        make_folder(Path(args.results), '--results')
        print(Report(Path(args.results)).write())
        return
    runs = chosen(args)
    if args.plan:
        print_plan(runs, args)
    else:
        train(runs, args)


if __name__ == '__main__':
    run(main)
