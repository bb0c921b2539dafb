"""timm's contract holds for our networks, with their default drop_path_rate of 0.5: timm's own tests pass on them."""
import os
import subprocess
import sys
import tarfile
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import pytest
import timm
import torch

from support.timm_contract import COMPUTED, TAGGED

TESTS = Path(__file__).parent.parent
# timm's tests that ask list_models for names; each of them has to run on a network of each kind
ON_EACH = [
    'test_model_forward', 'test_model_backward', 'test_model_forward_torchscript', 'test_model_forward_features',
    'test_model_forward_intermediates', 'test_model_forward_intermediates_features',
    'test_prune_intermediate_layers_contract', 'test_model_forward_fx', 'test_model_backward_fx',
    'test_model_forward_fx_torchscript',
]
PRETRAINED = ['test_model_load_pretrained', 'test_model_features_pretrained']


@pytest.mark.parametrize('name', [  # a tag changes none of it
    name if '1202' not in name else pytest.param(name, marks=pytest.mark.slow) for name in timm.list_models('sd_*')])
def test_another_classifier_is_in_the_mode_of_the_network(name):
    with torch.device('meta'):
        model = timm.create_model(name)
    for training in (True, False):
        model.train(training)
        for num_classes, global_pool in ((5, None), (5, 'max'), (0, None), (0, '')):
            model.reset_classifier(num_classes, global_pool)
            assert all(module.training == training for module in model.modules()), (training, num_classes, global_pool)


@pytest.fixture(scope='module')
def timm_tests(tmp_path_factory):
    """timm's tests/ of the installed version, which only its source distribution holds."""
    folder = tmp_path_factory.mktemp('timm_tests')
    command = [sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '--no-binary', 'timm', '-d', str(folder),
               f'timm=={timm.__version__}']
    if subprocess.run(command, capture_output=True).returncode:
        assert 'CI' not in os.environ
        pytest.skip("timm's source distribution can't be downloaded here")
    version = f'timm-{timm.__version__}'
    with tarfile.open(next(folder.glob('*.tar.gz'))) as archive:  # not its timm/, which would shadow the installed one
        wanted = ['tests/__init__.py', 'tests/conftest.py', 'tests/test_models.py', 'pyproject.toml']
        archive.extractall(folder, [archive.getmember(f'{version}/{name}') for name in wanted], filter='data')
    return folder / version


def passed(report):
    """The names of models that each test function passed on."""
    models = defaultdict(set)
    for case in ElementTree.parse(report).iter('testcase'):
        if not any(case.find(other) is not None for other in ('failure', 'error', 'skipped')):
            function, _, parameters = case.get('name').partition('[')
            models[function].add(parameters.rstrip(']').split('-')[-1])
    return models


@pytest.mark.slow
def test_timms_own_tests_pass_and_run_on_our_networks(timm_tests, tmp_path):
    env = {name: value for name, value in os.environ.items() if name != 'GITHUB_ACTIONS'}  # there timm leaves some out
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', '-p', 'support.timm_contract', 'tests/test_models.py', '-k', 'sd_', '-q',
         '--junitxml', str(tmp_path / 'report.xml')],
        cwd=timm_tests, env=dict(env, PYTHONPATH=str(TESTS)), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    models = passed(tmp_path / 'report.xml')
    for function in ON_EACH:
        assert models[function] == set(COMPUTED), function
    assert models['test_model_default_cfgs'] == set(TAGGED)
    for function in PRETRAINED:
        assert models[function] == {'sd_resnet20_cifar.c10', 'sd_resnet20_cifar.c100'}, function  # in the package
