"""A training of half a second, for all that doesn't depend on what is trained."""
import pytest

from support.commands import run_here
from support.data import write_classes


@pytest.fixture(scope='session')
def toy(tmp_path_factory):
    """Its flags: three epochs of 36 pictures in four classes and five updates; 12 to select by and 20 to test."""
    folder = write_classes(tmp_path_factory.mktemp('toy'), train=12, test=5)
    return ['--model', 'sd_resnet20_cifar', '--img-size', '8', '--data-dir', folder, '--val-per-class', '3',
            '--epochs', '3', '-b', '8', '--threads', '1', '--no-amp',
            '--drop-path-scale', 'eval']  # whose state_dict, folded, would not do for a resume


@pytest.fixture(scope='session')
def finished(toy, tmp_path_factory):
    """The folder of this training, complete and undisturbed, and what train.py said."""
    output = tmp_path_factory.mktemp('output')
    result = run_here('train.py', *toy, '--output', output, '--experiment', 'finished')
    assert result.returncode == 0, result.stderr
    return output / 'finished', result
