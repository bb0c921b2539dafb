"""timm's own model tests pass on our networks, with their default drop_path_rate of 0.5."""
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import timm

TESTS = Path(__file__).parent


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


def test_timms_own_tests_pass(timm_tests):
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', '-p', 'timm_contract', 'tests/test_models.py', '-k', 'sd_', '-q'],
        cwd=timm_tests, env=dict(os.environ, PYTHONPATH=str(TESTS)), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    assert int(re.search(r'(\d+) passed', result.stdout)[1]) >= 30  # ten test functions, three networks
