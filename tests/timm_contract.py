"""pytest plugin under which timm's own tests/test_models.py runs on this project's models.

`list_models` ignores `module=` and returns ours: the tests of forward_intermediates, the feature getter and pruning ask
for models by timm's modules, and would pass on ours by running on nothing.
"""
import timm

import timm_sd  # noqa: F401

OURS = ['sd_resnet20_cifar', 'sd_resnet38_cifar', 'sd_resnet18']


_timms_list_models = timm.list_models


def _list_models(*args, module='', **kwargs):
    return [name for name in _timms_list_models(*args, **kwargs) if name in OURS]


timm.list_models = _list_models
timm.models.list_models = _list_models
