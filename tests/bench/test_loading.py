"""What train.py and validate.py load: from the Hub, from a folder, from a checkpoint; whole, or told in one line."""
import json
import signal
import subprocess
from functools import cache

import pytest
import safetensors.torch
import timm
import torch

from support.commands import SMALL, bench, command, read_results, refused, run_here, weights
from support.waiting import hear_sigint, wait_until

NAN = dict(fc__bias=torch.full((4,), float('nan')))


@pytest.fixture(autouse=True)
def cache_folder(monkeypatch, tmp_path):
    """An empty cache of the Hub, for this process and for others."""
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr('timm_sd.asking.WAITS', ())
    return tmp_path / 'cache'


@cache
def state(name):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=4).state_dict()


def files(name, config=None, **changed):
    """model.safetensors and config.json of a network for four classes of 32 x 32 pixels."""
    cfg = timm.get_pretrained_cfg(name)
    config = dict(dict(architecture=name, num_classes=4, pretrained_cfg=dict(
        tag='toy', input_size=[3, 32, 32], first_conv=cfg.first_conv, classifier=cfg.classifier, num_classes=4,
        mean=cfg.mean, std=cfg.std, crop_pct=1.0, interpolation='bilinear')), **(config or {}))
    tensors = {**state(name), **{key.replace('__', '.'): tensor for key, tensor in changed.items()}}
    return {'model.safetensors': safetensors.torch.save(tensors), 'config.json': json.dumps(config).encode()}


def evaluate(toy_folder, model, *args):
    return ['validate.py', '--model', model, '--data-dir', toy_folder, '--img-size', '32', *args]


def train(toy_flags, model, tmp_path, *args):
    return ['train.py', *toy_flags, '--model', model, '--img-size', '32', '--pretrained', '--output', tmp_path, *args]


def refused_by_both(toy_folder, toy_flags, tmp_path, model):
    """What both scripts say, and no run folder is there."""
    said = [refused(*evaluate(toy_folder, model)), refused(*train(toy_flags, model, tmp_path / 'output'))]
    assert not list((tmp_path / 'output').glob('*/*'))
    return said


# --- from the Hub


@pytest.mark.parametrize('name', ['resnet18', 'convnext_atto'])
def test_the_recipe_finetune_starts_from_a_network_of_the_hub(hub, toy_folder, tmp_path, name):
    hub.repo('our/toy').commit(files(name))
    result = run_here('train.py', '-c', 'finetune', '--data-dir', toy_folder, '--model', 'hf-hub:our/toy', '--img-size',
                      '32', '--epochs', '1', '--warmup-lr', '1e-9',  # so that it stays where it starts
                      '-b', '8', '-j', '0', '--threads', '1', '--output', tmp_path, '--experiment', 'a')
    assert result.returncode == 0, result.stderr
    assert 'p_L 0.9, expected depth' in result.stderr
    first = next(key for key in state(name) if key.endswith('weight'))
    assert torch.allclose(weights(tmp_path / 'a')[first], state(name)[first], atol=1e-4)
    assert read_results(tmp_path / 'a')['changed_from_recipe']['model'] == 'hf-hub:our/toy'


@pytest.mark.parametrize('name', ['sd_resnet20_cifar', 'resnet18'])  # ours, and timm's own
def test_a_network_of_the_hub(hub, toy_folder, toy_flags, tmp_path, name):
    hub.repo('our/toy').commit(files(name))
    result = run_here(*evaluate(toy_folder, 'hf-hub:our/toy'))
    assert result.returncode == 0, result.stderr
    short = ['--epochs', '1', '--lr', '1e-9', '--experiment', 'a']
    result = run_here(*train(toy_flags, 'hf-hub:our/toy', tmp_path, *short))
    assert result.returncode == 0, result.stderr
    assert read_results(tmp_path / 'a')['model'] == 'hf-hub:our/toy'
    assert torch.allclose(weights(tmp_path / 'a')['conv1.weight'], state(name)['conv1.weight'], atol=1e-4)
    asked = len(hub.requests)
    hub.fail(503)
    assert run_here(*evaluate(toy_folder, 'hf-hub:our/toy')).returncode == 0  # by the cache
    assert len(hub.requests) > asked


