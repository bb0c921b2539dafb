"""For all tests: one thread a worker of pytest-xdist, and no Hub but one on loopback."""
import os
import tempfile

# The libraries read these when they are imported, so they are set before any test module is.
if 'PYTEST_XDIST_WORKER' in os.environ:
    os.environ['OMP_NUM_THREADS'] = '1'
for _name in ('HF_TOKEN', 'HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE', 'TIMM_SD_HUB_ORG'):
    os.environ.pop(_name, None)

import pytest  # noqa: E402

from support.hub_server import Hub  # noqa: E402

_HUB = Hub()
_HOME = tempfile.TemporaryDirectory(prefix='hf-home-')
os.environ.update(HF_ENDPOINT=_HUB.url, HF_HOME=_HOME.name, HF_HUB_DISABLE_XET='1')


@pytest.fixture
def hub():
    """The Hub of this process, empty and without a fault; HF_ENDPOINT, here and in child processes, is its address."""
    _HUB.reset()
    yield _HUB
    _HUB.reset()
