"""Two machines of two processes each, on loopback, that share no folder: home, data, cache and output are their own."""
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from support.commands import BENCH, summary
from support.data import write_classes
from support.processes import free_port, ranks
from support.waiting import wait_until

pytestmark = pytest.mark.slow

# train.py, with every draw of gates written down. A machine may run other code before that.
NOTED = f"""
import os, runpy, sys, time
from timm_sd.gates import DepthGates
draw = DepthGates.draw
def noted(gates):
    is_open = draw(gates)
    with open(os.path.join(os.environ['HOME'], 'gates' + os.environ['RANK']), 'a') as file:
        print(gates.epoch, gates.step, *map(int, is_open), file=file)
    time.sleep(float(os.environ.get('SECONDS_A_STEP', 0)))
    return is_open
DepthGates.draw = noted
sys.argv[0] = {str(BENCH / 'train.py')!r}
sys.path.insert(0, {str(BENCH)!r})
exec(os.environ.get('FIRST', ''))
runpy.run_path(sys.argv[0], run_name='__main__')
"""
FLAGS = ['--model', 'sd_resnet20_cifar', '--img-size', '8', '--epochs', '4', '-b', '2', '--no-amp', '--threads', '1',
         '--val-per-class', '3', '--drop-path', '0.5', '--mixup', '0.8', '--reprob', '0.3', '--model-ema',
         '--model-ema-decay', '0.9', '--output', 'output', '--experiment', 'a', '--resume', 'auto']


