"""bench/validate.py, and the test of a run: the stated error is that of a plain loop over the pictures."""
import io
import os

import datasets
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from PIL import Image

import validate
from harness import engine, training
from support.commands import assert_same_errors, read_csv, read_results, refused, run_here, weights
from support.data import write_parquet

TEST_FILE = 'data/test-00000-of-00001.parquet'


def loss_and_error(folder, data):
    """Mean loss and top-1 error in percent of a run's weights in timm's plain network, picture by picture."""
    network = timm.create_model('sd_resnet20_cifar', drop_path_rate=0., num_classes=4).eval()
    network.load_state_dict(weights(folder))
    losses, wrong = [], 0
    rows = datasets.Dataset.from_parquet(f'{data}/{TEST_FILE}').cast_column('image', datasets.Image(decode=False))
    for row in rows:
        pixels = np.asarray(Image.open(io.BytesIO(row['image']['bytes']))) / 255
        x = torch.tensor((pixels - 0.31) / 0.38, dtype=torch.float32).permute(2, 0, 1)[None]
        with torch.no_grad():
            logits = network(x)
        losses.append(F.cross_entropy(logits, torch.tensor([row['label']])).item())
        wrong += logits.argmax().item() != row['label']
    return sum(losses) / len(losses), 100 * wrong / len(losses)


def test_the_stated_error_is_that_of_a_plain_loop(finished, toy_folder):
    results = read_results(finished[0])
    loss, error = loss_and_error(finished[0], toy_folder)
    assert results['test_best']['loss'] == pytest.approx(loss, rel=1e-4)
    assert results['test_best']['top1_err'] == pytest.approx(error, abs=1e-4)
    assert results['test_best']['top5_err'] == 0  # of four classes


def test_validate_finds_the_stated_error(finished, toy_folder, tmp_path):
    results = read_results(finished[0])
    out = tmp_path / 'results.csv'
    result = run_here('validate.py', '--checkpoint', finished[0] / 'model.safetensors', '--data-dir', toy_folder,
                      '--results-file', out, '-b', 7)  # size, mean and std are in the file
    assert result.returncode == 0, result.stderr
    row = read_csv(out)[0]
    assert list(row) == ['model', 'top1', 'top1_err', 'top5', 'top5_err', 'param_count', 'img_size', 'crop_pct',
                         'interpolation']
    assert float(row['top1_err']) == results['test_best']['top1_err']
    assert float(row['top1']) == 100 - float(row['top1_err'])
    assert float(row['param_count']) == round(results['param_count'] / 1e6, 2)
    assert (row['model'], row['img_size']) == ('sd_resnet20_cifar', '8')


def test_validation_and_test_in_batches_of_their_own_size(finished, toy_flags, tmp_path, monkeypatch):
    """Of 12 and 20 images, and training in batches of 8; neither the weights nor the errors change."""
    sizes, evaluate, backward = [], training.evaluate, engine.TrainStep.backward

    def watched(model, batches, accelerator, amp, *see_batch):
        hook = model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
        found = evaluate(model, batches, accelerator, amp, *see_batch)
        hook.remove()
        return found

    def trained(step, x, *args):
        sizes.append(f'train {len(x)}')
        return backward(step, x, *args)

    monkeypatch.setattr(training, 'evaluate', watched)
    monkeypatch.setattr(engine.TrainStep, 'backward', trained)
    result = run_here('train.py', *toy_flags, '-vb', '5', '--output', tmp_path, '--experiment', 'a')
    assert result.returncode == 0, result.stderr
    assert sizes == [*([*['train 8'] * 4, 'train 4', 5, 5, 2] * 3), *([5] * 8)]  # the test is of two networks
    assert_same_errors(tmp_path / 'a', finished[0])
    assert 'validation_batch_size' not in read_results(tmp_path / 'a')['changed_from_recipe']


def test_a_checkpoint_is_not_mistaken_for_weights(finished, toy_folder):
    """It does not say how its images were normalised."""
    said = refused('validate.py', '--model', 'sd_resnet20_cifar', '--checkpoint',
                   finished[0] / 'checkpoints' / 'checkpoint-0003.pt', '--data-dir', toy_folder,
                   '--img-size', 8)
    assert 'does not fit' in said


@pytest.mark.parametrize(('args', 'words'), [
    (['--model', 'sd_resnet32_cifar', '--checkpoint', 'WEIGHTS'], ['sd_resnet32_cifar', 'does not fit']),
    (['--checkpoint', 'NOWHERE'], ['NOWHERE', 'is no file']),
    (['--checkpoint', 'UNNAMED'], ['UNNAMED', 'give --model']),
    (['--model', 'sd_resnet20_cifar', '--checkpoint', 'NOWHERE'], ['NOWHERE', 'is no file']),
    ([], ['--model', '--checkpoint']),
    (['--checkpoint', 'WEIGHTS', '--results-file', 'NOWHERE/results.csv'], ['--results-file', 'no such folder']),
    (['--checkpoint', 'WEIGHTS', '--split', 'dev'], ['dev', 'train, test']),
    (['--model', 'sd_resnet20_cifar.c11', '--img-size', '8'], ['c11']),
    (['--checkpoint', 'WEIGHTS', '--num-classes', '7'], ['--num-classes', '7', '4']),
])
def test_mistakes_get_one_line_and_status_2(finished, toy_folder, tmp_path, args, words):
    places = dict(WEIGHTS=str(finished[0] / 'model.safetensors'), NOWHERE=str(tmp_path / 'nowhere'),
                  UNNAMED=str(tmp_path / 'unnamed.safetensors'))
    safetensors.torch.save_file(weights(finished[0]), places['UNNAMED'])
    for name, place in places.items():
        args, words = ([text.replace(name, place) for text in texts] for texts in (args, words))
    said = refused('validate.py', '--data-dir', toy_folder, *args)
    assert all(word in said for word in words)


@pytest.mark.parametrize('kind', ['folder', 'pipe', 'device'])
def test_results_go_into_a_file_or_nothing_is_evaluated(finished, toy_folder, tmp_path, monkeypatch, kind):
    odd = tmp_path / 'odd'
    if kind == 'folder':
        odd.mkdir()
    elif kind == 'pipe':
        os.mkfifo(odd)
    else:
        odd.symlink_to('/dev/full')
    monkeypatch.setattr(validate, 'evaluate', None)
    said = refused('validate.py', '--checkpoint', finished[0] / 'model.safetensors', '--data-dir', toy_folder,
                   '--results-file', odd)
    assert f'--results-file {odd} can not be written' in said


def test_pretrained_of_another_class_count(tmp_path, monkeypatch):
    """Where nothing says what its classes are called."""
    monkeypatch.setattr(validate, 'label_names', lambda model: None)
    folder = write_parquet(tmp_path, size=32)
    said = refused('validate.py', '--model', 'sd_resnet56_cifar', '--data-dir', folder, '--split', 'train')
    assert '10 classes' in said
    assert 'the data has 2' in said
