"""The ImageNet ResNets with stochastic depth (arXiv 1603.09382, section 4): timm's own ResNet plus the method.

Their state_dict keys are timm's, so they load timm's weights, and timm loads theirs.
"""
from typing import Any

from timm.models import generate_default_cfgs, get_arch_pretrained_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from .gates import DepthGates
from .hub import build_model
from .stochastic_depth import Affine, Residual, make_skippable

__all__ = ['StochasticDepthResNet']  # a list, as timm's registry wants it; register_model appends the entry points


def _residual(block: Any, chained: bool) -> Residual:
    last_act, last_norm = ('act2', block.bn2) if isinstance(block, BasicBlock) else ('act3', block.bn3)
    path = (last_act,) if block.downsample is None else ('downsample', last_act)
    last_affine = (Affine('drop_path', last_norm),) if block.se is None else ()  # attention isn't linear
    nonnegative = isinstance(getattr(block, last_act), nn.ReLU)  # timm's ResNet has one kind of activation
    return Residual(block, shortcut_path=path, last_affine=last_affine, chained=chained, nonnegative=nonnegative)


class StochasticDepthResNet(ResNet):
    """timm's ResNet whose blocks are dropped by the paper's rule; downsampling blocks close to their projection.

    Args:
        *args: timm's, see `timm.models.resnet.ResNet`.
        drop_path_rate: 1 - p_L, in [0, 1); 0 is the constant-depth network.
        drop_path_schedule: 'linear' or 'uniform'.
        drop_path_mode: 'batch', 'subset' or 'sample', see `make_skippable`.
        drop_path_scale: 'train' or 'eval', see `make_skippable`; by default 'eval' in mode 'batch', else 'train'.
        drop_path_seed: Seed of the gates.
        **kwargs: timm's.

    Raises:
        ValueError: If a drop_path argument isn't one of these.
    """

    def __init__(
            self,
            *args: Any,
            drop_path_rate: float = 0.5,
            drop_path_schedule: str = 'linear',
            drop_path_mode: str = 'batch',
            drop_path_scale: str | None = None,
            drop_path_seed: int = 0,
            **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.drop_path_rate = drop_path_rate
        stages = [list(getattr(self, name)) for name in ('layer1', 'layer2', 'layer3', 'layer4')]
        gates = DepthGates(
            sum(map(len, stages)), drop_path_rate, drop_path_schedule, drop_path_mode, drop_path_scale, drop_path_seed)
        make_skippable([_residual(block, chained=block is not stage[-1]) for stage in stages for block in stage], gates,
                       initialize=True)


# register_model reads this table at decoration time: it must stand above the entry points
default_cfgs = generate_default_cfgs({
    f'sd_{name}': cfg for depth in (18, 34, 50, 101, 152)
    for name, cfg in get_arch_pretrained_cfgs(f'resnet{depth}').items() if cfg.hf_hub_id
})


def _create_resnet(name: str, pretrained: bool, block: type, layers: tuple[int, ...], **kwargs: Any) -> ResNet:
    return build_model(StochasticDepthResNet, name, pretrained, block=block, layers=layers, **kwargs)


@register_model
def sd_resnet18(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """18 layers: 8 blocks."""
    return _create_resnet('sd_resnet18', pretrained, BasicBlock, (2, 2, 2, 2), **kwargs)


@register_model
def sd_resnet34(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """34 layers: 16 blocks."""
    return _create_resnet('sd_resnet34', pretrained, BasicBlock, (3, 4, 6, 3), **kwargs)


@register_model
def sd_resnet50(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """50 layers: 16 bottleneck blocks."""
    return _create_resnet('sd_resnet50', pretrained, Bottleneck, (3, 4, 6, 3), **kwargs)


@register_model
def sd_resnet101(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """101 layers: 33 bottleneck blocks."""
    return _create_resnet('sd_resnet101', pretrained, Bottleneck, (3, 4, 23, 3), **kwargs)


@register_model
def sd_resnet152(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """152 layers: 50 bottleneck blocks, the paper's network for ImageNet."""
    return _create_resnet('sd_resnet152', pretrained, Bottleneck, (3, 8, 36, 3), **kwargs)
