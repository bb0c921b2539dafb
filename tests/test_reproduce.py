"""bench/reproduce.py as a user runs it: what it starts, what a kill -9 leaves, what the report says."""
import json
import os
import signal
import subprocess
import time
from contextlib import suppress
from itertools import groupby

import pytest
import safetensors.torch
import torch

import paper
from config import changed_from_recipe, parse, train_parser
from experiments import DEPTH1202, FIG8_RIGHT, MODES, RECIPE_LR_MODES, TABLE1, TARGETS, Experiment
from report import Found, machine, machines, time_ratio
from reproduce import command as command_of
from reproduce import reason, reproduce_parser
from test_train import bench, command
from train import build_optimizer

SMALL = ['fig8_right', '--depth', '20', '--drop-path', '0.5', '--budget', 'smoke']
NAME = 'cifar10-20-0.5-linear-smoke-0'


def folders(root):
    return ['--output', str(root / 'output'), '--results', str(root / 'results')]


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp('reproduce')
    result = bench('reproduce.py', *SMALL, *folders(root))
    assert result.returncode == 0, result.stderr
    return root


def test_trainings_that_several_figures_need_are_one():
    assert TABLE1['cifar10'][1] == FIG8_RIGHT[110, 0.5] == Experiment()
    assert len(TARGETS['fig8_right']) == 36
    names = [run.name('full', 0) for run in TARGETS['all']]
    assert len(set(names)) == len(names)
    assert all(run.name('full', 0) not in names for run in RECIPE_LR_MODES.values())  # known not to train


def test_a_budget_shrinks_the_schedule_and_changes_nothing_else():
    full, short = (dict(zip(flags, flags[1:], strict=False)) for flags in (
        Experiment().flags(budget, 0, None) for budget in ('full', 'short')))
    assert full['--epochs'] == '500'
    assert '--decay-milestones' not in full  # the recipe's
    assert (short['--epochs'], short['--decay-milestones']) == ('8', '5')
    for flag in ('-c', '--model', '--drop-path', '--drop-path-scale'):
        assert full[flag] == short[flag]
    args = parse(train_parser(), Experiment().flags('full', 0, None))
    assert changed_from_recipe(vars(args)) == {}


def test_the_ways_of_dropping_start_at_a_learning_rate_they_bear():
    rates = [parse(train_parser(), runs['sample'].flags('short', 0, None)).lr for runs in (MODES, RECIPE_LR_MODES)]
    assert rates == [0.01, 0.1]


@pytest.mark.parametrize(('experiment', 'epochs'), [
    (TABLE1['cifar10'][1], [4, 2, 2]), (TABLE1['svhn'][1], [2, 1, 1]), (DEPTH1202[1], [1, 3, 2, 2])])
def test_a_short_schedule_has_every_phase(experiment, epochs):
    args = parse(train_parser(), experiment.flags('short', 0, None))
    _, scheduler = build_optimizer(args, torch.nn.Linear(1, 1), 1)
    rates = []
    for epoch in range(args.epochs):
        scheduler.step(epoch)
        rates.append(round(scheduler.optimizer.param_groups[0]['lr'], 6))
    assert [len(list(group)) for _, group in groupby(rates)] == epochs


def test_a_complete_run_is_not_started_again(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob('*') if path.is_file()}
    result = bench('reproduce.py', *SMALL, *folders(finished))
    assert result.returncode == 0, result.stderr
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob('*') if path.is_file()}


def test_a_complete_run_that_was_not_kept_is_kept_without_training(finished, tmp_path):
    place = tmp_path / 'output' / NAME
    place.mkdir(parents=True)
    for name in ('results.json', 'summary.csv'):
        (place / name).write_bytes((finished / 'output' / NAME / name).read_bytes())
    result = bench('reproduce.py', *SMALL, *folders(tmp_path))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / 'results' / 'runs' / NAME / 'results.json').exists()
    assert len(list(place.iterdir())) == 2


def test_goes_on_in_the_precision_of_the_beginning(tmp_path):
    args = parse(reproduce_parser(), [*SMALL, *folders(tmp_path), '--grad-checkpointing'])
    run = Experiment(depth=20)
    assert not {'--amp', '--no-amp'} & set(command_of(run, 0, None, args))
    folder = tmp_path / 'output' / NAME
    folder.mkdir(parents=True)
    for amp, flag in (('true', '--amp'), ('false', '--no-amp')):
        (folder / 'args.yaml').write_text(f'amp: {amp}')
        line = command_of(run, 0, None, args)
        assert flag in line
        assert parse(train_parser(), line[2:]).grad_checkpointing


