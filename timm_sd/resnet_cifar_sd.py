"""The 6N+2 ResNets of CIFAR and SVHN with stochastic depth (arXiv 1603.09382, section 4), for timm's registry.

The block is conv-BN-ReLU-conv-BN with a ReLU **after** the addition. The shortcut has no parameters (option A of He et
al.): where the shape changes, 2x2 average pooling, then zero channels appended. The stem is never dropped;
downsampling blocks are, and then only their shortcut runs.
"""
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import create_classifier, get_device_dtype
from timm.models import generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import nn
from torch.utils.checkpoint import checkpoint

from .gates import DepthGates
from .hub import build_model
from .skippable import add_branch
from .stochastic_depth import Affine, Residual, make_skippable

__all__ = ['ResNetCifar']  # a list, as timm's registry wants it; register_model appends the entry points


class PoolPad(nn.Module):
    """Shortcut without parameters (B, C, H, W) -> (B, C + extra_chs, H / 2, W / 2): average pooling, zero channels."""

    def __init__(self, extra_chs: int) -> None:
        super().__init__()
        self.extra_chs = extra_chs
        # ceil_mode matches the stride-2 convolution beside it at odd sizes
        self.pool = nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(self.pool(x), (0, 0, 0, 0, 0, self.extra_chs))


class BasicBlock(nn.Module):
    """ReLU(shortcut + f), f = conv3x3-BN-ReLU-conv3x3-BN.

    A closed block is ReLU(shortcut). Where the shortcut is the identity nothing runs, for the input comes out of a
    ReLU.

    Args:
        in_chs: Channels of the input.
        out_chs: Channels of the output.
        stride: Stride of the first convolution; 2 halves the image.
    """

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            stride: int = 1,
            device=None,
            dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride=stride, padding=1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(out_chs, **dd)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, padding=1, bias=False, **dd)
        self.bn2 = nn.BatchNorm2d(out_chs, **dd)
        self.act2 = nn.ReLU(inplace=True)
        self.shortcut = nn.Identity() if stride == 1 else PoolPad(out_chs - in_chs)
        self.drop_path = nn.Identity()  # make_skippable puts a DropPathSlot here
        self.grad_checkpointing = False
        self.compiled_branch: Any = None

    @torch.jit.ignore
    def compile(self, **options: Any) -> None:
        """Compiles the branch for training, not the block: checkpointing stays outside.

        Not the block's own: its parameters are inputs of the graph, so blocks of one shape share one build, and a
        deepcopy of the network runs the same code on its own weights.
        """
        self.compiled_branch = torch.compile(BasicBlock.branch, **options)

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        """The residual function f, (B, in_chs, H, W) -> (B, out_chs, H / stride, W / stride)."""
        return self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))

    def run_branch(self, x: torch.Tensor) -> torch.Tensor:
        """branch(x): compiled for training, and with activations recomputed in the backward pass, where asked for."""
        branch = (self.training and self.compiled_branch) or BasicBlock.branch
        return self.recompute(branch, x) if self.grad_checkpointing else branch(self, x)

    @torch.compiler.disable  # torch.compile can't trace a checkpoint with a context_fn
    def recompute(self, branch: Any, x: torch.Tensor) -> torch.Tensor:
        """branch(self, x), with activations that are recomputed in the backward pass."""
        return checkpoint(
            branch, self, x, use_reentrant=False, context_fn=lambda: (nullcontext(), self.statistics_at_rest()))

    @contextmanager
    def statistics_at_rest(self) -> Iterator[None]:
        """Within it batch norm moves no running statistic: the recomputation must not do so a second time."""
        # not track_running_stats = False: autograd would then save fewer tensors than in the forward pass
        layers: Any = [layer for layer in (self.bn1, self.bn2)
                       if getattr(layer, 'num_batches_tracked', None) is not None]  # it has statistics
        before = [(layer.momentum, layer.num_batches_tracked.clone()) for layer in layers]
        for layer in layers:
            layer.__dict__['momentum'] = 0.  # not by assignment, which reaches the layer that this may be a copy of
        try:
            yield
        finally:
            for layer, (momentum, batches) in zip(layers, before, strict=True):
                layer.__dict__['momentum'] = momentum
                layer.num_batches_tracked.copy_(batches)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = self.shortcut(x)
        if torch.jit.is_scripting():  # evaluation alone can be scripted
            return self.act2(shortcut + self.drop_path(self.branch(x)))
        else:
            # the branch, not the block, is compiled and recomputed: so batch norm's statistics can rest meanwhile
            return self.act2(add_branch(self, shortcut, self.run_branch(x)))


