"""Recipes: what they say is checked as a user's flags are, and the learning rates are the paper's."""
import os
from pathlib import Path
from unittest import mock

import pytest
import timm
import torch

from harness.cli import make_settings
from harness.network import DepthSettings, NetworkSettings
from harness.optimizer import OptimizerSettings, build_optimizer
from harness.recipes import RECIPES, changed_from_recipe, parse_train_flags
from support.commands import read_results, refused, run_here
from support.data import write_classes


@pytest.mark.parametrize('recipe', sorted(path.stem for path in RECIPES.glob('*.yaml')))
def test_recipes_parse(recipe):
    args = parse_train_flags(['-c', recipe])
    assert args.config == recipe
    assert timm.is_model(args.model)


@pytest.mark.parametrize(('recipe', 'model', 'schedule'), [
    ('cifar10', 'sd_resnet110_cifar.c10', (500, 128)), ('cifar100', 'sd_resnet110_cifar.c100', (500, 128)),
    ('svhn', 'sd_resnet152_cifar.svhn', (50, 128)), ('cifar10_1202', 'sd_resnet1202_cifar.c10', (300, 128)),
    ('imagenet', 'sd_resnet152', (120, 128))])
def test_recipes_have_the_papers_settings(recipe, model, schedule):
    args = parse_train_flags(['-c', recipe])
    assert (args.epochs, args.batch_size) == schedule
    assert make_settings(NetworkSettings, args).model == model
    depth = make_settings(DepthSettings, args)
    assert (depth.drop_path, depth.drop_path_schedule, depth.drop_path_scale) == (0.5, 'linear', 'eval')


def test_the_command_line_goes_before_the_recipe(tmp_path):
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text('dataset: digits\nlr: 0.5\nepochs: 7\nmodel_kwargs: {a: 1}\nin_memory: false\n')
    args = parse_train_flags(['--lr', '0.25', '-c', str(recipe)])
    assert (args.lr, args.epochs, args.model_kwargs, args.in_memory) == (0.25, 7, dict(a=1), False)


@pytest.mark.parametrize(('text', 'words'), [
    ('epoch: 3', ["'epoch'", 'epochs']), ('config: nothing', ["no recipe 'nothing'"]),
    ('config: 3', ["no recipe '3'"]), ('epochs: 10.5', ['--epochs', '10.5']),
    ('val_per_class: many', ['--val-per-class', 'many']), ('drop_path: 1.0', ['1.0', '[0, 1)']),
    ('amp: perhaps', ['perhaps']), ('1: 2', ['key 1']),
    ('lr: .inf', ['--lr', 'inf']), ('mean: [.nan, 0, 0]', ['--mean', 'nan']),
    ('decay_milestones: [375, 250]', ['--decay-milestones 375 250', 'must rise']),
    ('- epochs', ['mapping']), ('epochs: [', ['recipe.yaml'])])
def test_a_recipe_is_checked_as_a_users_flags(tmp_path, text, words):
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text(text)
    said = refused('train.py', '-c', recipe, '--output', tmp_path / 'output')
    assert all(word in said for word in words)


@pytest.mark.parametrize('content', [
    b'', b'# nothing', bytes(range(256)), 'epochs: 3'.encode('utf-16'), b'epochs: \0', b'lr: 2020-13-45',
    b'[' * 2000])
def test_a_recipe_that_is_none_is_one_line(tmp_path, content):
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_bytes(content)
    said = refused('train.py', '-c', recipe, '--output', tmp_path / 'output')
    assert f'{recipe} can not be read' in said


@pytest.mark.parametrize('kind', ['folder', 'pipe', 'secret', 'device'])
def test_a_recipe_is_a_file_that_can_be_read(tmp_path, monkeypatch, kind):
    recipe = tmp_path / 'recipe.yaml'
    if kind == 'folder':
        recipe.mkdir()
    elif kind == 'pipe':
        os.mkfifo(recipe)
    elif kind == 'device':
        recipe.symlink_to('/dev/zero')
    else:
        recipe.touch()
        monkeypatch.setattr(Path, 'read_text', mock.Mock(side_effect=PermissionError(13, 'Permission denied')))
    said = refused('train.py', '-c', recipe, '--output', tmp_path / 'output')
    assert f'{recipe} can not be read' in said
    assert 'flags to values' in said


def test_what_was_changed_is_told():
    flags = ['-c', 'cifar10', '--epochs', '8', '--smoothing', '0.1', '--seed', '3', '--threads', '1']
    assert changed_from_recipe(vars(parse_train_flags(flags))) == dict(epochs=8, smoothing=0.1)


def learning_rates(recipe):
    """One an epoch."""
    args = make_settings(OptimizerSettings, parse_train_flags(['-c', recipe]))
    optimizer, scheduler, _ = build_optimizer(args, torch.nn.Linear(1, 1), updates_per_epoch=10)
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


def test_svhn_recipe_on_generated_data(tmp_path):
    """train and extra joined, a share of each class of each held out."""
    write_classes(tmp_path, classes=10, train=6, extra=10, test=3)
    result = run_here('train.py', '-c', 'svhn', '--data-dir', tmp_path, '--model', 'sd_resnet20_cifar.svhn',
                      '--img-size', 8, '--epochs', 1, '--val-per-class', 2, 3, '--threads', 1, '--output',
                      tmp_path / 'output', '--experiment', 'a')
    assert result.returncode == 0, result.stderr
    results = read_results(tmp_path / 'output' / 'a')
    assert results['images'] == dict(train=110, val=50, test=30)
    assert results['held_out'] == '[2, 3] of each class'
    assert results['drop_path_rate'] == 0.5
    assert results['changed_from_recipe'] == dict(
        model='sd_resnet20_cifar.svhn', img_size=8, epochs=1, val_per_class=[2, 3])