@pytest.mark.parametrize(('log', 'why'), [
    ('train.py: error: no\n\nlast', 'train.py: error: no'),
    ('Traceback\ntorch.OutOfMemoryError: CUDA out of memory\n\n', 'torch.OutOfMemoryError: CUDA out of memory'),
    ('', 'died with SIGKILL'),
    (None, 'died with SIGKILL'),
])
def test_the_reason_of_a_failure_is_found(log, why):
    assert reason(RuntimeError('died with SIGKILL'), log) == why


def test_goes_on_after_kill_9_to_the_same_weights(finished, tmp_path):
    process = subprocess.Popen(command('reproduce.py', *SMALL, *folders(tmp_path)), stderr=subprocess.DEVNULL,
                               start_new_session=True)
    folder = tmp_path / 'output' / NAME
    while not list(folder.glob('checkpoints/checkpoint-*.pt')):
        assert process.poll() is None
        time.sleep(0.01)
    again = bench('reproduce.py', *SMALL, *folders(tmp_path))  # while the first one still trains
    assert again.returncode == 2
    assert 'is being trained by another process' in again.stderr
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # as on a machine with less memory
    result = bench('reproduce.py', *SMALL, *folders(tmp_path), '--grad-checkpointing')
    assert result.returncode == 0, result.stderr
    ours, theirs = (safetensors.torch.load_file(root / 'output' / NAME / 'model.safetensors')
                    for root in (tmp_path, finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    results = json.loads((tmp_path / 'results' / 'runs' / NAME / 'results.json').read_text())
    assert results['args']['output'] is None  # what others see has no paths of this machine
    assert results['model'] == 'sd_resnet20_cifar.c10'


def test_a_training_outlives_the_command_that_started_it(tmp_path):
    process = subprocess.Popen(command('reproduce.py', *SMALL, '--processes', '2', *folders(tmp_path)),
                               stderr=subprocess.DEVNULL, start_new_session=True)
    folder = tmp_path / 'output' / NAME
    try:
        while not list(folder.glob('checkpoints/checkpoint-*.pt')):
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
        end = time.monotonic() + 120
        while not (folder / 'results.json').exists() and time.monotonic() < end:
            time.sleep(0.1)
        assert (folder / 'results.json').exists()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_report_has_what_was_run_and_empty_cells(finished):
    result = bench('reproduce.py', 'report', '--results', finished / 'results')
    assert result.returncode == 0, result.stderr
    text = (finished / 'results' / 'REPRODUCTION.md').read_text()
    error = json.loads((finished / 'results' / 'runs' / NAME / 'results.json').read_text())['test_best']['top1_err']
    assert f'| 0.5 | {paper.FIG8_RIGHT[0.5][20]:.2f} / {error:.2f} | {paper.FIG8_RIGHT[0.5][38]:.2f} /  |' in text
    assert f'| CIFAR-10+ | {paper.TABLE1["cifar10"].constant:.2f} | {paper.TABLE1["cifar10"].stochastic:.2f} |  |  |' \
        in text
    assert (finished / 'results' / 'fig8_right-smoke.png').stat().st_size > 10_000


def test_report_means_over_seeds_and_draws_every_figure(finished, tmp_path):
    """From one real run under the names of others."""
    source = finished / 'results' / 'runs' / NAME
    for run in TARGETS['all']:
        for budget, seed, error in (('short', 0, 5.), ('short', 1, 6.), ('full', 0, 4.)):
            place = tmp_path / 'runs' / run.name(budget, seed)
            place.mkdir(parents=True)
            results = json.loads((source / 'results.json').read_text())
            results['test_best']['top1_err'] = error
            if budget == 'full':  # as if they had been trained side by side
                results['hardware'].update(threads=1, cores=2)
            (place / 'results.json').write_text(json.dumps(results))
            (place / 'summary.csv').write_text((source / 'summary.csv').read_text())
    times = dict(rows=[dict(name='subset, p_L 0.5', ratio=dict(median=0.987, q1=0.9, q3=1.))],
                 hardware=dict(device='an abacus', amp=False))
    (tmp_path / 'throughput_modes.json').write_text(json.dumps(times))
    (tmp_path / 'notes.md').write_text('## What was noticed\n')
    result = bench('reproduce.py', 'report', '--results', tmp_path)
    assert result.returncode == 0, result.stderr
    text = (tmp_path / 'REPRODUCTION.md').read_text()
    assert text.endswith('\n## What was noticed\n')
    on = machine(results['hardware'])
    assert f'| SVHN | 1.80 | 1.75 | 5.50 ± 0.71 (2) | 5.50 ± 0.71 (2) | 4 | short | 2 and 2 | {on} |' in text
    assert f'| SVHN | 1.80 | 1.75 | 4.00 | 4.00 | 4 | full | 1 and 1 | {on} |' in text
    times = [line for line in text.partition('## Table 2')[2].splitlines() if line.startswith('| CIFAR-10+')]
    assert '| 0.730 |  |  |  | 4 | full |' in times[0]
    assert '| 1.000 | 4 | short |' in times[1]
    assert f'| subset | train | 0.01 | 5.50 ± 0.71 (2) | 4 | short | 2 | {on} |' in text
    assert '| an abacus, fp32 |  |  | 0.99 (0.90 to 1.00) |' in text
    table = text.partition('## Figure 7')[2].partition('![')[0].strip().splitlines()
    assert all(line.startswith('| `') for line in table[-2:])  # one table, the pictures behind it
    for line in text.splitlines():
        if line.startswith('!['):
            assert (tmp_path / line.partition('](')[2].rstrip(')')).exists()
    assert text.count('![') == 8


def test_times_are_compared_on_one_machine_alone():
    hardware = dict(device='an abacus', processes=1, threads=2)
    here, there = (Found([dict(epoch_seconds=2., hardware=dict(hardware, amp=amp))], []) for amp in (False, True))
    assert time_ratio(here, here) == '1.000'
    assert time_ratio(here, there) == ''
    assert machines(there, here, there) == 'an abacus, bf16; an abacus, fp32'


def test_plan_runs_nothing(tmp_path):
    result = bench('reproduce.py', *SMALL, '--plan', *folders(tmp_path))
    assert result.returncode == 0, result.stderr
    assert NAME in result.stdout
    assert not list(tmp_path.iterdir())


def test_submitit_runs_it_too(tmp_path):
    result = bench('reproduce.py', *SMALL, '--seeds', '1', '--cluster', 'local', '--cluster-options', 'timeout_min=10',
                   *folders(tmp_path))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / 'results' / 'runs' / NAME.replace('smoke-0', 'smoke-1') / 'results.json').exists()


@pytest.mark.parametrize(('args', 'words'), [
    (['fig8_right', '--depth', '20', '21'], ['no run of --depth 21', '20 38']),
    (['fig8_right', '--drop-path', '0.5', '0.7'], ['no run of --drop-path 0.7', '0.4 0.5']),
    (['fig7', '--recipe', 'svhn'], ['no run of --recipe svhn', 'cifar10']),
    (['table1', '--recipe', 'svhn', '--depth', '110'], ['svhn', '110']),
    (['table1', '--data', '/nowhere'], ['/nowhere', 'cifar10, cifar100, imagenet, svhn', '--recipe']),
    (['report', '--results', '/proc/nowhere'], ['/proc/nowhere', '--results']),
    ([*SMALL, '--results', '/proc/nowhere'], ['/proc/nowhere', '--results']),
    ([*SMALL, '--output', '/proc/nowhere'], ['/proc/nowhere', '--output']),
    ([*SMALL, '--cluster', 'local', '--processes', '2'], ['--processes 2']),
    (['table3'], ['table3', 'table1']),
    ([*SMALL, '--cluster', 'nowhere'], ['nowhere']),
    ([*SMALL, '--cluster', 'local', '--cluster-options', 'timeout_min'], ['timeout_min', 'key=value']),
])
def test_mistakes_get_one_line(refused, tmp_path, args, words):
    said = refused('reproduce.py', *folders(tmp_path), *args)
    assert all(word in said for word in words)


def test_a_failing_run_is_named_and_the_others_go_on(tmp_path):
    folder = tmp_path / 'output' / NAME
    folder.mkdir(parents=True)
    (folder / 'args.yaml').write_text('{epochs: 99, amp: false}')
    result = bench('reproduce.py', *SMALL, '--seeds', '0', '1', '--processes', '2', *folders(tmp_path))
    assert result.returncode == 2
    last = result.stderr.strip().splitlines()[-1]
    assert f'1 of 2 runs failed; {NAME}: ' in last
    assert 'epochs 99 -> 4' in last
    assert [path.parent.name for path in (tmp_path / 'results').rglob('results.json')] == [
        NAME.replace('smoke-0', 'smoke-1')]
