"""Trainings of half a second, for all that doesn't depend on what is trained."""
import shutil
import tempfile
import time
import types

import pytest

from support.commands import run_here
from support.data import write_classes
from support.hub_server import Hub
from support.published import TRAIN, change


@pytest.fixture(scope='session')
def toy_folder(tmp_path_factory):
    """Its data: four classes of 12 training and 5 test images each."""
    return write_classes(tmp_path_factory.mktemp('toy'), train=12, test=5)


@pytest.fixture(scope='session')
def toy_flags(toy_folder):
    """Flags of a training: 36 training, 12 validation and 20 test images, three epochs of five updates."""
    return ['--model', 'sd_resnet20_cifar', '--img-size', '8', '--data-dir', toy_folder, '--val-per-class', '3',
            '--epochs', '3', '-b', '8', '--threads', '1', '--no-amp',
            '--drop-path-scale', 'eval']


@pytest.fixture(scope='session')
def finished(toy_flags, tmp_path_factory):
    """The folder of this training, complete and undisturbed, and what train.py said."""
    output = tmp_path_factory.mktemp('output')
    result = run_here('train.py', *toy_flags, '--output', output, '--experiment', 'finished')
    assert result.returncode == 0, result.stderr
    return output / 'finished', result


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
    """A finished run as train.py leaves it, that says it was trained on CIFAR-10; it was, in fact, on digits."""
    output = tmp_path_factory.mktemp('output')
    result = run_here('train.py', '--model', 'sd_resnet20_cifar', '--img-size', '8', *TRAIN, output)
    assert result.returncode == 0, result.stderr
    change(output / 'a', dataset='uoft-cs/cifar10')
    return output / 'a'


@pytest.fixture
def run_folder(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / 'run')


@pytest.fixture
def signed_in(monkeypatch):
    monkeypatch.setenv('HF_TOKEN', Hub.TOKEN)


@pytest.fixture
def scratch(monkeypatch, tmp_path):
    """Its own cache, and its own folder of temporary files, which is empty at the end."""
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'cache'))
    folder = tmp_path / 'scratch'
    folder.mkdir()
    monkeypatch.setattr(tempfile, 'tempdir', str(folder))
    monkeypatch.setenv('TMPDIR', str(folder))
    yield folder
    assert not list(folder.iterdir())


@pytest.fixture
def waits(monkeypatch):
    """The seconds between two questions, which no test waits for."""
    waited = []
    clock = types.SimpleNamespace(**{**vars(time), 'sleep': waited.append})
    for module in ('timm_sd.asking', 'harness.upload'):
        monkeypatch.setattr(f'{module}.time', clock)
    return waited
