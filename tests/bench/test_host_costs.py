"""throughput.py --host times the gate and what autograd takes, not the kernels of a branch."""
import json
import math

import pytest
import torch
from torch import nn

import timing.host
import timm_sd
from support.commands import run_here

NAMES = ['zero gradients alone', 'closed, scale train', 'open, scale train, over constant depth',
         'closed, scale eval', 'open, scale eval, over constant depth']


def test_the_costs_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(timing.host, 'BLOCKS', 2)
    result = run_here('throughput.py', '--host', '--rounds', '2', '--output', tmp_path / 'out')
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / 'out.json').read_text())['rows']
    assert [row['name'] for row in rows] == NAMES
    assert all(math.isfinite(row['microseconds']['median']) for row in rows)


@pytest.mark.parametrize(('rate', 'batch_norms'), [
    (0., 1),
    (timing.host.NEVER, 1),  # an open block
    (timing.host.ALWAYS, 0),  # a closed one
])
@pytest.mark.parametrize('scale', timm_sd.SCALES)
def test_a_light_block_runs_one_batch_norm_and_no_convolution(rate, batch_norms, scale):
    ran = []
    stage = timing.host._stage(timing.host._LightBlock, rate, scale)
    for module in stage.modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
            module.register_forward_hook(lambda module, args, output: ran.append(type(module)))
    timing.host._turn(stage)
    assert ran == timing.host.PASSES * timing.host.BLOCKS * batch_norms * [nn.BatchNorm2d]


def test_zero_gradients_alone_are_those_of_all_parameters():
    stage = timing.host._stage(timing.host._ZerosAlone)
    for block in stage:
        assert [id(param) for param in block.all_parameters] == [id(param) for param in block.parameters()]
    stage(torch.randn(2, 16, 2, 2)).sum().backward()
    assert all(param.grad is not None and not param.grad.any() for param in stage.parameters())
