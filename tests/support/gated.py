"""Networks whose gates are forced, and the plain ones that compute all branches and multiply them by 0 or 1 / p."""
import copy

import pytest

import timm_sd
from support.kinds import added
from support.networks import Naive, force, freeze_statistics, pictures, toy
from timm_sd.skippable import SkippableBlock

RATE = 0.5
PATTERNS = {'toy': (True, False, False), 'test_resnet': (False, True, False, False),
            'test_vit': (True, False, False, True, True, False)}
each_network = pytest.mark.parametrize('name', PATTERNS)
each_scale = pytest.mark.parametrize('scale', ['train', 'eval'])


def skippable(model):
    return [block for block in model.modules() if isinstance(block, SkippableBlock)]


def forced(name, gates=None, scale='train'):
    """A network with these gates, by default those of PATTERNS, and images for it."""
    if name == 'toy':
        model, x = toy(drop_path_rate=RATE, drop_path_schedule='uniform', drop_path_scale=scale), pictures()
    else:
        model = added(name, RATE, schedule='uniform', scale=scale)
        x = pictures(2, 64 if name == 'test_vit' else 32)
    force(model, gates or PATTERNS[name])
    return freeze_statistics(model), x  # a plain block would move them where a closed one doesn't


def naive(model, gates):
    """The plain network of the same weights, which multiplies each branch as `gates` say, and its blocks."""
    model = copy.deepcopy(model)
    blocks = {block: block.drop_path_slots for block in skippable(model)}
    timm_sd.remove_stochastic_depth(model)
    for (block, slots), is_open in zip(blocks.items(), gates, strict=True):
        for slot in slots:
            setattr(block, slot, Naive(is_open / (1. - RATE)))
    return model, list(blocks)


def gradients(model):
    return {name: param.grad for name, param in model.named_parameters()}
