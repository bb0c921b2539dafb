"""Several real processes (gloo): the update of one process, kill -9 of a rank, processes that don't know each other."""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from accelerate import Accelerator, PartialState

from support.commands import BENCH, assert_same_errors, assert_same_run, read_csv, read_results, run_here
from support.ranks import on_two_ranks
from support.updates import check_updates
from support.waiting import wait_until

pytestmark = pytest.mark.slow


def update_every_batch():
    check_updates(two_ranks(), 1)


def update_every_second_batch():
    check_updates(two_ranks(), 2)


def evaluation_in_batches_of_their_own_size():
    """140 validation images and 64 a step in training; the run folder is the first rank's."""
    with tempfile.TemporaryDirectory() as output:
        folders = []
        for size in ([], ['-vb', '9']):
            result = run_here('train.py', *TRAIN, '--epochs', '1', '-b', '32', *size, '--require-processes', '2',
                              '--output', output, '--experiment', f'run{len(folders)}')
            assert result.returncode == 0, result.stderr
            folders.append(Path(output, f'run{len(folders)}'))
        if PartialState().is_main_process:
            assert_same_errors(*folders)


def two_ranks():
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    return accelerator


def test_two_ranks_update_as_one_process():
    on_two_ranks(update_every_batch, update_every_second_batch)


def test_two_ranks_evaluate_in_batches_of_any_size():
    on_two_ranks(evaluation_in_batches_of_their_own_size)


# --- accelerate launch bench/train.py, by the README's lines

TRAIN = ['--model', 'sd_resnet20_cifar', '--img-size', '8', '--epochs', '3', '--no-amp', '--threads', '1']


def free_port():
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return free.getsockname()[1]


def launch(output, *launcher_args, port=None, more=()):
    """A launcher of two processes, or one of two launchers of one each."""
    launcher = [sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2',
                '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', str(port or free_port()),
                *(launcher_args or ('--num_machines', '1'))]
    return subprocess.Popen(
        [*launcher, str(BENCH / 'train.py'), *flags(2, output), *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=dict(os.environ, ACCELERATE_USE_CPU='true'))


def flags(processes, output):
    """Those of train.py, for a batch of 64 images of all processes together."""
    return [*TRAIN, '-b', str(64 // processes), '--require-processes', str(processes), '--output', str(output),
            '--experiment', 'a', '--resume', 'auto']


def done(process):
    """The results and what was said on stderr."""
    try:
        stdout, stderr = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, stderr
    return json.loads(stdout.splitlines()[-1]), stderr


def ranks(launcher):
    """Process ids of the ranks that a launcher started, in their order."""
    children = Path(f'/proc/{launcher.pid}/task/{launcher.pid}/children')
    return [int(pid) for pid in children.read_text().split()]


def test_killed_rank_ends_the_run_and_resume_goes_on_exactly(tmp_path):
    # undisturbed: two "machines" of one process each
    port = free_port()
    machines = [launch(tmp_path / 'whole', '--num_machines', '2', '--machine_rank', str(rank),
                       '--main_process_ip', '127.0.0.1', port=port) for rank in range(2)]
    try:
        whole, header = done(machines[0])
        machines[1].communicate(timeout=240)
    finally:
        for machine in machines:
            machine.kill()
    assert '2 processes x batch 32' in header

    # disturbed: one machine of two processes, the second of which is killed after the first epoch
    disturbed = launch(tmp_path / 'killed')
    checkpoints = tmp_path / 'killed' / 'a' / 'checkpoints'
    try:
        wait_until(lambda: list(checkpoints.glob('checkpoint-*.pt')), process=disturbed)
        os.kill(ranks(disturbed)[1], signal.SIGKILL)
        _, stderr = disturbed.communicate(timeout=240)  # no rank waits for the dead one
    finally:
        disturbed.kill()
    assert disturbed.returncode != 0
    assert 'Signal 9 (SIGKILL)' in stderr
    assert not (tmp_path / 'killed' / 'a' / 'results.json').exists()

    # go on with one process, on a copy: the same global batch, so the same order and gates
    shutil.copytree(tmp_path / 'killed', tmp_path / 'one')
    alone = run_here('train.py', *flags(1, tmp_path / 'one'))
    assert alone.returncode == 0, alone.stderr
    assert '1 process x batch 64' in alone.stderr.splitlines()[0]

    resumed, _ = done(launch(tmp_path / 'killed'))
    assert_same_run(tmp_path / 'killed' / 'a', tmp_path / 'whole' / 'a')
    assert resumed['test_last'] == whole['test_last'] == read_results(tmp_path / 'whole' / 'a')['test_last']

    # batch norm sees 64 images there and 32 here, so the rest of the way is alike, not equal
    ours, theirs = (read_csv(tmp_path / name / 'a' / 'summary.csv') for name in ('one', 'whole'))
    assert {**ours[0], 'train_seconds': 0} == {**theirs[0], 'train_seconds': 0}
    assert float(ours[-1]['train_loss']) == pytest.approx(float(theirs[-1]['train_loss']), rel=0.2)
    assert len(ours) == 3


def test_every_rank_ends_where_no_checkpoint_can_be_read(tmp_path):
    assert run_here('train.py', *flags(1, tmp_path), '--epochs', '1').returncode == 0
    (tmp_path / 'a' / 'results.json').unlink()
    for path in (tmp_path / 'a' / 'checkpoints').glob('checkpoint-*'):
        path.write_bytes(b'damaged')
    before = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
    process = launch(tmp_path, more=['--epochs', '1'])
    try:
        _, stderr = process.communicate(timeout=240)  # no rank waits for another
    finally:
        process.kill()
    assert process.returncode != 0
    assert stderr.count('train.py: error: ') == 1
    assert 'has no checkpoint that can be read' in stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()} == before


def test_processes_that_do_not_train_together_are_refused(tmp_path):
    """torchrun without Accelerate's variables: two processes that know nothing of each other."""
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2', '--master_port',
                str(free_port()), str(BENCH / 'train.py'), *TRAIN, '--output', str(tmp_path)]
    env = {key: value for key, value in os.environ.items() if not key.startswith('ACCELERATE')}
    result = subprocess.run([*torchrun, '--require-processes', '2'], capture_output=True, text=True, timeout=240,
                            env=dict(env, CUDA_VISIBLE_DEVICES=''))
    assert result.returncode != 0
    assert 'train.py: error: --require-processes is 2, but here train 1 process (of 2 started, which' \
        in result.stderr
    assert not list(tmp_path.iterdir())