@pytest.mark.parametrize('name', ['sd_resnet20_cifar', 'resnet18'])
@pytest.mark.parametrize(('change', 'words'), [
    (NAN, 'fc.bias holds numbers that are not finite'),
    (dict(fc__bias=torch.zeros(4, dtype=torch.int32)), 'fc.bias holds I32, no floating-point numbers'),
    (dict(config=dict(num_classes=3, model_args=dict(num_classes=4))), 'that of its model_args is 4'),
    (dict(config=dict(num_classes=2 * 10 ** 7)), 'fc.weight has 4 classes, and num_classes is 20000000'),
    (dict(config=dict(model_args=dict(in_chans=10 ** 6))), 'conv1.weight takes 3 channels, and in_chans is 1000000'),
    (dict(config=dict(architecture=None)), 'its config.json names no architecture'),
    (dict(config=dict(architecture='resnet19')), "no model 'resnet19'"),
], ids=['nan', 'integers', 'model_args', 'classes', 'channels', 'no architecture', 'unknown'])
def test_what_is_refused_of_the_hub(hub, toy_folder, toy_flags, tmp_path, name, change, words):
    hub.repo('our/toy').commit(files(name, **change))
    for said in refused_by_both(toy_folder, toy_flags, tmp_path, 'hf-hub:our/toy'):
        assert words in said
    folder = tmp_path / 'folder'
    folder.mkdir()
    for path, content in files(name, **change).items():
        (folder / path).write_bytes(content)
    for said in refused_by_both(toy_folder, toy_flags, tmp_path, f'local-dir:{folder}'):
        assert words in said


@pytest.mark.parametrize('name', ['sd_resnet20_cifar', 'resnet18'])
@pytest.mark.parametrize(('fault', 'where', 'words'), [
    ('corrupt', 'GET .*safetensors', 'has another checksum than the Hub names'),
    ('corrupt', 'GET .*config.json', 'has another checksum than the Hub names'),
    (403, 'safetensors', 'does not accept the token (403)'),
    (401, 'config.json', 'log in'),
    (503, '', 'the Hub answers 503'),
])
def test_faults_of_the_hub(hub, toy_folder, toy_flags, tmp_path, name, fault, where, words):
    hub.repo('our/toy').commit(files(name))
    hub.fail(fault, where)
    for said in refused_by_both(toy_folder, toy_flags, tmp_path, 'hf-hub:our/toy'):
        assert words in said


@pytest.mark.parametrize('name', ['sd_resnet20_cifar', 'resnet18'])
def test_weights_that_lack_a_layer_are_refused(hub, toy_flags, tmp_path, name):
    """timm says nothing of them where the data have another number of classes."""
    of_three = files(name, dict(num_classes=3), fc__weight=state(name)['fc.weight'][:3], fc__bias=torch.zeros(3))
    tensors = safetensors.torch.load(of_three['model.safetensors'])
    hub.repo('our/toy').commit(of_three)
    result = run_here(*train(toy_flags, 'hf-hub:our/toy', tmp_path, '--epochs', '1', '--experiment', 'a'))
    assert result.returncode == 0, result.stderr
    del tensors['layer1.0.conv2.weight']
    hub.repo('our/toy').commit({'model.safetensors': safetensors.torch.save(tensors)})
    assert 'it has no layer1.0.conv2.weight' in refused(*train(toy_flags, 'hf-hub:our/toy', tmp_path))


def test_a_folder_of_pickled_weights_is_checked_too(toy_flags, tmp_path):
    made = files('resnet18')
    (tmp_path / 'config.json').write_bytes(made['config.json'])
    torch.save({**state('resnet18'), 'fc.bias': NAN['fc__bias']}, tmp_path / 'pytorch_model.bin')
    said = refused(*train(toy_flags, f'local-dir:{tmp_path}', tmp_path / 'output'))
    assert 'fc.bias holds numbers that are not finite' in said


def test_custom_load_is_no_matter_of_ours(hub, toy_folder):
    cfg = json.loads(files('resnet18')['config.json'])['pretrained_cfg']
    hub.repo('our/toy').commit(files('resnet18', dict(pretrained_cfg=dict(cfg, custom_load=True))))
    result = run_here(*evaluate(toy_folder, 'hf-hub:our/toy'))
    assert result.returncode == 0, result.stderr


def test_timms_own_weights_are_checked_too(hub, toy_flags, tmp_path):
    name = 'resnet18.a1_in1k'
    torch.manual_seed(0)
    tensors = timm.create_model('resnet18').state_dict()
    hub.repo(f'timm/{name}').commit({'model.safetensors': safetensors.torch.save(tensors)})
    hub.fail('corrupt', 'GET')
    assert 'has another checksum' in refused(*train(toy_flags, name, tmp_path))
    hub.heal()
    result = run_here(*train(toy_flags, name, tmp_path, '--epochs', '1', '--lr', '1e-9', '--experiment', 'a'))
    assert result.returncode == 0, result.stderr
    assert torch.allclose(weights(tmp_path / 'a')['conv1.weight'], tensors['conv1.weight'], atol=1e-4)
    hub.repo(f'timm/{name}').commit({'model.safetensors': safetensors.torch.save(
        dict(tensors, **{'bn1.bias': torch.full((64,), float('inf'))}))})
    assert 'bn1.bias holds numbers that are not finite' in refused(*train(toy_flags, name, tmp_path))


