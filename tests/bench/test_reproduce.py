"""bench/reproduce.py: what it starts and keeps, what it refuses, and what a kill -9 leaves."""
import functools
import json
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

import paper.runs
import reproduce
from harness.recipes import changed_from_recipe, parse_train_flags
from paper.experiments import Experiment
from paper.runs import Run, RunSettings, failure_reason
from support.commands import assert_same_run, bench, command, refused, run_here
from support.markdown import sections, tables
from support.runs import TEMPLATE
from support.waiting import wait_until

ONE_RUN = ['fig8_right', '--depth', '20', '--drop-path', '0.5', '--budget', 'smoke']
NAME = 'cifar10-20-0.5-linear-smoke-0'
OTHER = NAME.replace('smoke-0', 'smoke-1')


def folders(root):
    return ['--output', str(root / 'output'), '--results', str(root / 'results')]


def finish(folder, args=None, **results):
    """Makes it the folder of a finished run, of `NAME` unless other flags are given."""
    flags = vars(args or parse_train_flags(Experiment(depth=20).flags('smoke', 0, None)))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'summary.csv').write_bytes((TEMPLATE / 'summary.csv').read_bytes())
    content = dict(json.loads((TEMPLATE / 'results.json').read_text()), args=flags, recipe=flags['config'],
                   dataset=flags['dataset'], epochs=flags['epochs'], seed=flags['seed'],
                   changed_from_recipe=changed_from_recipe(flags))
    (folder / 'results.json').write_text(json.dumps({**content, **results}))


def contents(root):
    return {path: path.read_bytes() for path in root.rglob('*') if path.is_file()}


@pytest.fixture
def trainings(monkeypatch):
    """The command lines of the trainings that would be started; each is finished at once, those of seed 13 fail."""
    started = []

    def run(line, stdout, stderr):
        started.append(line)
        args = parse_train_flags(line[2:])
        if stderr:
            stderr.write('some progress\ntrain.py: error: an unlucky number\n')
            stderr.flush()
        if args.seed == 13:
            raise subprocess.CalledProcessError(2, line)
        finish(Path(args.output, args.experiment), args)
    monkeypatch.setattr(paper.runs.Children, 'run', lambda children, line, **kwargs: run(line, **kwargs))
    return started


def reproduced(*args):
    result = run_here('reproduce.py', *args)
    assert result.returncode == 0, result.stderr
    return result


def test_what_is_missing_is_trained_and_kept(trainings, tmp_path):
    reproduced('fig8_right', '--depth', '20', '38', '--drop-path', '0.5', '--budget', 'smoke', *folders(tmp_path))
    args = [parse_train_flags(line[2:]) for line in trainings]
    assert [(flags.model, flags.drop_path, flags.resume) for flags in args] == [
        ('sd_resnet20_cifar.c10', 0.5, 'auto'), ('sd_resnet38_cifar.c10', 0.5, 'auto')]
    kept = sorted(path.name for path in (tmp_path / 'results' / 'runs').iterdir())
    assert kept == [NAME, NAME.replace('-20-', '-38-')]
    assert contents(tmp_path / 'results' / 'runs' / NAME).keys() == {
        tmp_path / 'results' / 'runs' / NAME / name for name in ('results.json', 'summary.csv')}


def test_what_is_kept_has_no_paths_of_this_machine(trainings, tmp_path):
    finish(tmp_path / 'output' / NAME)
    path = tmp_path / 'output' / NAME / 'results.json'
    results = json.loads(path.read_text())
    results['args'].update(output='/home/me', data_dir='/home/me', resume='/home/me')
    path.write_text(json.dumps(results))
    reproduced(*ONE_RUN, *folders(tmp_path))
    assert '/home/me' not in (tmp_path / 'results' / 'runs' / NAME / 'results.json').read_text()


def test_a_complete_run_is_not_started_again(trainings, tmp_path):
    finish(tmp_path / 'results' / 'runs' / NAME)
    before = contents(tmp_path)
    reproduced(*ONE_RUN, *folders(tmp_path))
    assert trainings == []
    assert contents(tmp_path) == before


