"""pytest plugin under which timm's own tests/test_models.py runs on this project's models.

`list_models` ignores `module=`: the tests of forward_intermediates, the feature getter and pruning ask for models by
timm's modules, and would pass on ours by running on nothing. Names with tags are ours too, as timm's test of the
configurations asks for them. Of pretrained ones only those whose weights are in the package are given: no Hub here.
"""
import timm

import timm_sd  # noqa: F401

OURS = ['sd_resnet20_cifar', 'sd_resnet38_cifar', 'sd_resnet18']


_timms_list_models = timm.list_models


def _list_models(*args, module='', pretrained=False, **kwargs):
    names = [name for name in _timms_list_models(*args, pretrained=pretrained, **kwargs) if name.split('.')[0] in OURS]
    return [name for name in names if not pretrained or timm.models.get_pretrained_cfg(name).file]


def pytest_configure():
    """Not at import: the names are needed where timm's function must stay."""
    timm.list_models = timm.models.list_models = _list_models