class ResNetCifar(nn.Module):
    """ResNet of depth 6N+2 for small images.

    Args:
        blocks_per_stage: N.
        num_classes: Number of classes.
        in_chans: Channels of the input image.
        global_pool: timm's name of the pooling before the classifier.
        drop_rate: Dropout before the classifier.
        drop_path_rate: 1 - p_L, in [0, 1); 0 is the constant-depth network.
        drop_path_schedule: 'linear' or 'uniform'.
        drop_path_mode: 'batch', 'subset' or 'sample', see `make_skippable`.
        drop_path_scale: 'train' or 'eval', see `make_skippable`; by default 'eval' in mode 'batch', else 'train'.
        drop_path_seed: Seed of the gates.

    Raises:
        ValueError: If a drop_path argument isn't one of these.
    """

    def __init__(
            self,
            blocks_per_stage: int,
            num_classes: int = 10,
            in_chans: int = 3,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            drop_path_rate: float = 0.5,
            drop_path_schedule: str = 'linear',
            drop_path_mode: str = 'batch',
            drop_path_scale: str | None = None,
            drop_path_seed: int = 0,
            device=None,
            dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = 64
        self.drop_rate = drop_rate
        self.drop_path_rate = drop_path_rate

        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(16, **dd)
        self.act1 = nn.ReLU(inplace=True)

        def stage(in_chs: int, out_chs: int, stride: int) -> nn.Sequential:
            first = BasicBlock(in_chs, out_chs, stride, **dd)
            rest = [BasicBlock(out_chs, out_chs, 1, **dd) for _ in range(blocks_per_stage - 1)]
            return nn.Sequential(first, *rest)

        self.layer1, self.layer2, self.layer3 = stage(16, 16, 1), stage(16, 32, 2), stage(32, 64, 2)
        self.feature_info = [
            dict(num_chs=16, reduction=1, module='layer1'),
            dict(num_chs=32, reduction=2, module='layer2'),
            dict(num_chs=64, reduction=4, module='layer3'),
        ]
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

        stages: Any = (self.layer1, self.layer2, self.layer3)
        gates = DepthGates(
            3 * blocks_per_stage, drop_path_rate, drop_path_schedule, drop_path_mode, drop_path_scale, drop_path_seed)
        make_skippable([
            Residual(block, shortcut_path=('shortcut', 'act2'), last_affine=(Affine('drop_path', block.bn2),),
                     chained=block is not stage[-1], nonnegative=True)
            for stage in stages for block in stage], gates, initialize=True)
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """He initialisation; BN starts at gamma = 1, for the release's U(0, 1) is a known cause of non-convergence."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_in', nonlinearity='relu')

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        return dict(stem=r'^conv1|bn1', blocks=r'^layer(\d+)' if coarse else r'^layer(\d+)\.(\d+)')

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for block in (*self.layer1, *self.layer2, *self.layer3):
            block.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(
            self, num_classes: int, global_pool: str | None = None, device=None, dtype=None) -> None:
        """Replaces pooling and classifier; 0 classes leave the features."""
        self.num_classes = num_classes
        if global_pool is None:
            global_pool = self.global_pool.pool_type
        self.global_pool, self.fc = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, **get_device_dtype(self, device, dtype))
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: int | list[int] | None = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Features after each of the three stages.

        Args:
            x: Images, (B, in_chans, H, W).
            indices: Stages to return: the last n if int, all if None, these if a sequence.
            norm: Unused, as in timm's ResNet: there is no final norm.
            stop_early: Stop after the last stage asked for.
            output_fmt: 'NCHW'.
            intermediates_only: Return the list alone.

        Returns:
            The list of (B, C, H, W), behind the last features unless `intermediates_only`.
        """
        assert output_fmt == 'NCHW', 'Output shape must be NCHW.'
        take_indices, max_index = feature_take_indices(3, indices)
        layers = [self.layer1, self.layer2, self.layer3]
        intermediates = []
        x = self.forward_stem(x)
        for index, layer in enumerate(layers[:max_index + 1] if stop_early else layers):
            x = layer(x)
            if index in take_indices:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
            self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True) -> list[int]:
        """Empties the stages behind the last one asked for, and the head; returns the indices kept."""
        take_indices, max_index = feature_take_indices(3, indices)
        for stage in range(max_index + 1, 3):
            setattr(self, f'layer{stage + 1}', nn.Sequential())
        if prune_head:
            self.reset_classifier(0, '')
        return take_indices

    def forward_stem(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) -> (B, 16, H, W)."""
        return self.act1(self.bn1(self.conv1(x)))

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) -> (B, 64, H / 4, W / 4)."""
        return self.layer3(self.layer2(self.layer1(self.forward_stem(x))))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """(B, 64, H, W) -> logits (B, num_classes), or pooled features (B, 64) with `pre_logits`."""
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


