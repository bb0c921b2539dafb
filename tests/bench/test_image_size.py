"""--img-size reaches networks that are built for one size, from training to what is published."""
import json

import pytest
import timm
import torch

import timm_sd
from harness.network import DepthSettings, NetworkSettings, build_network, size_kwargs
from harness.run_folder import RunFolder
from support.commands import assert_same_run, read_results, refused, run_here, weights

VIT = ['--model', 'test_vit', '--img-size', '32', '--drop-path', '0.2', '--drop-path-mode', 'batch',
       '--drop-path-scale', 'train', '--epochs', '2']


@pytest.fixture(scope='module')
def vit(toy_flags, tmp_path_factory):
    """The folder of a vision transformer trained at 32 px, where its own size is 160."""
    output = tmp_path_factory.mktemp('output')
    result = run_here('train.py', *toy_flags, *VIT, '--output', output, '--experiment', 'a')
    assert result.returncode == 0, result.stderr
    return output / 'a'


def test_a_network_built_for_one_size_is_trained_at_another(vit):
    assert weights(vit)['pos_embed'].shape == (1, 1 + (32 // 16) ** 2, 64)
    assert read_results(vit)['blocks'] == 6


def test_it_goes_on_after_a_kill(vit, toy_flags, tmp_path):
    args = [*toy_flags, *VIT, '--output', tmp_path, '--experiment', 'a']
    assert run_here('train.py', *args).returncode == 0
    (tmp_path / 'a' / 'results.json').unlink()
    RunFolder(tmp_path / 'a').remove_after(1)
    result = run_here('train.py', *args, '--resume', 'auto')
    assert result.returncode == 0, result.stderr
    assert result.stderr.count('train_loss') == 1
    assert_same_run(tmp_path / 'a', vit)


def test_validate_finds_the_stated_error(vit, toy_folder):
    result = run_here('validate.py', '--checkpoint', vit / 'model.safetensors', '--data-dir', toy_folder)
    assert result.returncode == 0, result.stderr
    row = json.loads(result.stdout)
    assert row['img_size'] == 32
    assert row['top1_err'] == read_results(vit)['test_best']['top1_err']


def test_what_is_published_loads_at_its_size(vit):
    result = run_here('publish.py', vit, '--repo', 'our/vit', '--dry-run')
    assert result.returncode == 0, result.stderr
    model = timm.create_model(f'local-dir:{vit / "hub"}', pretrained=True).eval()
    saved, state = weights(vit), model.state_dict()
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[name], state[name]) for name in saved)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 4)
    config = timm.data.resolve_model_data_config(model)
    assert config['input_size'] == (3, 32, 32)
    assert '32 x 32' in (vit / 'hub' / 'README.md').read_text()


@pytest.mark.parametrize(('name', 'img_size', 'expected'), [
    ('vit_tiny_patch16_224', 32, dict(img_size=32)), ('vit_tiny_patch16_224.augreg_in21k', 32, dict(img_size=32)),
    ('swin_tiny_patch4_window7_224', 64, dict(img_size=64)), ('vit_tiny_patch16_224', None, {}),
    ('resnet18', 32, {}), ('sd_resnet20_cifar', 16, {}), ('sd_resnet20_cifar.c10', 16, {})])
def test_who_is_told_the_size(name, img_size, expected):
    assert size_kwargs(name, img_size) == expected


def test_model_kwargs_go_before_the_size():
    network = NetworkSettings(model='test_vit', model_kwargs=dict(img_size=48, dynamic_img_size=True))
    assert build_network(network, DepthSettings(), 10, 0, img_size=32).patch_embed.img_size == (48, 48)


def test_looking_at_an_image_changes_nothing():
    """Neither gates, statistics, mode nor torch's generator."""
    built = []
    for img_size in (None, 8):
        torch.manual_seed(0)
        model = build_network(NetworkSettings(model='sd_resnet20_cifar'), DepthSettings(drop_path=0.5), 10, 0, img_size)
        built.append((model, torch.rand(3)))
    (plain, drawn), (looked, also_drawn) = built
    assert torch.equal(drawn, also_drawn)
    assert all(module.training for module in looked.modules())
    assert timm_sd.depth_gates(plain).state_dict() == timm_sd.depth_gates(looked).state_dict()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, looked.state_dict()[name]), name


@pytest.mark.parametrize(('model', 'size'), [
    ('test_vit', 30), ('test_vit', 8), ('test_maxvit', 30), ('test_maxvit', 8), ('test_coatnet', 30),
    ('swin_tiny_patch4_window7_224', 2), ('test_convnext', 1)])
def test_a_size_that_the_network_can_not_have_is_one_line(toy_flags, tmp_path, model, size):
    said = refused('train.py', *toy_flags, '--model', model, '--img-size', size, '--output', tmp_path / 'output')
    assert model in said
    assert f'--img-size {size}' in said
    assert not (tmp_path / 'output').exists()


@pytest.mark.parametrize('size', [30, 8, 48])
def test_validate_says_so_too(vit, toy_folder, size):
    """At 48 px the weights of 32 px don't fit."""
    said = refused('validate.py', '--checkpoint', vit / 'model.safetensors', '--data-dir', toy_folder, '--img-size',
                   size)
    assert 'test_vit' in said
