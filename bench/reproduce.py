"""Re-runs the paper: one command a table or figure, resumable, and a report of what was run.

    python bench/reproduce.py table1 --budget short --data ../shared/data    # trains what is missing
    python bench/reproduce.py fig8_right --depth 20 38 --plan                # lists it, with an estimate of the time
    python bench/reproduce.py all --cluster slurm                            # hands it to a cluster (submitit)
    python bench/reproduce.py report                                         # writes REPRODUCTION.md and its pictures

A run that is complete is not started again, a half-done one goes on from its last checkpoint: after a kill, run the
same line again. The report is made from each finished run's results.json and summary.csv, copied to results/runs/.
"""
import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

import timm_sd
from config import Parser, UserError, cores, count, parse, rate, run
from contestants import Entry, time_in_turns
from experiments import BUDGETS, TARGETS, Experiment
from report import Report
from run_folder import write_atomic

TRAIN = str(Path(__file__).parent / 'train.py')


def reproduce_parser() -> Parser:
    """The flags."""
    parser = Parser("Re-runs the paper's tables and figures.")
    parser.add_argument('target', choices=[*TARGETS, 'report'], help='table or figure; report writes REPRODUCTION.md')
    parser.add_argument('--budget', choices=BUDGETS, default='full', help="the paper's epochs, or less")
    parser.add_argument('--seeds', type=int, nargs='+', default=[0], metavar='SEED', help='a run for each')
    parser.add_argument('--data', metavar='FOLDER', help='holds cifar10/, svhn/ and so on (default: the Hub)')
    parser.add_argument('--depth', type=count, nargs='+', help='only these depths')
    parser.add_argument('--drop-path', type=rate, nargs='+', help='only these 1 - p_L')
    parser.add_argument('--processes', type=count, default=1, metavar='N', help='runs at the same time on this machine')
    parser.add_argument('--cluster', help="submitit's name of a cluster: slurm, or local to try it here")
    parser.add_argument('--cluster-options', nargs='*', default=[], metavar='KEY=VALUE',
                        help="submitit's, such as timeout_min=1440 slurm_partition=gpu gpus_per_node=1")
    parser.add_argument('--plan', action='store_true', help='list the runs and an estimate of their time; run nothing')
    parser.add_argument('--output', default='output/reproduce', help='folder of the run folders')
    parser.add_argument('--results', help='folder of the report, and of what it is made from (default: results/ beside '
                                          'this script, for the budget smoke --output)')
    return parser


def chosen(args: Any) -> list[tuple[Experiment, int]]:
    """The experiments and seeds that the flags name.

    Raises:
        UserError: If there are none.
    """
    runs = [(experiment, seed) for experiment in TARGETS[args.target] for seed in args.seeds
            if args.depth is None or experiment.depth in args.depth
            if args.drop_path is None or experiment.drop_path in args.drop_path]
    if not runs:
        depths, rates = ({getattr(run, key) for run in TARGETS[args.target]} for key in ('depth', 'drop_path'))
        raise UserError(f'{args.target} has no run of --depth {args.depth} and --drop-path {args.drop_path}; it has '
                        f'depths {sorted(depths)} and rates {sorted(rates)}')
    if args.data is not None and not Path(args.data).is_dir():
        raise UserError(f'--data {args.data} is no folder')
    return list(dict.fromkeys(runs))


def done(args: Any, name: str) -> int:
    """Epochs that are done, by the run's own summary.csv, or of a complete run all of them."""
    for summary in (Path(args.results, 'runs', name, 'summary.csv'), Path(args.output, name, 'summary.csv')):
        if summary.exists():
            return len(summary.read_text().splitlines()) - 1
    return 0


def step_seconds(experiments: list[Experiment], args: Any) -> dict[Experiment, float]:
    """Seconds of a training step on this machine: constant depth is timed, and shortened by the blocks that drop.

    Networks of more than 152 layers are timed at 152, and lengthened.
    """
    timed = {}
    flags = argparse.Namespace(amp=None, batch_size=128, steps=2, rounds=2, grad_checkpointing=False,
                               torchcompile_mode=None)
    for depth in sorted({min(152, experiment.depth) for experiment in experiments if experiment.recipe != 'imagenet'}):
        seconds = time_in_turns(f'sd_resnet{depth}_cifar', [Entry('constant', 0.)], flags).seconds
        timed[depth] = min(next(iter(seconds.values()))) / (depth - 2)
    found = {}
    for experiment in experiments:
        if experiment.recipe != 'imagenet':
            blocks = (experiment.depth - 2) // 2
            rates = timm_sd.drop_path_rates(blocks, experiment.drop_path, experiment.schedule)
            saved = 0. if experiment.mode == 'sample' else sum(rates) / blocks
            found[experiment] = timed[min(152, experiment.depth)] * (experiment.depth - 2) * (1 - saved)
    return found