def test_a_complete_run_that_was_not_kept_is_kept_without_training(trainings, tmp_path):
    finish(tmp_path / 'output' / NAME)
    reproduced(*ONE_RUN, *folders(tmp_path))
    assert trainings == []
    assert (tmp_path / 'results' / 'runs' / NAME / 'results.json').exists()
    assert len(list((tmp_path / 'output' / NAME).iterdir())) == 2


def test_a_run_on_other_data_is_named_and_not_kept(trainings, tmp_path, monkeypatch):
    """The report would leave it out without a word."""
    monkeypatch.setitem(globals(), 'finish', functools.partial(finish, dataset='pets'))
    said = run_here('reproduce.py', *ONE_RUN, *folders(tmp_path)).stderr.splitlines()[-1]
    assert f"{NAME} was trained on 'pets', which is no copy of digits that the recipe knows; see --fingerprint" in said
    assert len(trainings) == 1
    assert not list((tmp_path / 'results').rglob('results.json'))
    again = refused('reproduce.py', *ONE_RUN, *folders(tmp_path))
    assert "trained on 'pets'" in again
    assert len(trainings) == 1


@pytest.mark.parametrize('place', ['output', 'results/runs'])
@pytest.mark.parametrize(('change', 'words'), [
    (dict(epochs=3), 'epochs 3 instead of 4'), (dict(seed=1), 'seed 1 instead of 0'),
    (dict(recipe='mine', changed_from_recipe={}), "drop_path the recipe's instead of 0.5")], ids=str)
def test_a_run_of_another_training_is_not_taken_for_this_one(trainings, tmp_path, place, change, words):
    """Such as one that was made when the budget had other epochs."""
    finish(tmp_path / place / NAME, **change)
    before = contents(tmp_path)
    for plan in ([], ['--plan']):
        said = refused('reproduce.py', *ONE_RUN, *plan, *folders(tmp_path))
        assert f'{tmp_path / place / NAME} is no run of budget smoke: ' in said
        assert words in said
    assert trainings == []
    assert contents(tmp_path) == before


def test_a_failing_run_is_named_and_the_others_go_on(trainings, tmp_path):
    result = run_here('reproduce.py', *ONE_RUN, '--seeds', '13', '1', '--processes', '2', *folders(tmp_path))
    assert result.returncode == 2
    assert f'1 of 2 runs failed; {NAME.replace("smoke-0", "smoke-13")}: train.py: error: an unlucky number' in (
        result.stderr.splitlines()[-1])
    assert [path.name for path in (tmp_path / 'results' / 'runs').iterdir()] == [OTHER]


def test_runs_side_by_side_share_the_cores(trainings, tmp_path, monkeypatch):
    monkeypatch.setattr(paper.runs, 'cores', lambda: 7)
    reproduced(*ONE_RUN, '--seeds', '0', '1', '2', '--processes', '3', *folders(tmp_path))
    assert [parse_train_flags(line[2:]).threads for line in trainings] == [2, 2, 2]


@pytest.mark.parametrize(('place', 'file', 'content'), [
    *((place, 'results.json', content) for place in ('output', 'results/runs') for content in (b'{"model', b'', b'{}')),
    ('output', 'summary.csv', b'epoch\n')])
def test_a_broken_run_is_named_and_nothing_is_started(trainings, tmp_path, place, file, content):
    finish(tmp_path / place / NAME)
    path = tmp_path / place / NAME / file
    path.write_bytes(content)
    said = refused('reproduce.py', *ONE_RUN, *folders(tmp_path))
    assert str(path) in said
    assert trainings == []


@pytest.mark.parametrize('amp', [None, True, False])  # None: the precision is left to the training
def test_flags_of_the_machine_reach_the_training(tmp_path, amp):
    run = Run(Experiment(depth=20), 'smoke', 0, tmp_path / 'output', tmp_path / 'results' / 'runs')
    flags = parse_train_flags(run.command(None, 3, RunSettings(grad_checkpointing=True, amp=amp))[2:])
    assert flags.grad_checkpointing
    assert flags.threads == 3
    assert flags.amp is amp


