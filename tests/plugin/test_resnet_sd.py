"""The ImageNet networks: timm's own ResNet in evaluation, the naive rule in training, weights of either for the other.
"""
import pytest
import timm
import torch
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

import timm_sd
from support.networks import Naive, blocks_of, force
from timm_sd.resnet_sd import StochasticDepthResNet

NARROW = dict(layers=(2, 1, 1, 1), channels=(16, 16, 24, 32), num_classes=10)
VARIANTS = {
    'basic': dict(block=BasicBlock),
    'bottleneck': dict(block=Bottleneck),
    'pooled downsampling': dict(block=BasicBlock, avg_down=True),
    'another activation': dict(block=Bottleneck, act_layer=nn.SiLU),
    'attention': dict(block=BasicBlock, block_args=dict(attn_layer='se')),
}


def network(cls, variant, **kwargs):
    torch.manual_seed(0)
    if cls is StochasticDepthResNet and variant == 'attention':  # which can't absorb p_l
        kwargs.setdefault('drop_path_scale', 'train')
    return cls(**NARROW, **VARIANTS[variant], **kwargs)


def images(n=4):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def all_blocks(model):
    return [*blocks_of(model), *model.layer4]


def last_norm(block):
    return block.bn2 if isinstance(block, BasicBlock) else block.bn3


def last_norms(model):
    """Weight and bias of the last batch norm of each branch."""
    return [param for block in all_blocks(model) for param in last_norm(block).parameters()]


@pytest.mark.parametrize(('name', 'blocks'), [
    ('sd_resnet18', 8), ('sd_resnet34', 16), ('sd_resnet50', 16), ('sd_resnet101', 33), ('sd_resnet152', 50)])
def test_depths_and_parameters_are_timms(name, blocks):
    with torch.device('meta'):
        model, timms = timm.create_model(name), timm.create_model(name.removeprefix('sd_'))
    assert len(timm_sd.depth_gates(model).open) == blocks
    assert timm_sd.depth_gates(model).drop_path_rates[-1] == 0.5
    assert {key: value.shape for key, value in model.state_dict().items()} \
        == {key: value.shape for key, value in timms.state_dict().items()}


@pytest.mark.parametrize('variant', VARIANTS)
def test_evaluation_is_timms(variant):
    model, timms = network(StochasticDepthResNet, variant).eval(), network(ResNet, variant).eval()
    timms.load_state_dict(model.state_dict())
    assert torch.equal(model(images()), timms(images()))


@pytest.mark.parametrize(('variant', 'scale'), [
    (variant, scale) for variant in VARIANTS for scale in timm_sd.SCALES if (variant, scale) != ('attention', 'eval')])
def test_training_is_that_of_the_naive_rule(variant, scale):
    gates = [True, False, False, True, False]
    model = network(StochasticDepthResNet, variant, drop_path_schedule='uniform', drop_path_scale=scale).train()
    force(model, gates)
    naive = network(ResNet, variant).train()
    naive.load_state_dict(model.state_dict())
    for block, is_open in zip(all_blocks(naive), gates, strict=True):
        block.drop_path = Naive(2. if is_open else 0.)
    ours, theirs = model(images()), naive(images())
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    ours.square().mean().backward()
    theirs.square().mean().backward()
    last = last_norms(naive) if scale == 'eval' else []
    for (key, ours), theirs in zip(model.named_parameters(), naive.parameters(), strict=True):
        assert ours.grad is not None, key
        # of the last batch norm of a branch p_l ** 2 times the gradient by the chain rule
        expected = 0.25 * theirs.grad if any(theirs is param for param in last) else theirs.grad
        torch.testing.assert_close(ours.grad, expected, rtol=1e-3, atol=1e-5, msg=lambda m, key=key: f'{key}: {m}')


@pytest.mark.parametrize('variant', VARIANTS)
def test_of_a_closed_block_the_projection_alone_runs(variant):
    model = network(StochasticDepthResNet, variant).train()
    force(model, [False] * 5)
    ran = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.Linear)):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    model(images())
    blocks = {name.split('.')[2] for name in ran if name.startswith('layer')}
    assert blocks == {'downsample'}
    assert len([name for name in ran if 'downsample' in name]) == 2 * (3 if model.layer1[0].downsample is None else 4)


@pytest.mark.parametrize('variant', ['basic', 'bottleneck'])
def test_scale_eval_starts_at_p_times_timms_weights(variant):
    model, timms = network(StochasticDepthResNet, variant), network(ResNet, variant)
    assert timm_sd.depth_gates(model).scale == 'eval'
    with torch.no_grad():
        for block, survival in zip(all_blocks(timms), (0.9, 0.8, 0.7, 0.6, 0.5), strict=True):
            for param in last_norm(block).parameters():
                param.mul_(survival)
    for (key, value), expected in zip(model.state_dict().items(), timms.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, msg=lambda m, key=key: f'{key}: {m}')
    train = network(StochasticDepthResNet, variant, drop_path_scale='train').state_dict()
    assert all(torch.equal(value, train[key]) for key, value in network(ResNet, variant).state_dict().items())


def test_a_branch_that_ends_in_an_attention_can_not_absorb_p():
    for kwargs in (dict(drop_path_scale='eval'), dict(drop_path_scale=None)):
        with pytest.raises(ValueError, match="use 'train'"):
            network(StochasticDepthResNet, 'attention', **kwargs)
