"""bench/train.py and validate.py as a user runs them: real processes, kill -9, a full disk, mistakes."""
import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from PIL import Image

BENCH = Path(__file__).parent.parent / 'bench'
# the quickstart, smaller
SMALL = ['--model', 'sd_resnet20_cifar', '--img-size', '16', '--epochs', '3', '--threads', '1', '--no-amp',
         '--drop-path-scale', 'eval']  # whose state_dict, folded, would not do for a resume


def command(script, *args):
    return [sys.executable, str(BENCH / script), *map(str, args)]


def bench(script, *args, **kwargs):
    return subprocess.run(command(script, *args), capture_output=True, text=True, **kwargs)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A complete run, nobody disturbed it."""
    output = tmp_path_factory.mktemp('output')
    result = bench('train.py', *SMALL, '--output', output, '--experiment', 'a')
    assert result.returncode == 0, result.stderr
    return output / 'a', result


def read_csv(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def weights(folder):
    return safetensors.torch.load_file(folder / 'model.safetensors')


def summary(folder):
    """The rows without the one column that is a time."""
    rows = read_csv(folder / 'summary.csv')
    return [{key: value for key, value in row.items() if key != 'train_seconds'} for row in rows]


def assert_same_run(folder, other):
    ours, theirs = weights(folder), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert summary(folder) == summary(other)


def test_run_folder_is_complete(finished):
    folder, result = finished
    assert {path.name for path in folder.iterdir()} == {
        'args.yaml', 'summary.csv', 'results.json', 'model.safetensors', 'curves.png', 'checkpoints'}
    rows = read_csv(folder / 'summary.csv')
    assert list(rows[0])[:6] == ['epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr']
    results = json.loads((folder / 'results.json').read_text())
    assert json.loads(result.stdout.splitlines()[-1]) == dict(run_folder=str(folder), **results)
    best = max(rows, key=lambda row: float(row['eval_top1']))
    assert results['best_epoch'] == int(best['epoch'])
    assert results['images'] == dict(train=1297, val=140, test=360)
    assert yaml.safe_load((folder / 'args.yaml').read_text())['epochs'] == 3
    header = result.stderr.splitlines()[0]
    assert all(word in header for word in ('cpu', 'fp32', '1 process', 'sd_resnet20_cifar', 'digits', 'p_L 0.8'))


def test_weights_are_a_plain_network_with_their_origin(finished):
    import timm

    import timm_sd  # noqa: F401
    folder, _ = finished
    assert weights(folder).keys() == timm.create_model('sd_resnet20_cifar', drop_path_rate=0.).state_dict().keys()
    with safetensors.safe_open(folder / 'model.safetensors', 'pt') as file:
        metadata = file.metadata()
    results = json.loads((folder / 'results.json').read_text())
    assert metadata['model'] == 'sd_resnet20_cifar'
    assert metadata['recipe'] == 'quickstart'
    assert float(metadata['test_top1_err']) == results['test_best']['top1_err']


def test_validate_finds_the_stated_error(finished, tmp_path):
    folder, _ = finished
    results = json.loads((folder / 'results.json').read_text())
    out = tmp_path / 'results.csv'
    result = bench('validate.py', '--checkpoint', folder / 'model.safetensors', '--dataset', 'digits',
                   '--results-file', out, '-b', 50)  # size, mean and std are in the file
    assert result.returncode == 0, result.stderr
    row = read_csv(out)[0]
    assert list(row) == ['model', 'top1', 'top1_err', 'top5', 'top5_err', 'param_count', 'img_size', 'crop_pct',
                         'interpolation']
    assert float(row['top1_err']) == results['test_best']['top1_err']
    assert row['model'] == 'sd_resnet20_cifar'


def test_resume_after_kill_9_gives_the_same_weights(finished, tmp_path):
    args = [*SMALL, '--output', tmp_path, '--experiment', 'b', '--resume', 'auto']
    folder = tmp_path / 'b'
    for checkpoints, delay in ((0, 0.), (1, 0.), (2, 0.3)):  # killed before a checkpoint, right after one, in an epoch
        process = subprocess.Popen(command('train.py', *args), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try:
            while len(list(folder.glob('checkpoints/checkpoint-*.pt'))) < checkpoints or not folder.exists():
                assert process.poll() is None
                time.sleep(0.01)
            time.sleep(delay)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert not (folder / 'results.json').exists()
    result = bench('train.py', *args)
    assert result.returncode == 0, result.stderr
    assert_same_run(folder, finished[0])
    again = bench('train.py', *args)  # complete: says so at once, changes nothing
    assert again.returncode == 0
    assert json.loads(again.stdout) == json.loads(result.stdout)


def test_damaged_newest_checkpoint_is_passed_over(finished, tmp_path):
    args = [*SMALL, '--output', tmp_path, '--experiment', 'c', '--resume', 'auto']
    assert bench('train.py', *args).returncode == 0
    folder = tmp_path / 'c'
    newest = folder / 'checkpoints' / 'checkpoint-0003.pt'
    with zipfile.ZipFile(newest) as archive:
        tensor = max(archive.infolist(), key=lambda record: record.file_size)
    content = bytearray(newest.read_bytes())
    content[tensor.header_offset + tensor.file_size // 2] ^= 1  # one bit; between tensors, padding would not matter
    newest.write_bytes(content)
    for name in ('results.json', 'model.safetensors', 'summary.csv'):
        (folder / name).unlink()
    result = bench('train.py', *args)
    assert result.returncode == 0, result.stderr
    assert f'warning: {newest} is damaged' in result.stderr
    assert_same_run(folder, finished[0])


def test_killed_while_finishing(finished, tmp_path):
    args = [*SMALL, '--output', tmp_path, '--experiment', 'e', '--resume', 'auto']
    assert bench('train.py', *args).returncode == 0
    folder = tmp_path / 'e'
    for name in ('results.json', 'model.safetensors', 'summary.csv', 'curves.png'):
        (folder / name).unlink()
    assert bench('train.py', *args).returncode == 0
    assert_same_run(folder, finished[0])
    for path in folder.glob('checkpoints/checkpoint-*.pt'):
        path.write_bytes(b'')
    (folder / 'results.json').unlink()
    result = bench('train.py', *args)  # from the beginning
    assert result.returncode == 0, result.stderr
    assert result.stderr.count('is damaged') == 2
    assert_same_run(folder, finished[0])


def test_a_checkpoint_is_not_mistaken_for_weights(finished):
    """It holds the unfolded tensors: evaluated as they are they would be another function."""
    checkpoint = finished[0] / 'checkpoints' / 'checkpoint-0003.pt'
    result = bench('validate.py', '--model', 'sd_resnet20_cifar', '--checkpoint', checkpoint, '--dataset', 'digits',
                   '--img-size', 16)
    assert result.returncode == 2
    assert 'does not fit' in result.stderr


def test_full_disk_keeps_the_last_checkpoint(finished, tmp_path):
    args = [*SMALL, '--output', tmp_path, '--experiment', 'd', '--resume', 'auto']
    folder = tmp_path / 'd'
    process = subprocess.Popen(command('train.py', *args), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not (folder / 'checkpoints' / 'checkpoint-0001.pt').exists():
        assert process.poll() is None
        time.sleep(0.01)
    # from now on no file may grow beyond 100 kB: a write fails half-way, as on a full disk
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    _, stderr = process.communicate()
    assert process.returncode == 2
    assert stderr.splitlines()[-1].startswith('train.py: error: ')
    assert 'can not be written' in stderr.splitlines()[-1]
    assert not list(folder.rglob('.*.tmp'))
    result = bench('train.py', *args)
    assert result.returncode == 0, result.stderr
    assert 'damaged' not in result.stderr
    assert_same_run(folder, finished[0])


@pytest.mark.parametrize(('args', 'words'), [
    (['--model', 'sd_resnet111_cifar'], ['sd_resnet111_cifar', 'sd_resnet110_cifar']),
    (['-c', 'cifar11'], ['cifar11', 'cifar10']),
    (['--dataset', './nowhere'], ['./nowhere', 'does not exist']),
    (['--drop-path', '1.0'], ['1.0', '[0, 1)']),
    (['--num-classes', '7'], ['--num-classes', '7', '10']),
    (['--img-sise', '16'], ['--img-sise']),
    (['--epochs', '0'], ['--epochs', '0']),
    (['--epochs', '1.5'], ['--epochs', '1.5']),
    (['--opt', 'foo'], ['--opt', 'foo']),
    (['--sched', 'plateau'], ['--sched', 'plateau', 'multistep']),
    (['--mean', '0.5'], ['--mean', '0.5']),
    (['--model-kwargs', 'foo=1'], ['sd_resnet20_cifar', 'foo']),
    (['--output', '/proc/nowhere'], ['/proc/nowhere', '--output']),
    (['--pretrained', '--model', 'sd_resnet20_cifar.svhn'], ['sd_resnet20_cifar.svhn']),
    (['--pretrained', '--model', 'sd_resnet20_cifar.c11'], ['c11']),
    (['--resume', './nowhere'], ['./nowhere', 'args.yaml']),
    (['--val-per-class', '1000'], ['--val-per-class', '1000']),
    (['--require-processes', '2'], ['--require-processes is 2', '1 process', 'README']),
    (['--model', 'resnet10t', '--drop-path', '0', '--compile', 'blocks'], ['resnet10t', 'compile the whole model']),
    (['--compile', 'blocks', '--torchcompile-mode', 'fast'], ['fast', 'reduce-overhead']),
])
def test_mistakes_get_one_line_and_status_2(refused, tmp_path, args, words):
    said = refused('train.py', '--output', tmp_path / 'output', *args)
    assert all(word in said for word in words)
    assert not (tmp_path / 'output').exists()


@pytest.mark.parametrize('how', [dict(HF_HUB_OFFLINE='1'), dict(HF_ENDPOINT='http://127.0.0.1:9')])
def test_unreachable_hub_is_one_line(tmp_path, how):
    env = dict(os.environ, HF_HOME=str(tmp_path / 'hf'), **how)
    result = bench('train.py', '-c', 'cifar10', '--output', tmp_path / 'output', env=env)
    assert result.returncode == 2
    assert 'uoft-cs/cifar10' in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / 'output').exists()


@pytest.mark.parametrize('how', ['corrupt parquet', 'corrupt image', 'two label columns'])
def test_bad_data_is_one_line(tmp_path, how):
    from test_data import write_parquet
    folder = write_parquet(tmp_path, labels=('fine', 'coarse') if how == 'two label columns' else ('label',))
    path = tmp_path / 'data' / 'train-00000-of-00001.parquet'
    content = path.read_bytes()
    path.write_bytes(dict([
        ('corrupt parquet', content[:200]), ('corrupt image', content.replace(b'IHDR', b'IHDX')),
        ('two label columns', content)])[how])
    result = bench('train.py', '--data-dir', folder, '--output', tmp_path / 'output')
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert ('--target-key' if how == 'two label columns' else folder) in result.stderr
    assert not (tmp_path / 'output').exists()


def test_images_of_another_size_need_img_size(refused, tmp_path):
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text('dataset: digits\nmodel: sd_resnet20_cifar\nval_per_class: [14]\n')
    said = refused('train.py', '-c', recipe, '--output', tmp_path / 'output')
    assert '8x8 px' in said
    assert '--img-size 32' in said


def test_unknown_recipe_key(refused, tmp_path):
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text('epoch: 3\n')
    said = refused('train.py', '-c', recipe)
    assert "'epoch'" in said
    assert 'epochs' in said


@pytest.mark.parametrize('line', ['epochs: 10.5', 'val_per_class: many', 'drop_path: 1.0', 'amp: perhaps', '- epochs'])
def test_recipe_values_are_checked(refused, tmp_path, line):
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text(line)
    refused('train.py', '-c', recipe)


def test_other_flags_than_the_run_had(refused, finished):
    folder, _ = finished
    args = [*SMALL, '--output', folder.parent, '--experiment', folder.name]
    assert 'exists' in refused('train.py', *args)
    assert 'lr 0.1 -> 0.5' in refused('train.py', *args, '--lr', '0.5', '--resume', 'auto')


def test_checkpoint_of_another_model(refused, finished):
    folder, _ = finished
    assert 'sd_resnet32_cifar' in refused(
        'validate.py', '--model', 'sd_resnet32_cifar', '--checkpoint', folder / 'model.safetensors',
        '--dataset', 'digits', '--img-size', 16)


def test_pretrained_of_another_class_count(refused, tmp_path):
    from test_data import write_parquet
    folder = write_parquet(tmp_path, size=32)
    said = refused('validate.py', '--model', 'sd_resnet56_cifar', '--data-dir', folder, '--split', 'train')
    assert '10 classes' in said
    assert 'the data has 2' in said


@pytest.mark.parametrize('architecture', ['sd_resnet20_cifar', 'resnet18'])
def test_a_network_by_its_folder_has_the_method_too(tmp_path, architecture):
    import timm_sd
    from config import parse, train_parser
    from train import build_model
    (tmp_path / 'config.json').write_text(json.dumps(dict(
        architecture=architecture, num_classes=10, pretrained_cfg=dict(num_classes=10))))
    args = parse(train_parser(), ['--model', f'local-dir:{tmp_path}', '--drop-path', '0.25', '--seed', '7'])
    gates = timm_sd.depth_gates(build_model(args, 10))
    assert (gates.drop_path_rates[-1], gates.seed) == (0.25, 7)


def test_what_was_changed_is_told():
    from config import changed_from_recipe, parse, train_parser
    flags = ['-c', 'cifar10', '--epochs', '8', '--smoothing', '0.1', '--seed', '3', '--threads', '1']
    assert changed_from_recipe(vars(parse(train_parser(), flags))) == dict(epochs=8, smoothing=0.1)


@pytest.mark.parametrize('recipe', sorted(path.stem for path in (BENCH / 'recipes').glob('*.yaml')))
def test_recipes_parse(recipe):
    from config import parse, train_parser
    args = parse(train_parser(), ['-c', recipe])
    assert args.config == recipe
    assert args.model.startswith('sd_resnet')


def test_svhn_recipe_on_generated_data(tmp_path):
    """train and extra joined, a share of each class of each held out."""
    (tmp_path / 'data').mkdir()
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list('0123456789')))
    for split, per_class in (('train', 6), ('extra', 10), ('test', 3)):
        labels = list(range(10)) * per_class
        pictures = [Image.fromarray(np.full((32, 32, 3), 20 * label, np.uint8)) for label in labels]
        data = datasets.Dataset.from_dict(dict(image=pictures, label=labels), features=features)
        data.to_parquet(tmp_path / 'data' / f'{split}-00000-of-00001.parquet')
    result = bench('train.py', '-c', 'svhn', '--data-dir', tmp_path, '--model', 'sd_resnet20_cifar.svhn', '--epochs', 1,
                   '--val-per-class', 2, 3, '--output', tmp_path / 'output')
    assert result.returncode == 0, result.stderr
    results = json.loads(result.stdout)
    assert results['images'] == dict(train=110, val=50, test=30)
    assert results['drop_path_rate'] == 0.5


def learning_rates(recipe):
    """One an epoch."""
    from config import parse, train_parser
    from train import build_optimizer
    args = parse(train_parser(), ['-c', recipe])
    optimizer, scheduler = build_optimizer(args, torch.nn.Linear(1, 1), updates_per_epoch=10)
    assert [group['weight_decay'] for group in optimizer.param_groups] == [1e-4]  # on all parameters
    assert optimizer.defaults['nesterov']
    assert optimizer.defaults['momentum'] == 0.9
    rates = []
    for epoch in range(args.epochs):
        scheduler.step(epoch)
        rates.append(round(optimizer.param_groups[0]['lr'], 6))
    return rates


@pytest.mark.parametrize(('recipe', 'expected'), [
    ('cifar10', [0.1] * 249 + [0.01] * 125 + [0.001] * 126),  # as the original counts
    ('cifar100', [0.1] * 249 + [0.01] * 125 + [0.001] * 126),
    ('svhn', [0.1] * 29 + [0.01] * 5 + [0.001] * 16),
    ('cifar10_1202', [0.01] * 10 + [0.1] * 139 + [0.01] * 75 + [0.001] * 76),
    ('imagenet', [0.1] * 30 + [0.01] * 30 + [0.001] * 30 + [0.0001] * 30),
])
def test_learning_rates_are_the_papers(recipe, expected):
    assert learning_rates(recipe) == expected


def test_gradients_of_the_first_convolution_are_logged(tmp_path):
    args = [*SMALL, '--epochs', '1', '--drop-path', '0', '--output', tmp_path, '--experiment']
    result = bench('train.py', *args, 'a', '--log-gradients')
    assert result.returncode == 0, result.stderr
    assert bench('train.py', *args, 'b').returncode == 0
    assert 0 < float(read_csv(tmp_path / 'a' / 'summary.csv')[0]['grad_magnitude']) < 0.1
    ours, theirs = weights(tmp_path / 'a'), weights(tmp_path / 'b')
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)  # looking changes nothing


def test_validation_within_an_epoch_selects(tmp_path):
    counting = 'import train\ndone = []\nevaluate = train.evaluate\n' \
               'train.evaluate = lambda *args: done.append(1) or evaluate(*args)\ntrain.main()\nprint(len(done))'
    found = []
    for name, more in (('a', []), ('b', ['--eval-interval', '4'])):
        args = [*SMALL, '--epochs', '1', '--output', tmp_path, '--experiment', name, *more]
        result = subprocess.run([sys.executable, '-c', counting, *args], cwd=BENCH, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        results, evaluations = result.stdout.splitlines()
        found.append((json.loads(results), int(evaluations)))
    (plain, once), (often, several) = found
    assert once == 3  # behind the epoch, and the test images by the best weights and by the last
    assert several == 3 + 20 // 4  # of 21 updates
    assert often['test_last'] == plain['test_last']  # the training is the same
    assert often['val_top1_err'] <= plain['val_top1_err']


def test_the_time_is_that_of_where_the_run_ended(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / 'a')
    for name in ('results.json', 'checkpoints/checkpoint-0003.pt'):
        (tmp_path / 'a' / name).unlink()
    result = bench('train.py', *SMALL, '--threads', '2', '--output', tmp_path, '--experiment', 'a', '--resume', 'auto')
    assert result.returncode == 0, result.stderr
    results = json.loads(result.stdout)
    assert results['hardware']['threads'] == 2
    assert results['epoch_seconds'] == round(float(read_csv(tmp_path / 'a' / 'summary.csv')[-1]['train_seconds']), 2)