_PRETRAINED = Path(__file__).parent / 'pretrained'
# classes, and mean and standard deviation of the training images, each channel in [0, 1]
_DATA_SETS: dict[str, dict[str, Any]] = dict(
    c10=dict(num_classes=10, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),
    c100=dict(num_classes=100, mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762)),
    svhn=dict(num_classes=10, mean=(0.4377, 0.4438, 0.4728), std=(0.1980, 0.2010, 0.1970)),
)
_DEPTHS = (20, 32, 38, 44, 56, 74, 92, 110, 152, 1202)


def _cfg(name: str, tag: str) -> dict[str, Any]:
    weights = _PRETRAINED / f'{name}.{tag}.safetensors'
    return dict(
        file=str(weights) if weights.exists() else None,
        input_size=(3, 32, 32), pool_size=(8, 8), crop_pct=1.0, interpolation='bilinear',
        first_conv='conv1', classifier='fc', license='apache-2.0',
        paper_name='Deep Networks with Stochastic Depth', paper_ids='arXiv:1603.09382',
        **_DATA_SETS[tag],
    )


# register_model reads this table at decoration time: it must stand above the entry points
default_cfgs = generate_default_cfgs({
    f'sd_resnet{depth}_cifar.{tag}': _cfg(f'sd_resnet{depth}_cifar', tag) for depth in _DEPTHS for tag in _DATA_SETS
})


def _create_resnet_cifar(depth: int, pretrained: bool = False, **kwargs: Any) -> ResNetCifar:
    return build_model(
        ResNetCifar, f'sd_resnet{depth}_cifar', pretrained,
        feature_cfg=dict(out_indices=(0, 1, 2), feature_cls='getter'),
        blocks_per_stage=(depth - 2) // 6,
        **kwargs,
    )


@register_model
def sd_resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetCifar:
    """20 layers: 9 blocks."""
    return _create_resnet_cifar(20, pretrained, **kwargs)


@register_model
def sd_resnet32_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetCifar:
    """32 layers: 15 blocks."""
    return _create_resnet_cifar(32, pretrained, **kwargs)


@register_model
def sd_resnet38_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetCifar:
    """38 layers: 18 blocks."""
    return _create_resnet_cifar(38, pretrained, **kwargs)


@register_model
def sd_resnet44_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetCifar:
    """44 layers: 21 blocks."""
    return _create_resnet_cifar(44, pretrained, **kwargs)


@register_model
def sd_resnet56_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetCifar:
    """56 layers: 27 blocks."""
    return _create_resnet_cifar(56, pretrained, **kwargs)


@register_model
def sd_resnet74_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetCifar:
    """74 layers: 36 blocks."""
    return _create_resnet_cifar(74, pretrained, **kwargs)


@register_model
def sd_resnet92_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetCifar:
    """92 layers: 45 blocks."""
    return _create_resnet_cifar(92, pretrained, **kwargs)


@register_model
def sd_resnet110_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetCifar:
    """110 layers: 54 blocks, the paper's network for CIFAR."""
    return _create_resnet_cifar(110, pretrained, **kwargs)


@register_model
def sd_resnet152_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetCifar:
    """152 layers: 75 blocks, the paper's network for SVHN."""
    return _create_resnet_cifar(152, pretrained, **kwargs)


@register_model
def sd_resnet1202_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetCifar:
    """1202 layers: 600 blocks."""
    return _create_resnet_cifar(1202, pretrained, **kwargs)
