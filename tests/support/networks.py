"""Networks whose gates a test decides, and a count of what they run."""
from collections import Counter

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import timm_sd
from timm_sd.resnet_cifar_sd import ResNetCifar


def toy(blocks_per_stage=1, **kwargs):
    """The paper's network with three stages of `blocks_per_stage` blocks each.

    The same weights each time. Its rates are 1/6, 1/3 and 1/2 unless `kwargs` say otherwise.
    """
    torch.manual_seed(0)
    return ResNetCifar(blocks_per_stage, **kwargs)


def blocks_of(model):
    """The residual blocks of a `toy`, or of an entry point of its kind, in the order of the forward pass."""
    return [*model.layer1, *model.layer2, *model.layer3]


def pictures(n=4, size=8):
    """The same random pictures each time, (n, 3, size, size)."""
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def force(model, gates):
    """Makes every draw of `model` these gates."""
    depth_gates = timm_sd.depth_gates(model)
    depth_gates.draw = lambda: setattr(depth_gates, 'open', list(gates))


def lively(model):
    """Gives batch norm weights, biases and statistics that aren't those of the start."""
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in ((module.weight, 0.5), (module.bias, -0.5), (module.running_mean, -0.5),
                                (module.running_var, 0.5)):
                nn.init.uniform_(tensor, low, low + 1., generator=generator)
    return model


def freeze_statistics(model):
    """Training mode, but for batch norm; until the next train() or eval()."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


class Naive(nn.Module):
    """In a `drop_path` slot, the reference: the whole branch is computed, then multiplied by 0 or by 1 / p."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


class CountOps(TorchDispatchMode):
    """Counts the operators that really run, forward and backward."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))
