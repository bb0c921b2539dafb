"""A small network of each kind of residual block that timm has, with stochastic depth added or without."""
import warnings
from typing import NamedTuple

import pytest
import timm
import torch
from timm.models import build_model_with_cfg, get_model_input_config
from timm.models.byobnet import ByoBlockCfg
from timm.models.metaformer import Attention, GroupNorm1, LayerNorm2dNoBias, LayerNormNoBias, MetaFormer, SepConv
from timm.models.mlp_mixer import MlpMixer
from torch import nn

import timm_sd
from timm_sd.probe import residual_blocks


class Kind(NamedTuple):
    """Arguments that make a network small, and how many of its blocks can be closed, and how many can't."""
    kwargs: dict
    closable: int
    stay_open: int = 0


def _bottleneck(d, c, s):
    return ByoBlockCfg(type='bottle', d=d, c=c, s=s, gs=0, br=0.25)


# for networks that take any size but ask for a large one; the others have img_size
INPUT_64 = dict(pretrained_cfg_overlay=dict(input_size=(3, 64, 64)))
RESNET = dict(INPUT_64, layers=(2, 1, 1, 1), channels=(16, 16, 32, 32))
META = dict(INPUT_64, depths=(2, 1, 1, 1), dims=(16, 16, 32, 32))
TRANSFORMER = dict(depth=3, embed_dim=48, num_heads=3, img_size=64)

# What is beside the branch is the identity alone where nothing is said.
KINDS = {
    'test_resnet': Kind(INPUT_64, 4),  # downsample, then act2 or act3
    'resnet33ts': Kind(  # shortcut, then act, an activation that isn't a ReLU
        dict(INPUT_64, blocks=(_bottleneck(2, 32, 2), _bottleneck(1, 48, 2)), stem_chs=16, num_features=64), 3),
    'nf_regnet_b0': Kind(  # blocks that stay open
        dict(INPUT_64, depths=(1, 2, 1, 1), channels=(16, 16, 24, 32), group_size=8, num_features=32), 2, 3),
    'test_convnext': Kind(INPUT_64, 9),
    'test_vit': Kind(dict(img_size=64), 6),  # two slots a block
    'swin_tiny_patch4_window7_224': Kind(
        dict(embed_dim=24, depths=(1, 2, 1), num_heads=(1, 2, 3), img_size=64, window_size=4), 4),
    'davit_tiny': Kind(  # cpe1, then cpe2
        dict(INPUT_64, depths=(1, 1, 1, 1), embed_dims=(16, 16, 32, 32), num_heads=(1, 1, 2, 2)), 8),
    'xcit_nano_12_p16_224': Kind(TRANSFORMER, 3, 2),  # three slots a block
    'caformer_s18': Kind(META, 5),  # res_scale1, then res_scale2
    'mobilenetv2_035': Kind(INPUT_64, 10),  # blocks without a shortcut between them
    'fastvit_t8': Kind(dict(INPUT_64, layers=(1, 1, 1, 1), embed_dims=(16, 16, 32, 32)), 4),  # a single module
    'resnext50_32x4d': Kind(dict(RESNET, cardinality=4, base_width=16), 5),
    'seresnet18': Kind(RESNET, 5),
    'regnetx_002': Kind(dict(INPUT_64, depth=8, w0=8, group_size=8), 8),
    'deit_tiny_patch16_224': Kind(TRANSFORMER, 3),
    'beit_base_patch16_224': Kind(TRANSFORMER, 3),
    'eva02_tiny_patch14_224': Kind(dict(TRANSFORMER, img_size=56), 3),
    'mixer_s32_224': Kind(dict(num_blocks=2, embed_dim=48, img_size=64), 2),
    'poolformer_s12': Kind(META, 5),
    'hiera_tiny_224': Kind(dict(stages=(1, 2, 2, 1), embed_dim=24, img_size=64), 3, 3),
    'mobilenetv3_small_050': Kind(INPUT_64, 7),
    'coatnet_pico_rw_224': Kind(  # the shortcut module of two kinds of block
        dict(depths=(1, 1, 2, 1), embed_dim=(32,) * 4, stem_width=(16, 32), img_size=64), 5),
    'swiftformer_xs': Kind(dict(INPUT_64, layers=(2, 1, 1, 1), embed_dims=(16, 16, 32, 32)), 5, 4),
}
each_kind = pytest.mark.parametrize('name', KINDS)

# Networks whose entry points don't let the arguments that make them small be given.
_CLASSES = {
    'mixer_s32_224': (MlpMixer, dict(patch_size=32)),
    'poolformer_s12': (MetaFormer, dict(
        downsample_norm=None, mlp_act=nn.GELU, mlp_bias=True, norm_layers=GroupNorm1, layer_scale_init_values=1e-5,
        res_scale_init_values=None, use_mlp_head=False)),
    'caformer_s18': (MetaFormer, dict(
        token_mixers=[SepConv, SepConv, Attention, Attention],
        norm_layers=[LayerNorm2dNoBias] * 2 + [LayerNormNoBias] * 2)),
}


def network(name='test_resnet', **kwargs):
    """The plain network, with the same weights each time; no branch starts at zero, which would prove nothing."""
    torch.manual_seed(0)
    kwargs = {**KINDS[name].kwargs, 'num_classes': 10, **kwargs}
    if name in _CLASSES:
        model_class, fixed = _CLASSES[name]
        model = build_model_with_cfg(model_class, name, False, **fixed, **kwargs)
    else:
        model = timm.create_model(name, **kwargs)
    for module in model.modules():
        for param in module.parameters(recurse=False):
            if not param.any():
                nn.init.uniform_(param, 0.1, 0.5)
            if type(module).__name__.startswith('LayerScale') or param.abs().max() < 1e-3:
                nn.init.uniform_(param, 0.5, 1.)
    return model


def images(model, n=4):
    """The same random pictures each time, of the model's input size."""
    size = get_model_input_config(model)['input_size']
    return torch.randn(n, *size, generator=torch.Generator().manual_seed(1))


def added(name='test_resnet', rate=0.5, **kwargs):
    """`network` with stochastic depth; the warning of blocks that stay open has a test of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return timm_sd.add_stochastic_depth(network(name), rate, **kwargs)


def residuals(plain):
    """The name of each block of a plain network that can be closed, with its slots and the modules beside the branch.

    From the names the same blocks can be had of a network with stochastic depth.
    """
    names = {module: name for name, module in plain.named_modules()}
    return {names[found.block]: found for found in residual_blocks(plain)[0]}
