"""bench/throughput.py runs and counts right; what it measures is no test's business."""
import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

import timm_sd
from contestants import Entry, build

SCRIPT = Path(__file__).parent.parent / 'bench' / 'throughput.py'
SMALL = ['--model', 'sd_resnet20_cifar', '-b', '4', '--steps', '3', '--rounds', '2']


def throughput(*args):
    result = subprocess.run([sys.executable, str(SCRIPT), *map(str, args)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_table_json_csv_and_picture(tmp_path):
    modes = ('constant', 'batch', 'sample', 'torchvision-batch', 'torchvision-row')
    table = throughput(*SMALL, '--modes', *modes, '--drop-path', 0.5, 0.8, '--no-memory', '--output', tmp_path / 'out')
    rows = json.loads((tmp_path / 'out.json').read_text())['rows']
    assert [row['name'] for row in rows] == [
        'constant', *(f'{mode}, p_L {p}' for mode in modes[1:] for p in (0.5, 0.2)), 'loop']
    assert all(row['name'] in table for row in rows)
    assert [row['name'] for row in csv.DictReader((tmp_path / 'out.csv').open())] == [row['name'] for row in rows]
    assert (tmp_path / 'out.png').stat().st_size > 10_000
    gates = timm_sd.DepthGates(timm_sd.drop_path_rates(9, 0.8))
    drawn = []
    for round_ in range(2):
        gates.set_epoch(round_)
        drawn += [sum(gates.draw()) for _ in range(3)]
    row = next(row for row in rows if row['name'] == 'batch, p_L 0.2')
    assert row['blocks_open'] == pytest.approx(sum(drawn) / len(drawn) / 9, abs=1e-4)


def test_any_timm_model(tmp_path):
    throughput('--model', 'test_vit', '-b', 2, '--steps', 1, '--rounds', 2, '--modes', 'constant', 'batch', 'subset',
               'sample', '--drop-path-schedule', 'uniform', '--no-memory', '--output', tmp_path / 'out')
    rows = json.loads((tmp_path / 'out.json').read_text())['rows']
    assert [row['name'] for row in rows] == [
        'constant', *(f'{mode}, p_L 0.5 uniform' for mode in ('batch', 'subset', 'sample')), 'loop']
    assert 'limit' not in rows[1]


def test_profile_names_the_operators():
    assert 'aten::convolution_backward' in throughput(*SMALL, '--modes', 'constant', '--profile')


def test_peak_memory_grows_with_the_batch(tmp_path):
    peaks = []
    for size in (8, 256):
        throughput(*SMALL, '--modes', 'constant', '-b', size, '--steps', 1, '--output', tmp_path / 'out')
        peaks.append(json.loads((tmp_path / 'out.json').read_text())['rows'][0]['peak_mib'])
    assert 0 <= peaks[0] < peaks[1] / 2


def test_end_to_end_times_every_way_of_training(tmp_path):
    table = throughput('--end-to-end', '--model', 'sd_resnet20_cifar', '--images', 320, '-b', 64, '--repeats', 1)
    assert [line[20:52].strip() for line in table.splitlines()[1:]] == [
        'train.py', 'train.py, 2 runs at once', 'train.py, 2 processes']


@pytest.mark.parametrize('mode', ['sample', 'torchvision-row'])
def test_other_libraries_get_the_papers_rates(mode):
    network = build('sd_resnet20_cifar', Entry(mode, 0.5))
    blocks = [*network.layer1, *network.layer2, *network.layer3]
    rates = [block.drop_path.drop_prob if mode == 'sample' else block.drop_path.p for block in blocks]
    assert rates == timm_sd.drop_path_rates(9, 0.5)


@pytest.mark.parametrize(('args', 'words'), [
    (['--modes', 'batch'], ['lacks constant']),
    (['--sweep', '--model', 'resnet18'], ['resnet18', 'sd_resnet*_cifar']),
    (['--drop-path', '0'], ['--drop-path 0']),
    (['--end-to-end', '--timm-train', 'nowhere.py'], ['nowhere.py']),
])
def test_mistakes_are_one_line(refused, args, words):
    said = refused('throughput.py', *args)
    assert all(word in said for word in words)
