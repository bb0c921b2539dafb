"""train.py in a process of its own: killed with kill -9, or on a full disk, it goes on as if nothing had been."""
import json
import resource
import subprocess

import pytest

from harness.run_folder import RunFolder
from support.commands import SMALL, assert_same_run, bench, command, read_results, run_here
from support.waiting import wait_until

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    """The folder of a whole run."""
    output = tmp_path_factory.mktemp('output')
    result = run_here('train.py', *SMALL, '--output', output, '--experiment', 'a')
    assert result.returncode == 0, result.stderr
    return output / 'a'


def test_resume_after_kill_9_gives_the_same_weights(undisturbed, tmp_path):
    args = [*SMALL, '--output', tmp_path, '--experiment', 'b', '--resume', 'auto']
    folder = tmp_path / 'b'
    for checkpoint in ('args.yaml', 'checkpoints/checkpoint-0001.pt', 'checkpoints/checkpoint-0002.pt'):
        with subprocess.Popen(command('train.py', *args), stderr=subprocess.DEVNULL,
                              stdout=subprocess.DEVNULL) as process:
            try:
                wait_until((folder / checkpoint).exists, process=process)
            finally:
                process.kill()
        assert not (folder / 'results.json').exists()
    result = bench('train.py', *args)
    assert result.returncode == 0, result.stderr
    assert_same_run(folder, undisturbed)
    assert json.loads(result.stdout) == dict(run_folder=str(folder), **read_results(folder))


def test_kill_9_loses_no_more_epochs_than_lie_between_checkpoints(toy_flags, tmp_path):
    """Killed twice, it still equals a run of one checkpoint an epoch."""
    args = [*toy_flags, '--epochs', '10', '--output', tmp_path, '--experiment']
    whole = run_here('train.py', *args, 'a')
    assert whole.returncode == 0, whole.stderr
    args += ['b', '--checkpoint-interval', '3', '--resume', 'auto']
    folder = RunFolder(tmp_path / 'b')
    for epochs in (2, 5):
        with subprocess.Popen(command('train.py', *args), stderr=subprocess.DEVNULL,
                              stdout=subprocess.DEVNULL) as process:
            try:
                wait_until(lambda epochs=epochs: folder.epochs_written() >= epochs, process=process)
            finally:
                process.kill()
        assert folder.read_results() is None
    saved = folder.load_checkpoint()['epoch']
    assert saved % 3 == 0
    assert folder.epochs_written() - saved <= 3
    resumed = run_here('train.py', *args)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stderr.count('train_loss') == 10 - saved
    assert_same_run(tmp_path / 'b', tmp_path / 'a')
    assert sorted(path.name for path in folder.checkpoints.glob('checkpoint-*')) == [
        'checkpoint-0009.pt', 'checkpoint-0010.pt']


def test_resume_after_kill_9_of_a_run_whose_workers_read(toy_flags, tmp_path):
    args = [*toy_flags, '--no-in-memory', '-j', '2', '--val-split', 'test', '--epochs', '6', '--output', tmp_path,
            '--resume', 'auto', '--experiment']
    whole = run_here('train.py', *args, 'a')
    assert whole.returncode == 0, whole.stderr
    with subprocess.Popen(command('train.py', *args, 'b'), stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL) as process:
        try:
            wait_until((tmp_path / 'b' / 'checkpoints' / 'checkpoint-0001.pt').exists, process=process)
        finally:
            process.kill()
    assert not (tmp_path / 'b' / 'results.json').exists()
    resumed = run_here('train.py', *args, 'b')
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(tmp_path / 'a', tmp_path / 'b')


def test_full_disk_keeps_the_last_checkpoint(undisturbed, tmp_path):
    args = [*SMALL, '--output', tmp_path, '--experiment', 'd', '--resume', 'auto']
    folder = tmp_path / 'd'
    with subprocess.Popen(command('train.py', *args), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                          text=True) as process:
        try:
            wait_until((folder / 'checkpoints' / 'checkpoint-0001.pt').exists, process=process)
            # from now on no file may grow beyond 100 kB: a write fails half-way, as on a full disk
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
            _, stderr = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 2
    assert stderr.splitlines()[-1].startswith('train.py: error: ')
    assert 'can not be written' in stderr.splitlines()[-1]
    assert not list(folder.rglob('.*.tmp'))
    assert (folder / 'checkpoints' / 'checkpoint-0001.pt').exists()
    result = run_here('train.py', *args)
    assert result.returncode == 0, result.stderr
    assert 'damaged' not in result.stderr
    assert_same_run(folder, undisturbed)
