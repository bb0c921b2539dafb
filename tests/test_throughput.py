"""bench/throughput.py runs and counts right; what it measures is no test's business."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

import timm_sd

SCRIPT = Path(__file__).parent.parent / 'bench' / 'throughput.py'


def test_small_run(tmp_path):
    out = tmp_path / 'throughput.json'
    result = subprocess.run(
        [sys.executable, str(SCRIPT), '--model', 'sd_resnet20_cifar', '-b', '4', '--steps', '3', '--rounds', '2',
         '--json', str(out)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    results = json.loads(out.read_text())
    assert set(results['timings']) == {'constant', 'timm_drop_path', 'batch', 'loop'}
    gates = timm_sd.DepthGates(timm_sd.drop_path_rates(9, 0.5))
    drawn = []
    for round_ in range(2):
        gates.set_epoch(round_)
        drawn += [sum(gates.draw()) for _ in range(3)]
    assert results['blocks_open'] == pytest.approx(sum(drawn) / len(drawn) / 9, abs=1e-4)


def test_timms_drop_path_gets_the_papers_rates():
    from throughput import timm_drop_path
    model = timm_drop_path('sd_resnet20_cifar', 0.5)
    rates = [block.drop_path.drop_prob for block in (*model.layer1, *model.layer2, *model.layer3)]
    assert rates == timm_sd.drop_path_rates(9, 0.5)
