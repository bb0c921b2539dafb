"""python -m timm_sd --drop-path-mode batch, in front of timm's own, unmodified train.py and validate.py."""
import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

TIMM = Path(__file__).parents[3] / 'shared' / 'peers' / 'timm'
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not TIMM.exists(), reason="timm's scripts are not here: ../shared")]

# Runs a script, and notes each draw of gates. On CPUs too timm's script gives DDP device_ids, which are for GPUs alone.
RECORDER = """
import json, os, runpy, sys
from torch.nn.parallel import DistributedDataParallel
from timm_sd.gates import DepthGates

file, *sys.argv = sys.argv[1:]
draw, init = DepthGates.draw, DistributedDataParallel.__init__

def noting(self):
    key = self._key()
    print(json.dumps([key, draw(self)]), file=open(file + os.environ.get('RANK', '0'), 'a'))
    return self.open

DepthGates.draw = noting
DistributedDataParallel.__init__ = lambda self, *args, device_ids, **kwargs: init(self, *args, **kwargs)
runpy.run_path(sys.argv[0], run_name='__main__')
"""
STEPS = 4  # an epoch
FLAGS = ['--num-classes', '2', '--img-size', '64', '-b', '8', '--workers', '0', '--device', 'cpu']


class Runs:
    """Runs timm's train.py on noise, and reads what it left."""

    def __init__(self, folder):
        self.folder, self.recorder = folder, folder / 'recorder.py'
        self.recorder.write_text(RECORDER)
        noise = np.random.default_rng(0).integers(0, 256, (4 * STEPS, 64, 64, 3), dtype=np.uint8)
        for split, images in (('train', 4 * STEPS), ('validation', 8)):
            for label in ('cat', 'dog'):
                place = folder / 'images' / split / label
                place.mkdir(parents=True)
                for index in range(images):
                    Image.fromarray(noise[index]).save(place / f'{index}.png')

    def train(self, name, *flags, epochs=1, model='resnet18', python=(sys.executable,),
              prefix=('--drop-path-mode', 'batch')):
        command = [*python, '-m', 'timm_sd', *prefix,
                   self.recorder, self.folder / name, TIMM / 'train.py', '--data-dir', self.folder / 'images', *FLAGS,
                   '--model', model, '--drop-path', '0.5', '--opt', 'sgd', '--lr', '0.01', '--warmup-epochs', '0',
                   '--epochs', epochs, '--output', self.folder / 'output', '--experiment', name, *flags]
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-2000:]
        return result.stderr

    def gates(self, name, rank=0):
        """The draws of a run, each with the seed, the epoch and the step that it is for."""
        return dict(map(json.loads, Path(f'{self.folder / name}{rank}').read_text().splitlines()))

    def summary(self, name):
        return list(csv.DictReader((self.folder / 'output' / name / 'summary.csv').open()))


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp('timm'))


@pytest.fixture(scope='module')
def undisturbed(runs):
    """Three epochs in one run."""
    stderr = runs.train('undisturbed', epochs=3)
    assert 'timm_sd: resnet18: 8 residual blocks have gates, layer1.0 to layer4.1: mode batch, scale train, linear ' \
           'to a rate of 0.5, seed 42; a training step runs 74% of the multiplications\n' in stderr
    return runs.gates('undisturbed')


def test_gates_are_drawn_for_each_step_of_each_epoch(undisturbed):
    assert list(undisturbed) == [f'42/{epoch}/{step}' for epoch in range(3) for step in range(STEPS)]
    assert {len(gates) for gates in undisturbed.values()} == {8}
    assert len({tuple(gates) for gates in undisturbed.values()}) > STEPS


@pytest.mark.parametrize('flags', [[], ['--sched-on-updates'], ['--sched', 'plateau']])
def test_a_resumed_run_draws_the_gates_of_the_undisturbed_one(runs, undisturbed, flags):
    name = '-'.join(['resumed', *flags])
    runs.train(name, *flags, '--resume', runs.folder / 'output' / 'undisturbed' / 'checkpoint-1.pth.tar', epochs=3)
    assert runs.gates(name) == {key: gates for key, gates in undisturbed.items() if key.startswith('42/2/')}


def test_a_run_of_the_same_seed_learns_the_same(runs, undisturbed):
    runs.train('again', epochs=3)
    assert runs.summary('again') == runs.summary('undisturbed')


def test_two_processes_draw_the_same_gates(runs, undisturbed):
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
    stderr = runs.train('two', python=torchrun)
    assert stderr.count('residual blocks have gates') == 1
    assert runs.gates('two', rank=0) == runs.gates('two', rank=1) == {
        key: gates for key, gates in undisturbed.items() if key in ('42/0/0', '42/0/1')}


@pytest.mark.parametrize(('name', 'model', 'flags'), [
    ('amp', 'resnet18', ['--amp', '--amp-dtype', 'bfloat16']),
    ('ema', 'resnet18', ['--model-ema', '--model-ema-decay', '0.5']),
    ('checkpointing', 'convnext_atto', ['--grad-checkpointing']),
    ('compiled', 'test_vit', ['--torchcompile']),
])
def test_with_flags_of_timms(runs, name, model, flags):
    runs.train(name, *flags, model=model, epochs=2)
    gates = runs.gates(name)
    assert list(gates) == [f'42/{epoch}/{step}' for epoch in range(2) for step in range(STEPS)]
    assert [float(row['train_loss']) > 0 for row in runs.summary(name)] == [True, True]


def test_without_the_flag_no_gate_is_drawn_but_advice_is_given(runs):
    stderr = runs.train('plain', prefix=())
    assert "timm_sd: resnet18 gets timm's DropPath" in stderr
    assert not (runs.folder / 'plain0').exists()


def test_rates_change_over_the_epochs(runs):
    early = '--drop-path-when', 'early', '--drop-path-cutoff', '2'
    stderr = runs.train('early', prefix=early, epochs=4)
    assert 'timm_sd: drop path rates over 4 epochs: early (before epoch 2), constant' in stderr
    gates = runs.gates('early')
    closed = {key: not all(is_open) for key, is_open in gates.items()}
    assert any(closed.values())
    assert not any(is_closed for key, is_closed in closed.items() if key.startswith(('42/2/', '42/3/')))
    checkpoint = runs.folder / 'output' / 'early' / 'checkpoint-0.pth.tar'
    runs.train('early_again', '--resume', checkpoint, prefix=early, epochs=4)
    assert runs.gates('early_again') == {key: is_open for key, is_open in gates.items() if not key.startswith('42/0/')}


def test_our_networks_follow_the_epoch_too(runs):
    runs.train('ours', model='sd_resnet20_cifar', prefix=(), epochs=2)
    assert list(runs.gates('ours')) == [f'42/{epoch}/{step}' for epoch in range(2) for step in range(STEPS)]


def test_timms_validate_evaluates_what_was_trained(runs, undisturbed):
    best = runs.folder / 'output' / 'undisturbed' / 'last.pth.tar'
    outputs = [subprocess.run(
        [*python, TIMM / 'validate.py', '--data-dir', runs.folder / 'images', '--split', 'validation', '--model',
         'resnet18', '--checkpoint', best, *FLAGS], capture_output=True, text=True, check=True).stdout
        for python in ([sys.executable, '-m', 'timm_sd', '--drop-path-mode', 'batch'], [sys.executable])]
    ours, plain = (json.loads(output.partition('--result\n')[2]) for output in outputs)
    assert (ours['top1'], ours['top5'], ours['param_count']) == (plain['top1'], plain['top5'], plain['param_count'])
