"""The bundled weights, their cards and the README say the same, and what they say is so."""
import csv
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import safetensors
import timm

import timm_sd  # noqa: F401
from publish import CARDS, PRETRAINED, RESULTS, make_card, measured_saving

ROOT = Path(__file__).parent.parent
NAMES = sorted(path.name for path in CARDS.iterdir() if path.is_dir())
CIFAR10 = ROOT.parent / 'shared' / 'data' / 'cifar10'


def results_of(name):
    return json.loads((CARDS / name / 'results.json').read_text())


def test_every_bundled_file_has_a_card():
    assert {f'sd_resnet{depth}_cifar.c10' for depth in (20, 56, 110)} <= set(NAMES)
    assert sorted(path.stem for path in PRETRAINED.glob('*.safetensors')) == NAMES


def test_wheel_holds_the_weights(tmp_path):
    pip = [sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '-w', str(tmp_path), str(ROOT)]
    subprocess.run(pip, check=True)
    with zipfile.ZipFile(next(tmp_path.glob('*.whl'))) as wheel:
        assert {f'timm_sd/pretrained/{name}.safetensors' for name in NAMES} <= set(wheel.namelist())


@pytest.mark.parametrize('name', NAMES)
def test_card_is_what_its_results_make(name):
    assert (CARDS / name / 'README.md').read_text() == make_card(CARDS / name)


@pytest.mark.parametrize(('scale', 'file'), [('train', 'throughput.json'), ('eval', 'throughput_eval.json')])
def test_saving_is_that_of_the_scale(scale, file):
    measured = json.loads((RESULTS / file).read_text())
    row = next(row for row in measured['rows'] if row['name'] == 'batch, p_L 0.5')
    found = measured_saving('sd_resnet110_cifar.c10', 0.5, 'linear', scale)
    assert found == dict(row, hardware=measured['hardware'])


@pytest.mark.parametrize('name', NAMES)
def test_weights_name_the_run_that_made_them(name):
    results = results_of(name)
    with safetensors.safe_open(PRETRAINED / f'{name}.safetensors', 'pt') as file:
        metadata = file.metadata()
    for key in ('recipe', 'seed', 'epochs', 'dataset'):
        assert metadata[key] == str(results[key])
    assert json.loads(metadata['images']) == results['images']
    assert float(metadata['test_top1_err']) == results['test_best']['top1_err']
    rows = list(csv.DictReader((CARDS / name / 'summary.csv').read_text().splitlines()))
    assert len(rows) == results['epochs']
    best = max(rows, key=lambda row: float(row['eval_top1']))  # the first of the best, by validation alone
    assert int(best['epoch']) == results['best_epoch']


@pytest.mark.parametrize('name', NAMES)
def test_snippets_of_the_card_run(name):
    snippets = re.findall(r'```python\n(.*?)```', (CARDS / name / 'README.md').read_text(), re.DOTALL)
    assert snippets
    for snippet in snippets:
        assert snippet.startswith('import timm_sd')
        subprocess.run([sys.executable, '-c', snippet], check=True)


def test_snippets_of_the_readme_run():
    snippets = re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)
    assert snippets
    for snippet in snippets:
        subprocess.run([sys.executable, '-c', snippet], check=True)


def test_readme_states_the_measured_errors():
    rows = dict(re.findall(r'^\| `(sd_\w+\.\w+)` \|.* (\d+\.\d+) \|$', (ROOT / 'README.md').read_text(), re.MULTILINE))
    assert rows == {name: f'{results_of(name)["test_best"]["top1_err"]:.2f}' for name in NAMES}


@pytest.mark.parametrize('name', NAMES)
def test_pretrained_loads_whatever_the_rate(name):
    plain = timm.create_model(name, pretrained=True, drop_path_rate=0.).state_dict()
    for kwargs in ({}, dict(drop_path_rate=0.2)):
        state = timm.create_model(name, pretrained=True, **kwargs).state_dict()
        assert all((state[key] == plain[key]).all() for key in plain)


@pytest.mark.skipif(not CIFAR10.exists(), reason='needs ../shared/data/cifar10')
@pytest.mark.parametrize('name', NAMES)
def test_validate_reproduces_the_cards_error(name):
    result = subprocess.run(
        [sys.executable, str(ROOT / 'bench' / 'validate.py'), '--model', name, '--pretrained',
         '--data-dir', str(CIFAR10)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    # other processors round differently: one image of 10,000 may fall on the other side
    assert json.loads(result.stdout)['top1_err'] == pytest.approx(results_of(name)['test_best']['top1_err'], abs=0.021)


def test_main_runs_a_script_with_the_models_registered(tmp_path):
    script = tmp_path / 'script.py'
    script.write_text('import sys, timm\nprint(timm.is_model("sd_resnet20_cifar"), sys.argv[1:], sys.path[0])\n')
    run = subprocess.run([sys.executable, '-m', 'timm_sd', str(script), '--flag', '1'], capture_output=True, text=True)
    assert run.stdout.split('\n')[0] == f"True ['--flag', '1'] {tmp_path}"
    assert subprocess.run([sys.executable, '-m', 'timm_sd'], capture_output=True).returncode == 2
