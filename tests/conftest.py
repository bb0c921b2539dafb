"""For all tests: the CPU, one thread a worker of pytest-xdist, and no Hub but one on loopback."""
import os
import tempfile

# The libraries read these when they are imported, so they are set before any test module is.
for _name in [name for name in os.environ if name.startswith(('HF_', 'HUGGING', 'TIMM_SD_'))]:
    del os.environ[_name]
os.environ['CUDA_VISIBLE_DEVICES'] = ''
os.environ['NO_PROXY'] = os.environ['no_proxy'] = '127.0.0.1'
if 'PYTEST_XDIST_WORKER' in os.environ:
    os.environ['OMP_NUM_THREADS'] = '1'

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