def test_what_can_be_recorded_is():
    """With what else keeps a GPU from waiting."""
    settings = RunSettings(cuda_graphs=True)
    for experiment, is_recorded in ((Experiment(depth=20), True), (Experiment(depth=110, drop_path=0.), True),
                                    (Experiment(mode='subset', scale='train'), False),
                                    (Experiment(recipe='imagenet', depth=18), False)):
        flags = parse_train_flags(Run(experiment, 'full', 0, Path(), Path()).command(None, None, settings)[2:])
        assert flags.cuda_graphs == is_recorded
        assert flags.validation_batch_size == (1000 if is_recorded else None)
        assert flags.checkpoint_interval == (10 if is_recorded else 1)


@pytest.mark.parametrize(('log', 'why'), [
    ('train.py: error: no\n\nlast', 'train.py: error: no'),
    ('Traceback\ntorch.OutOfMemoryError: CUDA out of memory\n\n', 'torch.OutOfMemoryError: CUDA out of memory'),
    ('', 'died with SIGKILL'),
    (None, 'died with SIGKILL'),
])
def test_the_reason_of_a_failure_is_found(log, why):
    assert failure_reason(RuntimeError('died with SIGKILL'), log) == why


def test_a_plan_runs_nothing_and_adds_up(trainings, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, 'step_seconds', lambda *args: 128 * 3600.)  # an hour an image
    result = reproduced(*ONE_RUN, '--plan', *folders(tmp_path))
    # of 9 blocks (3 x 9 - 1) / 4 = 6.5 are open in expectation; a digit of 16 px costs a quarter
    hours = 4 * (1297 / 4 * 6.5 / 9 + 140 / 4 / 3)
    assert result.stdout.splitlines()[1].split() == [NAME, '4', '0', f'{hours:.2f}']
    assert f'about {hours:.1f} hours' in result.stdout
    assert trainings == []
    assert not list(tmp_path.iterdir())
    finish(tmp_path / 'results' / 'runs' / NAME)
    lines = (tmp_path / 'results' / 'runs' / NAME / 'summary.csv').read_text().splitlines()
    (tmp_path / 'results' / 'runs' / NAME / 'summary.csv').write_text('\n'.join(lines[:4]))  # three of four epochs
    rest = reproduced(*ONE_RUN, '--plan', *folders(tmp_path))
    assert rest.stdout.splitlines()[1].split() == [NAME, '4', '3', f'{hours / 4:.2f}']


@pytest.mark.parametrize(('args', 'words'), [
    (['fig8_right', '--depth', '20', '21'], ['no run of --depth 21', '20 38']),
    (['fig8_right', '--drop-path', '0.5', '0.7'], ['no run of --drop-path 0.7', '0.4 0.5']),
    (['fig7', '--cuda-graphs', '--grad-checkpointing'], ['--cuda-graphs can not record --grad-checkpointing']),
    (['fig7', '--recipe', 'svhn'], ['no run of --recipe svhn', 'cifar10']),
    (['table1', '--recipe', 'svhn', '--depth', '110'], ['svhn', '110']),
    (['table1', '--data', '/nowhere'], ['/nowhere', 'cifar10, cifar100, imagenet, svhn', '--recipe']),
    (['table1', '--budget', 'fitted'],
     ['--budget fitted has epochs for the 38 layers of effect alone', 'another budget']),
    (['fig7', '--no-augment'], ['no run of --augment False']),
    (['report', '--results', '/proc/nowhere'], ['/proc/nowhere', '--results']),
    ([*ONE_RUN, '--results', '/proc/nowhere'], ['/proc/nowhere', '--results']),
    ([*ONE_RUN, '--output', '/proc/nowhere'], ['/proc/nowhere', '--output']),
    ([*ONE_RUN, '--cluster', 'local', '--processes', '2'], ['--processes 2']),
    (['table3'], ['table3', 'table1']),
    ([*ONE_RUN, '--cluster', 'nowhere'], ['nowhere']),
    ([*ONE_RUN, '--cluster', 'local', '--cluster-options', 'timeout_min'], ['timeout_min', 'key=value']),
])
def test_mistakes_get_one_line(tmp_path, args, words):
    said = refused('reproduce.py', *folders(tmp_path), *args)
    assert all(word in said for word in words)


