"""pytest plugin under which timm's own tests/test_models.py runs on this project's models.

`list_models` ignores `module=`: the tests of forward_intermediates, the feature getter and pruning ask for models by
timm's modules, and would pass on ours by running on nothing. timm's test of the configurations asks for names with
tags, and gets all of ours: it runs on the meta device. The other tests compute, and get a network of each kind. Of
pretrained ones only those whose weights are in the package are given: no Hub here.
"""
import timm

import timm_sd  # noqa: F401

COMPUTED = ['sd_resnet20_cifar', 'sd_resnet38_cifar', 'sd_resnet18', 'sd_resnet50']
TAGGED = timm.list_models('sd_*', include_tags=True)


_timms_list_models = timm.list_models


def _list_models(*args, module='', include_tags=None, pretrained=False, **kwargs):
    names = _timms_list_models(*args, include_tags=include_tags, pretrained=pretrained, **kwargs)
    if include_tags:
        return [name for name in names if name in TAGGED]
    names = [name for name in names if name.split('.')[0] in COMPUTED]
    return [name for name in names if not pretrained or timm.models.get_pretrained_cfg(name).file]


def pytest_configure():
    """Not at import: the names are needed where timm's function must stay."""
    timm.list_models = timm.models.list_models = _list_models
