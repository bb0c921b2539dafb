"""Re-runs the paper: one command a table or figure, resumable, and a report of what was run.

    python bench/reproduce.py effect --budget fitted --data FOLDER  # trains what is missing; hours on a CPU
    python bench/reproduce.py fig8_right --depth 20 38 --plan    # lists it, with an estimate of the time
    python bench/reproduce.py all --cluster slurm                # hands it to a cluster (submitit)
    python bench/reproduce.py report                             # writes REPRODUCTION.md and its pictures

A run that is complete is not started again, a half-done one goes on from its last checkpoint: after a kill, run the
same line again. The report is made from each finished run's results.json and summary.csv, copied to results/runs/.
"""
import harness.interrupts  # noqa: F401  (before the imports that take seconds)

# isort: split
import statistics

from harness.cli import Parser, add_flags, make_settings, run_script
from paper.experiments import BY_MODE, TARGETS, Experiment
from paper.report import Report
from paper.runs import ChoiceSettings, Run, RunSettings, choose_runs, results_folder, train
from timing.contestants import CONSTANT, Contestant, StepSettings, Variant, build
from timing.rows import ratios

# Training images, and images validated in an epoch. SVHN is validated 24 times an epoch. Digits have 16 px and cost a
# quarter.
IMAGES = dict(digits=(1297 / 4, 140 / 4), cifar10=(45000, 5000), cifar100=(45000, 5000), svhn=(598388, 24 * 6000))


def reproduce_parser() -> Parser:
    """The flags."""
    parser = Parser("Re-runs the paper's tables and figures.")
    parser.add_argument('target', choices=[*TARGETS, 'report'], help='table or figure; report writes REPRODUCTION.md')
    add_flags(parser, ChoiceSettings, RunSettings)
    parser.add_argument('--plan', action='store_true', help='list the runs and an estimate of their time; run nothing')
    return parser


def estimated_epoch_seconds(experiment: Experiment, budget: str, step: float) -> float:
    """Estimate from a step of constant depth: shortened by the blocks that drop, with validation, a third of its cost.

    On the average of all epochs.

    Args:
        experiment: What to train.
        budget: Of `BUDGETS`.
        step: Seconds of a step of 128 images at constant depth.
    """
    # Mode subset saves too, but it copies.
    depth = experiment.expected_depth(budget) if experiment.mode == 'batch' else experiment.blocks
    train, validation = IMAGES['digits' if budget == 'smoke' else experiment.data]
    return step * (train * depth / experiment.blocks + validation / 3) / 128


def step_seconds(depth: int, settings: RunSettings, cuda_graphs: bool) -> float:
    """Seconds of a step of 128 images at constant depth, timed now."""
    timed = min(152, depth)  # what is deeper takes long to try; time is linear in the blocks
    contestant = Contestant(build(f'sd_resnet{timed}_cifar', CONSTANT),
                            StepSettings(steps=3, amp=settings.amp, grad_checkpointing=settings.grad_checkpointing),
                            cuda_graphs=cuda_graphs)
    turns = [contestant.time_turn(contestant.bare, 0)[0] for _ in range(3)]  # the first warms up
    return statistics.mean(turns[1:]) * (depth - 2) / (timed - 2)


def print_plan(runs: list[Run], settings: RunSettings) -> None:
    """The runs, how far they are, and how long the rest takes, one after the other."""
    steps: dict[tuple[int, bool], float] = {}  # seconds, by depth and whether they are recorded
    total, epochs_done = 0., [run.epochs_done() for run in runs]
    print(f'{"run":58}{"epochs":>8}{"done":>6}{"hours left":>12}')
    for run, done in zip(runs, epochs_done, strict=True):
        depth, left, hours = run.experiment.depth, run.epochs - done, 0.
        if left and run.experiment.data != 'imagenet':
            key = depth, run.is_recorded(settings)
            if key not in steps:
                steps[key] = step_seconds(depth, settings, key[1])
            hours = left * estimated_epoch_seconds(run.experiment, run.budget, steps[key]) / 3600
        total += hours
        estimate = '?' if left and run.experiment.data == 'imagenet' else f'{hours:.2f}'
        print(f'{run.name:58}{run.epochs:8}{done:6}{estimate:>12}', flush=True)
    print(f'about {total:.1f} hours on this machine, one after the other, from a step timed now; ImageNet is not in it')


def main() -> None:
    """Plans, trains or reports."""
    flags = reproduce_parser().parse_args()
    choice, settings = make_settings(ChoiceSettings, flags), make_settings(RunSettings, flags)
    if flags.target == 'report':
        folder = results_folder(settings, choice.budget)
        timed = {**BY_MODE, 'paper': Experiment()}
        variants = {name: Variant(run.mode, run.drop_path, run.schedule, run.scale) for name, run in timed.items()}
        print(Report(folder, ratios(folder / 'timing', 'sd_resnet110_cifar', variants)).write())
        return
    runs = choose_runs(flags.target, choice, settings)
    if flags.plan:
        print_plan(runs, settings)
    else:
        train(runs, choice.data, settings)


if __name__ == '__main__':
    run_script(main)
