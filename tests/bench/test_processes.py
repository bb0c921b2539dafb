"""Several real processes (gloo): the update of one process, kill -9 of a rank, signals, torchrun's restarts."""
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from accelerate import Accelerator, PartialState

from harness.run_folder import RunFolder
from support.commands import BENCH, assert_same_errors, assert_same_run, read_csv, read_results, run_here
from support.processes import free_port, ranks
from support.ranks import on_two_ranks
from support.updates import check_updates
from support.waiting import hear_sigint, wait_until

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


# Without batch norm, whose statistics are those of a process's own images.
MIXED = ['--model', 'convnext_atto', '--model-kwargs', 'depths=[1,2,1,1]', 'dims=[8,16,16,16]', '--img-size', '32',
         '--epochs', '2', '--warmup-epochs', '0', '--no-amp', '--threads', '1', '--drop-path', '0.3', '--opt', 'adamw',
         '--lr', '1e-3', '--mixup', '0.8', '--cutmix', '1', '--reprob', '0.5', '--vflip', '0.5', '--smoothing', '0.1',
         '--bce-loss', '--clip-grad', '0.5', '--layer-decay', '0.8', '--model-ema', '--model-ema-decay', '0.9',
         '--drop-path-when', 'early', '--drop-path-cutoff', '1']


def mixed_training():
    """The summary is that of one process, which the folder ALONE holds, up to the order in which floats are added."""
    with tempfile.TemporaryDirectory() as output:
        result = run_here('train.py', *MIXED, '-b', '32', '--require-processes', '2', '--output', output,
                          '--experiment', 'a')
        assert result.returncode == 0, result.stderr
        if PartialState().is_main_process:
            ours, theirs = (read_csv(Path(place, 'a', 'summary.csv')) for place in (output, os.environ['ALONE']))
            for row, other in zip(ours, theirs, strict=True):
                for key in row.keys() - {'train_seconds', 'eval_top1', 'eval_top5', 'eval_top1_ema', 'eval_top5_ema'}:
                    assert float(row[key]) == pytest.approx(float(other[key]), rel=1e-3), key


def two_ranks():
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    return accelerator


def test_two_ranks_update_as_one_process():
    on_two_ranks(update_every_batch, update_every_second_batch)


def test_two_ranks_mix_erase_clip_and_average_as_one_process(tmp_path, monkeypatch):
    alone = run_here('train.py', *MIXED, '-b', '64', '--output', tmp_path, '--experiment', 'a')
    assert alone.returncode == 0, alone.stderr
    monkeypatch.setenv('ALONE', str(tmp_path))
    on_two_ranks(mixed_training)


def test_two_ranks_evaluate_in_batches_of_any_size():
    on_two_ranks(evaluation_in_batches_of_their_own_size)


# --- accelerate launch bench/train.py, by the README's lines

TODAY = ['--mixup', '0.8', '--reprob', '0.3', '--clip-grad', '1', '--model-ema', '--model-ema-decay', '0.9']
TRAIN = ['--model', 'sd_resnet20_cifar', '--img-size', '8', '--epochs', '3', '--no-amp', '--threads', '1']


def launch(output, *launcher_args, port=None, more=()):
    """A launcher of two processes, or one of two launchers of one each."""
    launcher = [sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2',
                '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', str(port or free_port()),
                *(launcher_args or ('--num_machines', '1'))]
    return subprocess.Popen(
        [*launcher, str(BENCH / 'train.py'), *flags(2, output), *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=dict(os.environ, ACCELERATE_USE_CPU='true'), preexec_fn=hear_sigint)


def flags(processes, output):
    """Those of train.py, for a batch of 64 images of all processes together."""
    return [*TRAIN, *TODAY, '-b', str(64 // processes), '--require-processes', str(processes), '--output', str(output),
            '--experiment', 'a', '--resume', 'auto']


def done(process):
    """The results and what was said on stderr."""
    try:
        stdout, stderr = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, stderr
    return json.loads(stdout.splitlines()[-1]), stderr


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


def torchrun(output, *launcher_args, more=()):
    """torchrun of two processes, without Accelerate's variables."""
    env = {key: value for key, value in os.environ.items() if not key.startswith('ACCELERATE')}
    return subprocess.Popen(
        [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--master-port', str(free_port()),
         *launcher_args, str(BENCH / 'train.py'), *flags(2, output), *more], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=dict(env, CUDA_VISIBLE_DEVICES=''), preexec_fn=hear_sigint)


def checkpoints(output):
    return [*(output / 'a' / 'checkpoints').glob('checkpoint-*.pt')]


def test_restarts_with_a_store_that_outlives_them_are_refused(tmp_path):
    process = torchrun(tmp_path, '--standalone', '--max-restarts', '1')
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0
    assert 'set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1' in stderr
    assert not (tmp_path / 'a').exists()


def test_torchrun_restarts_a_killed_rank_and_the_run_ends_equal(tmp_path, monkeypatch):
    whole, header = done(torchrun(tmp_path / 'whole'))
    assert '2 processes x batch 32' in header
    monkeypatch.setenv('TORCH_DISABLE_SHARE_RDZV_TCP_STORE', '1')
    process = torchrun(tmp_path / 'killed', '--standalone', '--max-restarts', '1')
    try:
        wait_until(lambda: checkpoints(tmp_path / 'killed'), process=process)
        os.kill(ranks(process)[1], signal.SIGKILL)
        restarted, stderr = done(process)
    finally:
        process.kill()
    assert stderr.count('2 processes x batch 32') == 2
    assert_same_run(tmp_path / 'killed' / 'a', tmp_path / 'whole' / 'a')
    assert restarted['test_last'] == whole['test_last']


@pytest.mark.parametrize('start', [torchrun, launch], ids=['torchrun', 'accelerate'])
@pytest.mark.parametrize(('rank', 'number', 'words'), [
    (None, signal.SIGINT, 'stopped by SIGINT;'), (None, signal.SIGTERM, 'stopped by SIGTERM;'),
    (0, signal.SIGKILL, ''), (1, signal.SIGKILL, '')])
def test_processes_end_with_one_line_in_all_and_go_on(tmp_path, start, rank, number, words):
    """A signal to the launcher, or the loss of one rank, of which the others hear from gloo or from the launcher."""
    process = start(tmp_path, more=['--epochs', '1000'])
    try:
        wait_until(lambda: checkpoints(tmp_path), process=process)
        os.kill(process.pid if rank is None else ranks(process)[rank], number)
        _, stderr = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode != 0
    assert stderr.count('train.py: ') == 1, stderr
    said = stderr.partition('train.py: ')[2].splitlines()[0]
    assert said.endswith('; to go on, run the same line again')  # which has --resume auto
    assert said.startswith(words or ('another process of this training is gone (', 'stopped by SIGTERM;'))
    assert f'File "{BENCH}' not in stderr  # the traceback is the launcher's own
    assert RunFolder(tmp_path / 'a').load_checkpoint()['epoch'] >= 1