# --- in processes of their own


def checkpoints(root):
    return list((root / 'output' / NAME / 'checkpoints').glob('checkpoint-*.pt'))


@pytest.mark.slow
def test_goes_on_after_kill_9_to_the_same_weights(tmp_path):
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    # beside another one, so each training has half of the cores, and what it says is in a file
    line = [*ONE_RUN, '--processes', '2']
    reproduced(*line, *folders(whole))
    process = subprocess.Popen(command('reproduce.py', *line, *folders(killed)), stderr=subprocess.DEVNULL,
                               start_new_session=True)
    try:
        wait_until(lambda: checkpoints(killed), process=process)
        os.killpg(process.pid, signal.SIGSTOP)  # so that it can't end before another one asks
        again = run_here('reproduce.py', *line, *folders(killed))
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert again.returncode == 2
    assert 'is being trained by another process' in again.stderr
    assert not (killed / 'results' / 'runs' / NAME).exists()
    reproduced(*line, *folders(killed), '--grad-checkpointing')  # as on a machine with less memory
    assert_same_run(killed / 'output' / NAME, whole / 'output' / NAME)
    results = json.loads((killed / 'results' / 'runs' / NAME / 'results.json').read_text())
    assert results['args']['output'] is None  # what others see has no paths of this machine
    assert results['model'] == 'sd_resnet20_cifar.c10'
    report = run_here('reproduce.py', 'report', '--results', killed / 'results')
    assert report.returncode == 0, report.stderr
    text = Path(report.stdout.strip()).read_text()
    (head, *rows), = tables(sections(text)['Figure 8, right: depth and p_L on CIFAR-10+, linear decay'])
    cells = {(row[0], depth): cell.split('/')[1].strip() for row in rows
             for depth, cell in zip(head[1:], row[1:], strict=True)}
    assert cells.pop(('0.5', '20 layers')) == f'{results["test_best"]["top1_err"]:.2f}'
    assert set(cells.values()) == {''}
    assert 'smoke, 4 epochs' in text
    assert (killed / 'results' / 'reproduction' / 'fig8_right-smoke.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.slow
def test_a_training_outlives_the_command_that_started_it(tmp_path):
    process = subprocess.Popen(command('reproduce.py', *ONE_RUN, '--processes', '2', *folders(tmp_path)),
                               stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        wait_until(lambda: checkpoints(tmp_path), process=process)
        process.kill()
        process.wait()
        wait_until((tmp_path / 'output' / NAME / 'results.json').exists)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_submitit_runs_it_too(tmp_path):
    result = bench('reproduce.py', *ONE_RUN, '--seeds', '1', '--cluster', 'local', '--cluster-options',
                   'timeout_min=10', *folders(tmp_path))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / 'results' / 'runs' / OTHER / 'results.json').exists()


@pytest.mark.slow
@pytest.mark.parametrize(('flags', 'why'), [
    ('{epochs: 99, amp: false}', 'epochs 99 -> 4'), ('amp: [', f'{NAME}/args.yaml can not be read')])
def test_a_failing_training_says_why_and_the_others_go_on(tmp_path, flags, why):
    folder = tmp_path / 'output' / NAME
    folder.mkdir(parents=True)
    (folder / 'args.yaml').write_text(flags)
    result = run_here('reproduce.py', *ONE_RUN, '--seeds', '0', '1', '--processes', '2', *folders(tmp_path))
    assert result.returncode == 2
    last = result.stderr.strip().splitlines()[-1]
    assert f'1 of 2 runs failed; {NAME}: ' in last
    assert why in last
    assert [path.parent.name for path in (tmp_path / 'results').rglob('results.json')] == [OTHER]


@pytest.mark.slow
def test_a_plan_times_a_step(tmp_path):
    plan = ['fig8_right', '--depth', '20', '--drop-path', '0.5', '--budget', 'full', '--plan']
    result = bench('reproduce.py', *plan, *folders(tmp_path))
    assert result.returncode == 0, result.stderr
    assert float(result.stdout.splitlines()[1].split()[-1]) > 0
    assert not list(tmp_path.iterdir())