def print_plan(runs: list[tuple[Experiment, int]], args: Any) -> None:
    """The runs, how far they are, and how long the rest takes."""
    images = dict(cifar10=45000, cifar100=45000, cifar10_1202=45000, svhn=598388)
    seconds = step_seconds([experiment for experiment, _ in runs], args)
    hours = 0.
    print(f'{"run":44}{"epochs":>8}{"done":>6}{"hours left":>12}')
    for experiment, seed in runs:
        name, epochs = experiment.name(args.budget, seed), BUDGETS[args.budget][experiment.recipe]
        left = epochs - done(args, name)
        steps = 21 if args.budget == 'smoke' else images.get(experiment.recipe, 0) / 128
        own = seconds[experiment] * steps * left / 3600 if experiment in seconds else float('nan')
        hours += own if own == own else 0
        print(f'{name:44}{epochs:8}{epochs - left:6}{own:12.2f}')
    print(f'about {hours:.1f} hours on this machine, from a step timed now; ImageNet is not in it')


def keep(folder: Path, place: Path) -> None:
    """Copies what the report reads from the folder of a complete run."""
    place.mkdir(parents=True, exist_ok=True)
    for file in ('summary.csv', 'results.json'):  # the last says that it is whole
        write_atomic(place / file, (folder / file).read_bytes())


def make_executor(args: Any) -> tuple[Any, int | None]:
    """What the runs are handed to, and the threads of each."""
    if args.cluster is None:
        return ThreadPoolExecutor(args.processes), max(1, cores() // args.processes)
    try:
        import submitit
    except ImportError as error:
        raise UserError("--cluster wants submitit; install it with: pip install 'timm-sd[cluster]'") from error
    try:
        executor = submitit.AutoExecutor(Path(args.output, 'submitit'), cluster=args.cluster)
        options = dict(option.split('=', 1) for option in args.cluster_options)
        executor.update_parameters(**dict(dict(name='timm-sd', timeout_min=24 * 60), **{
            key: int(value) if value.isdigit() else value for key, value in options.items()}))
    except Exception as error:  # submitit's own, of a wrong option, or of a cluster that isn't there
        raise UserError(f'--cluster {args.cluster}: {" ".join(str(error).split())[:200]}') from error
    return executor, None  # the node knows how many cores it gives


def train(runs: list[tuple[Experiment, int]], args: Any) -> None:
    """Trains what isn't complete, each run from its last checkpoint.

    Raises:
        UserError: If some fail; the others go on meanwhile.
    """
    places = {experiment.name(args.budget, seed): (experiment, seed) for experiment, seed in runs}
    left = [name for name in places if not Path(args.results, 'runs', name, 'results.json').exists()]
    executor, threads = make_executor(args)
    stderr = subprocess.PIPE if args.cluster is None and args.processes > 1 else None  # one run shows its own bar
    jobs, failed = {}, []
    for name in left:
        experiment, seed = places[name]
        command = [sys.executable, TRAIN, *experiment.flags(args.budget, seed, args.data), '--output', args.output,
                   '--experiment', name, '--resume', 'auto', *(['--threads', str(threads)] if threads else [])]
        jobs[name] = executor.submit(
            subprocess.run, command, check=True, stdout=subprocess.DEVNULL, stderr=stderr, text=True)
    try:
        for name, job in tqdm(jobs.items(), unit='run', desc=f'{args.target}, {len(places) - len(left)} done before'):
            try:
                job.result()
            except Exception as error:  # a training's, or submitit's
                log = job.stderr() if args.cluster else getattr(error, 'stderr', None)
                lines = [line for line in (log or '').splitlines() if 'error: ' in line]
                failed.append(f'{name}: {lines[-1] if lines else "see above"}')
            else:
                keep(Path(args.output, name), Path(args.results, 'runs', name))
    finally:
        for job in jobs.values():
            job.cancel()
    if failed:
        raise UserError(f'{len(failed)} of {len(jobs)} runs failed; {"; ".join(failed)}')


def main() -> None:
    """Plans, trains or reports."""
    args = parse(reproduce_parser())
    args.results = args.results or (args.output if args.budget == 'smoke' else str(Path(__file__).parent / 'results'))
    if args.target == 'report':
        print(Report(Path(args.results)).write())
        return
    runs = chosen(args)
    if args.plan:
        print_plan(runs, args)
    else:
        train(runs, args)


if __name__ == '__main__':
    run(main)
