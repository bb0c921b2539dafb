"""What other systems lack, hidden in real processes: fcntl and SIGCHLD on Windows, fork there and on macOS."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.commands import BENCH, ROOT, assert_same_run, bench, command, refused, run_here
from support.data import write_classes
from support.waiting import hear_sigint, wait_until

# Python runs it at its start, in workers too. What others take from these modules is imported before.
WINDOWS = """
import fcntl, filelock, multiprocessing, os, selectors, signal, subprocess, sys, types

def locking(file, mode, size, lock=fcntl.lockf, flags=fcntl.LOCK_EX | fcntl.LOCK_NB):
    assert (mode, size) == (2, 1)
    lock(file, flags)

msvcrt = types.ModuleType('msvcrt')
msvcrt.LK_NBLCK, msvcrt.locking = 2, locking
sys.modules.update(msvcrt=msvcrt, fcntl=None, grp=None, pwd=None)
if 'NO_SIGCHLD' in os.environ:  # torch's own workers want it, as this is no Windows
    del signal.SIGCHLD
multiprocessing.set_start_method('spawn')
"""
STREAM = ['--streaming', '--epoch-size', '16', '--val-split', 'test']


@pytest.fixture
def windows(tmp_path):
    """The environment of a process that lacks them."""
    folder = tmp_path / 'system'
    folder.mkdir()
    (folder / 'sitecustomize.py').write_text(WINDOWS)
    return dict(os.environ, PYTHONPATH=os.pathsep.join([str(folder), *filter(None, [os.environ.get('PYTHONPATH')])]))


def flags(data, output, *more):
    """Of a short training whose images are read by two workers."""
    return ['--model', 'sd_resnet20_cifar', '--img-size', '8', '--data-dir', data, '--no-in-memory', '-j', '2', '-b',
            '8', '--threads', '1', '--no-amp', '--output', output, *more, '--experiment']


@pytest.mark.slow
@pytest.mark.parametrize('script', [path.name for path in BENCH.glob('*.py')])
def test_every_script_starts(windows, script):
    result = bench(script, '--help', env=windows)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize('kind', [['--val-per-class', '3'], STREAM], ids=['rows', 'stream'])
def test_a_training_with_spawned_workers_is_the_same(windows, tmp_path, kind):
    data = write_classes(tmp_path / 'data', train=12, test=5)
    args = flags(data, tmp_path, *kind, '--epochs', '2')
    ours = bench('train.py', *args, 'ours', env=windows)
    assert ours.returncode == 0, ours.stderr
    theirs = run_here('train.py', *args, 'theirs')
    assert theirs.returncode == 0, theirs.stderr
    assert_same_run(tmp_path / 'ours', tmp_path / 'theirs')


@pytest.mark.slow
def test_a_run_folder_is_locked_and_a_signal_is_one_line(windows, toy_folder, tmp_path):
    args = flags(toy_folder, tmp_path, '--epochs', '1000', '--val-per-class', '3', '--resume', 'auto')
    args = [arg for arg in args if arg not in ('--no-in-memory', '-j', '2')]
    with subprocess.Popen(command('train.py', *args, 'a'), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                          env=dict(windows, NO_SIGCHLD='1')) as process:
        try:
            wait_until((tmp_path / 'a' / 'checkpoints' / 'checkpoint-0001.pt').exists, process=process)
            other = bench('train.py', *args, 'a', env=windows)
            process.send_signal(signal.SIGTERM)
            _, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 143, stderr
    assert 'Traceback' not in stderr
    assert other.returncode == 2, other.stderr
    assert 'is being trained by another process' in other.stderr.splitlines()[-1]


WITH_A_WORKER = """
import multiprocessing, signal, time
from harness.cli import run_script

def main():
    worker = multiprocessing.get_context('fork').Process(target=time.sleep, args=(1000,))
    worker.start()
    print('started', flush=True)
    worker.join()

del signal.SIGCHLD
run_script(main)
"""


@pytest.mark.slow
def test_a_signal_ends_workers_where_sigchld_is_missing():
    with subprocess.Popen([sys.executable, '-c', WITH_A_WORKER], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True, env=dict(os.environ, PYTHONPATH=f'{BENCH}{os.pathsep}{ROOT}')) as process:
        try:
            assert process.stdout.readline() == 'started\n'
            process.terminate()
            _, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, stderr) == (143, '-c: stopped by SIGTERM; to go on, run the same line again\n')


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='needs /proc')
def test_ctrl_c_while_workers_import_is_one_line(windows, toy_folder, tmp_path):
    """It reaches the workers too, which import the script again."""
    def is_worker(pid):
        return b'spawn_main' in Path(f'/proc/{pid}/cmdline').read_bytes()

    args = flags(toy_folder, tmp_path, '--epochs', '1000', '--val-per-class', '3')
    with subprocess.Popen(command('train.py', *args, 'a'), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          env=windows, preexec_fn=hear_sigint, start_new_session=True) as process:
        children = Path(f'/proc/{process.pid}/task/{process.pid}/children')
        try:
            wait_until(lambda: sum(map(is_worker, children.read_text().split())) == 2, process=process)
            workers = [pid for pid in children.read_text().split() if is_worker(pid)]
            wait_until(lambda: all('libtorch_cpu' in Path(f'/proc/{pid}/maps').read_text() for pid in workers))
            process.send_signal(signal.SIGSTOP)  # so that it doesn't end them first
            os.killpg(process.pid, signal.SIGINT)
            wait_until(lambda: all(') Z ' in Path(f'/proc/{pid}/stat').read_text() for pid in workers))
            process.send_signal(signal.SIGCONT)
            _, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, stderr
    assert stderr.count('stopped by') == 1, stderr
    assert 'Traceback' not in stderr


@pytest.mark.parametrize('name', ['a:b', 'a*', 'what?', '<a>', 'a|b', 'a"b', 'a\\b', 'a/b', 'a.', 'a ', '..', '', 'NUL',
                                  'con', 'com1.txt', 'LPT9', 'aux .a'])
def test_a_run_folder_has_a_name_that_every_system_can_have(name, tmp_path):
    assert 'must be the name of one folder' in refused('train.py', '--output', tmp_path, '--experiment', name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', ['a', 'resnet-110_p0.5', '.a', 'console', 'com', 'été', 'a b'])
def test_other_names_are_taken(name, tmp_path):
    said = refused('train.py', '--output', tmp_path, '--experiment', name, '--data-dir', tmp_path / 'nowhere')
    assert 'must be the name' not in said