class Machines:
    """Two of them, each in a folder of its own; `start` starts a training on both."""

    def __init__(self, place):
        self.homes = [place / f'machine{rank}' for rank in range(2)]
        for home in self.homes:
            home.mkdir(parents=True)
            (home / 'noted.py').write_text(NOTED)
        write_classes(self.homes[0] / 'data', train=12, test=5)
        shutil.copytree(self.homes[0] / 'data', self.homes[1] / 'data')

    def start(self, *more, pause=0):
        """Starts both; `more` holds flags for both, or a list of flags for each machine; `pause` is of each step."""
        port, started = free_port(), []
        for rank, home in enumerate(self.homes):
            own = [flag for flags in more for flag in (flags[rank] if isinstance(flags, tuple) else [flags])]
            env = {key: value for key, value in os.environ.items() if not key.startswith(('ACCELERATE', 'HF_HOME'))}
            env.update(HOME=str(home), HF_HOME=str(home / 'hub'), TMPDIR=str(home), CUDA_VISIBLE_DEVICES='',
                       SECONDS_A_STEP=str(pause))
            started.append(subprocess.Popen(
                [sys.executable, '-m', 'torch.distributed.run', '--nnodes', '2', '--node-rank', str(rank),
                 '--nproc-per-node', '2', '--master-addr', '127.0.0.1', '--master-port', str(port), 'noted.py', *FLAGS,
                 '--data-dir', 'data', *own],
                cwd=home, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started

    def run(self, *more):
        """Runs both to their end; returns their launchers' status and what was said."""
        started = self.start(*more)
        try:
            said = [process.communicate(timeout=300) for process in started]
        finally:
            kill(started)
        return [(process.returncode, *texts) for process, texts in zip(started, said, strict=True)]

    def gates(self):
        """What each of the four processes drew: epoch, step, and which blocks were open; the last draw of each."""
        drawn = []
        for rank in range(4):
            lines = (self.homes[rank // 2] / f'gates{rank}').read_text().splitlines()
            drawn.append({tuple(line.split()[:2]): line.split()[2:] for line in lines})
        return drawn


def kill(processes):
    """Ends launchers and what they started, at once."""
    for process in processes:
        if process.poll() is None:
            for pid in (process.pid, *ranks(process)):
                os.kill(pid, signal.SIGKILL)
            process.communicate()


def test_two_machines_without_a_shared_folder(tmp_path):
    undisturbed, machines = Machines(tmp_path / 'whole'), Machines(tmp_path / 'killed')
    (status, stdout, stderr), other = undisturbed.run('--require-processes', '4')
    assert (status, other[0]) == (0, 0), stderr + other[2]
    assert '4 processes x batch 2' in stderr
    assert json.loads(stdout.splitlines()[-1])['epochs'] == 4
    assert not (undisturbed.homes[1] / 'output').exists()
    first, *others = undisturbed.gates()
    assert len(first) == 4 * 4  # 36 images, 8 a step; the last 4 are less than two for each process
    assert len({tuple(is_open) for is_open in first.values()}) > 5
    assert all(drawn == first for drawn in others)

    # one machine is lost, both go on, the second by the line that it was started with
    started = machines.start(pause=0.3)
    try:
        wait_until(lambda: list(machines.homes[0].glob('output/a/checkpoints/checkpoint-0002.pt')), process=started[0])
        kill(started[1:])
        started[0].communicate(timeout=60)
        assert started[0].returncode != 0
    finally:
        kill(started)
    assert not (machines.homes[0] / 'output/a/results.json').exists()
    (status, _, stderr), other = machines.run()
    assert (status, other[0]) == (0, 0), stderr + other[2]
    # Not bit for bit: DDP groups the gradients anew after its first step, and the sum of four depends on their groups.
    ours, theirs = (summary(place.homes[0] / 'output/a') for place in (machines, undisturbed))
    for row, other_row in zip(ours, theirs, strict=True):
        assert {key: float(value) for key, value in row.items()} == pytest.approx(
            {key: float(value) for key, value in other_row.items()}, rel=1e-5)
    assert machines.gates() == undisturbed.gates()
    # what is complete is told to all
    assert [found[0] for found in machines.run()] == [0, 0]


@pytest.mark.parametrize(('own', 'words'), [
    (([], ['--lr', '0.2']), '--lr is 0.2 in process 2 on'),
    (([], ['--data-dir', 'nowhere']), 'as a local folder is not found in process 2 on'),
    (([], ['--data-dir', 'changed']), 'has other files than that of process 0: copy it anew'),
])
def test_a_difference_between_machines_is_one_line_before_training(tmp_path, own, words):
    machines = Machines(tmp_path)
    shutil.copytree(machines.homes[1] / 'data', machines.homes[1] / 'changed')
    for path in (machines.homes[1] / 'changed').rglob('*.parquet'):
        path.write_bytes(path.read_bytes() + b'.')
    found = machines.run(own)
    assert all(status != 0 for status, _, _ in found)
    for _, _, stderr in found:
        lines = [line for line in stderr.splitlines() if 'error: ' in line and 'train.py' in line]
        assert len(lines) == 1, stderr
        assert words in lines[0]
    assert not list(machines.homes[0].glob('output/a/*'))


def test_other_code_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv('FIRST', "if os.environ['RANK'] == '2':\n    import harness.machine\n"
                                "    harness.machine.code_digest = lambda: 'another'")
    found = Machines(tmp_path).run()
    assert all(status != 0 and "timm-sd's code is another in process 2" in stderr for status, _, stderr in found)


SHORT = ['--epochs', '1', '--data-dir', 'data']


def test_the_slurm_script_as_it_would_be_pasted(tmp_path):
    """By a Slurm of two shell scripts: `srun` runs its command twice, as two nodes would."""
    machines = Machines(tmp_path / 'nodes')
    for name, text in (('scontrol', 'echo 127.0.0.1; echo node1'), ('srun', """
shift
for node in 0 1; do
    (cd "$NODES$node" && SLURM_NODEID=$node HOME=$PWD HF_HOME=$PWD/hub "$@") & pids="${pids:-} $!"
done
for pid in $pids; do wait $pid || exit 1; done""")):
        (tmp_path / name).write_text(f'#!/bin/bash\n{text}\n')
        (tmp_path / name).chmod(0o755)
    for home in machines.homes:
        (home / 'bench').symlink_to(BENCH)
    env = dict(os.environ, PATH=f'{tmp_path}:{os.path.dirname(sys.executable)}:{os.environ["PATH"]}',
               NODES=str(tmp_path / 'nodes' / 'machine'), SLURM_JOB_NODELIST='node[0-1]', SLURM_NNODES='2',
               SLURM_JOB_ID=str(free_port() - 20000), SLURM_GPUS_ON_NODE='2', SLURM_NTASKS='2', CUDA_VISIBLE_DEVICES='')
    script = BENCH / 'recipes' / 'slurm_2_nodes.sbatch'
    result = subprocess.run(['bash', script, *FLAGS[:-4], *SHORT], env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert '4 processes x batch 2' in result.stderr
    assert 'warning' not in result.stderr
    assert [bool(list(home.glob('output/*/results.json'))) for home in machines.homes] == [True, False]


def test_the_script_for_accelerate_as_it_would_be_pasted(tmp_path):
    machines, port, started = Machines(tmp_path), free_port(), []
    for rank, home in enumerate(machines.homes):
        (home / 'bench').symlink_to(BENCH)
        env = dict(os.environ, PATH=f'{os.path.dirname(sys.executable)}:{os.environ["PATH"]}', GPUS='2', PORT=str(port),
                   HOME=str(home), HF_HOME=str(home / 'hub'), ACCELERATE_USE_CPU='true', CUDA_VISIBLE_DEVICES='')
        started.append(subprocess.Popen(
            ['bash', str(BENCH / 'recipes' / 'accelerate_2_machines.sh'), str(rank), '127.0.0.1', *FLAGS[:-2], *SHORT],
            cwd=home, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    try:
        said = [process.communicate(timeout=300) for process in started]
    finally:
        kill(started)
    assert [process.returncode for process in started] == [0, 0], said
    assert '4 processes x batch 2' in said[0][1]