# --- from a checkpoint


def checkpoint(finished, tmp_path, **changed):
    """The weights of a finished run with some tensors changed."""
    path = tmp_path / 'changed.safetensors'
    with safetensors.safe_open(finished[0] / 'model.safetensors', 'pt') as file:
        metadata = file.metadata()
    tensors = {**weights(finished[0]), **{key.replace('__', '.'): tensor for key, tensor in changed.items()}}
    safetensors.torch.save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize(('changed', 'words'), [
    (NAN, 'fc.bias holds numbers that are not finite'),
    (dict(fc__bias=torch.zeros(4, dtype=torch.int64)), 'fc.bias holds I64, no floating-point numbers'),
    (dict(fc__weight=torch.zeros(7, 64)), 'fc.weight has 7 classes, and num_classes is 4'),
    (dict(bn1__running_var=torch.full((16,), -9.)), 'are not finite on data set'),  # the root of a negative number
])
def test_no_figure_of_weights_that_are_not_finite(finished, toy_folder, tmp_path, changed, words):
    path = checkpoint(finished, tmp_path, **changed)
    out = tmp_path / 'results.csv'
    assert words in refused('validate.py', '--checkpoint', path, '--data-dir', toy_folder, '--results-file', out)
    assert not out.exists()


def test_weights_that_timm_reads_are_checked_too(finished, toy_folder, tmp_path):
    path = tmp_path / 'weights.pth'
    torch.save({**weights(finished[0]), 'fc.bias': NAN['fc__bias']}, path)
    said = refused('validate.py', '--model', 'sd_resnet20_cifar', '--checkpoint', path, '--data-dir', toy_folder,
                   '--img-size', 8)
    assert 'fc.bias holds numbers that are not finite' in said


# --- in processes of their own


@pytest.mark.slow
@pytest.mark.parametrize('where', ['', 'GET .*config', 'HEAD .*safetensors', 'GET .*safetensors'])
def test_a_silent_hub_ends_within_a_minute(hub, toy_folder, where):
    hub.repo('our/toy').commit(files('resnet18'))
    hub.fail('silent', where)
    result = bench(*evaluate(toy_folder, 'hf-hub:our/toy'), timeout=75)  # of which some are the imports
    assert result.returncode == 2
    said = result.stderr.splitlines()[-1]
    assert said.startswith('validate.py: error: ')
    assert 'from the Hub: the Hub does not answer as it should' in said
    assert 'Traceback' not in result.stderr


@pytest.mark.slow
def test_a_data_set_whose_hub_falls_silent_ends_within_a_minute(hub, tmp_path):
    hub.repo('some/pictures', 'datasets').commit({'train-00000-of-00001.parquet': b'PAR1' * 4})
    hub.fail('silent', 'resolve|tree|paths-info')
    result = bench('train.py', *SMALL, '--output', tmp_path, '--dataset', 'some/pictures', timeout=75)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("train.py: error: data set 'some/pictures'")
    assert 'Traceback' not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(('number', 'status'), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize('workers', [[], ['--no-in-memory', '-j', '2']], ids=['in memory', 'workers'])
def test_a_signal_ends_a_training_in_one_line(toy_flags, tmp_path, number, status, workers):
    args = [*toy_flags, *workers, '--epochs', '1000', '--output', tmp_path, '--experiment', 'a']
    with subprocess.Popen(command('train.py', *args), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          preexec_fn=hear_sigint) as process:
        try:
            wait_until((tmp_path / 'a' / 'checkpoints' / 'checkpoint-0002.pt').exists, process=process)
            process.send_signal(number)
            stdout, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == status, stderr
    assert stdout == ''
    last = f'train.py: stopped by {signal.Signals(number).name}; to go on, run the same line with --resume auto'
    assert stderr.splitlines()[-1] == last
    assert 'Traceback' not in stderr
    result = run_here('train.py', *toy_flags, *workers, '--epochs', '3', '--output', tmp_path, '--experiment', 'b')
    assert result.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(('number', 'status'), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_what_reproduce_has_started(tmp_path, number, status):
    line = command('reproduce.py', 'fig8_right', '--depth', '20', '--drop-path', '0.5', '--budget', 'smoke',
                   '--seeds', '0', '1', '--processes', '2', '--output', tmp_path)
    with subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          preexec_fn=hear_sigint) as process:
        try:
            wait_until(lambda: list(tmp_path.glob('*/checkpoints/*.pt')), process=process)
            process.send_signal(number)
            _, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == status, stderr
    last = f'reproduce.py: stopped by {signal.Signals(number).name}; to go on, run the same line again'
    assert stderr.splitlines()[-1] == last
    assert 'Traceback' not in stderr
    assert subprocess.run(['pgrep', '-f', str(tmp_path)], capture_output=True).stdout == b''
