"""A state dict is that of the plain network, at any moment and with no hook.

Whatever is done to the layers, the network computes the right function in evaluation and in training: the judge is a
plain network with the naive rule, to which the same was done.
"""
import copy

import pytest
import torch
from timm.layers import BatchNormAct2d, freeze_batch_norm_2d
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import AveragedModel

import timm_sd
from support import reference
from support.kinds import added, images, network
from support.networks import Naive, blocks_of, force, freeze_statistics, lively, pictures, toy

BLOCKS_PER_STAGE, LR, MOMENTUM, WEIGHT_DECAY = 2, 0.1, 0.9, 1e-2
SURVIVAL = reference.survival_probabilities(6, 0.5)

each_scale = pytest.mark.parametrize('scale', timm_sd.SCALES)


def train(model, updates=3, after=lambda: None):
    """Updates by SGD, and `after` each."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9)
    for _ in range(updates):
        optimizer.zero_grad()
        model(pictures()).square().mean().backward()
        optimizer.step()
        after()
    return model


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# --- plain at any moment


def assert_plain(model):
    """Its state dict has the plain network's keys and the very parameters and buffers, and no hook has a say in it."""
    state = model.state_dict()
    assert state.keys() == timm_sd.remove_stochastic_depth(toy(2)).state_dict().keys()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(value.data_ptr() == tensors[key].data_ptr() for key, value in state.items())
    for module in model.modules():
        assert not any(getattr(module, hooks) for hooks in (
            '_state_dict_hooks', '_state_dict_pre_hooks', '_load_state_dict_pre_hooks', '_load_state_dict_post_hooks',
            '_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks'))
    assert not any(param._backward_hooks or param._post_accumulate_grad_hooks for param in model.parameters())


@each_scale
def test_a_state_dict_is_plain_before_and_after_training(scale):
    model = toy(2, drop_path_scale=scale).train()
    assert_plain(model)
    assert_plain(train(model))


@pytest.mark.parametrize('mode', ['subset', 'sample'])
def test_a_state_dict_of_another_mode_is_plain_too(mode):
    model = toy(2, drop_path_mode=mode).train()
    assert_plain(model)
    assert_plain(train(model))


@each_scale
def test_a_state_dict_is_plain_within_a_forward_and_a_backward_pass(scale):
    model = toy(2, drop_path_scale=scale).train()
    force(model, [True] * 6)
    before = {key: value.clone() for key, value in model.named_parameters()}
    parameters, seen = list(model.parameters()), []

    def look(*_):
        state = model.state_dict()
        seen.append(all(torch.equal(state[key], value) for key, value in before.items()))
        seen.append(all(ours is known for ours, known in zip(model.parameters(), parameters, strict=True)))

    for block in blocks_of(model):
        for layer in (block.conv1, block.bn2, block.act2):
            layer.register_forward_hook(look)
    x = pictures().requires_grad_()
    y = model(x)
    x.register_hook(look)
    y.sum().backward()
    assert len(seen) == 2 * (3 * 6 + 1)
    assert all(seen)


def test_scale_eval_starts_the_last_batch_norm_at_p_times_the_usual():
    for model, factors in ((toy(2), SURVIVAL), (toy(2, drop_path_scale='train'), [1.] * 6)):
        for block, factor in zip(blocks_of(model), factors, strict=True):
            torch.testing.assert_close(block.bn2.weight, torch.full_like(block.bn2.weight, factor))
            assert not block.bn2.bias.any()
            assert (block.bn1.weight == 1.).all()
    usual = toy(2, drop_path_scale='train').state_dict()
    assert all(torch.equal(value, usual[key]) for key, value in toy(2).state_dict().items() if 'bn2.weight' not in key)


@pytest.mark.parametrize('name', ['test_vit', 'resnet33ts', 'mobilenetv2_035'])
def test_trained_weights_stay_bit_for_bit_where_the_method_is_added_and_removed(name):
    plain = network(name).eval()
    model = added(name, scale='eval').eval()
    for _ in ('added', 'removed'):
        assert torch.equal(model(images(plain)), plain(images(plain)))
        assert model.state_dict().keys() == plain.state_dict().keys()
        assert all(torch.equal(value, plain.state_dict()[key]) for key, value in model.state_dict().items())
        timm_sd.remove_stochastic_depth(model)


@each_scale
def test_evaluation_knows_no_rate_and_no_scale(scale):
    model = train(lively(toy(2, drop_path_scale=scale)).train()).eval()
    expected, state = model(pictures()), copy.deepcopy(model.state_dict())
    torch.testing.assert_close(expected, reference.forward(state, pictures(), 2), rtol=1e-4, atol=1e-5)
    for kwargs in (dict(drop_path_rate=0.), dict(drop_path_rate=0.9), dict(drop_path_rate=0.3, drop_path_scale='train'),
                   dict(drop_path_mode='subset'), dict(drop_path_mode='sample')):
        other = toy(2, **kwargs).eval()
        other.load_state_dict(state)
        assert torch.equal(other(pictures()), expected)
    timm_sd.depth_gates(model).set_drop_path_rate(0.9)
    assert torch.equal(model(pictures()), expected)
    timm_sd.remove_stochastic_depth(model)
    assert torch.equal(model(pictures()), expected)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


# --- the function stays right, whatever is done to the layers


class LoRA(nn.Module):
    """A low-rank addition to a linear layer that is frozen."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = (nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(4)) / 8)
                              for shape in ((2, base.in_features), (base.out_features, 2)))

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


class LinearLoRA(nn.Linear):
    """Another one, whose weight and bias stay where they were, as loralib has it."""

    def __init__(self, base):
        nn.Module.__init__(self)
        self.__dict__.update(base.__dict__)
        self._parameters = dict(base._parameters)
        self.down, self.up = LoRA(base).down, LoRA(base).up

    def forward(self, x):
        return super().forward(x) + x @ self.down.T @ self.up.T


def fuse(block):
    block.conv2, block.bn2 = fuse_conv_bn_eval(block.conv2, block.bn2), nn.Identity()


def prune_layers(block):
    for layer in (block.bn2, block.conv2):
        prune.l1_unstructured(layer, 'weight', 0.5)


def prune_bias(layer):
    return prune.random_unstructured(layer, 'bias', 0.5)


def weight_norm(block):
    parametrizations.weight_norm(block.bn2)


def activation(block):
    """Another layer, with the parameters of the last but no linear function of them."""
    norm = BatchNormAct2d(block.bn2.num_features, act_layer=nn.SiLU).train(block.training)
    norm.load_state_dict(block.bn2.state_dict())
    block.bn2 = norm


def hook(block):
    block.bn2.register_forward_hook(lambda layer, args, y: y + 0.5)


def attention(block):
    """Something that is not linear, between the last layer and the slot."""
    block.bn2 = nn.Sequential(block.bn2, nn.Sigmoid())


def parts_of(change):
    """Applies a change of a block to all blocks."""
    def change_all(model):
        for block in blocks_of(model):
            change(block)
        return model
    return change_all


CHANGES = dict(
    {change.__name__: parts_of(change) for change in (fuse, prune_layers, weight_norm, activation, hook, attention)},
    sync_batch_norm=nn.SyncBatchNorm.convert_sync_batchnorm, frozen_batch_norm=freeze_batch_norm_2d,
    nothing=lambda model: model)


def assert_right(model, plain, slots, x, survival):
    """The functions of evaluation and training, and the gradients of all but the scaled layers.

    Args:
        model: The network.
        plain: One without the method, with the same layers.
        slots: Blocks of `plain`, and names of their slots.
        x: Images.
        survival: p_l of each block.
    """
    assert_same(model.eval()(x), plain.eval()(x))
    for (block, names), p in zip(slots, survival, strict=True):
        for name in names:
            setattr(block, name, Naive(1 / p))
    force(model, [True] * len(survival))
    ours, theirs = freeze_statistics(model)(x), freeze_statistics(plain)(x)
    assert_same(ours, theirs)
    ours.square().mean().backward()
    theirs.square().mean().backward()
    scaled = ('bn2.weight', 'bn2.bias', 'attn.proj.weight', 'attn.proj.bias', 'mlp.fc2.weight', 'mlp.fc2.bias')
    for (name, param), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        if param.requires_grad and not name.endswith(scaled):
            torch.testing.assert_close(param.grad, other.grad, rtol=1e-3, atol=5e-5, msg=lambda m, n=name: n + m)


@each_scale
@pytest.mark.parametrize('change', CHANGES)
def test_the_function_stays_right_where_layers_are_changed(change, scale):
    model = lively(toy(2, drop_path_scale=scale))
    plain = timm_sd.remove_stochastic_depth(copy.deepcopy(model))
    model, plain = CHANGES[change](model.eval()), CHANGES[change](plain.eval())
    assert_right(model, plain, [(block, ('drop_path',)) for block in blocks_of(plain)], pictures(), SURVIVAL)


@each_scale
@pytest.mark.parametrize('change', [
    LoRA, LinearLoRA, prune_bias, parametrizations.weight_norm, parametrizations.spectral_norm])
def test_the_function_of_a_transformer_stays_right_where_linear_layers_are_changed(change, scale):
    name = 'deit_tiny_patch16_224'
    model = added(name, scale=scale)
    plain = timm_sd.remove_stochastic_depth(copy.deepcopy(model))
    for changed in (model, plain):
        for block in changed.blocks:
            torch.manual_seed(5)  # the start of spectral norm's power iteration, and what is pruned
            block.attn.proj, block.mlp.fc2, block.mlp.fc1 = map(
                change, (block.attn.proj, block.mlp.fc2, block.mlp.fc1))
    assert_right(model, plain, [(block, ('drop_path1', 'drop_path2')) for block in plain.blocks], images(model),
                 reference.survival_probabilities(3, 0.5))


@each_scale
@pytest.mark.parametrize('kind', [ModelEmaV3, AveragedModel])
def test_an_average_is_the_network_of_the_averaged_weights(kind, scale):
    model = lively(toy(2, drop_path_scale=scale)).train()
    averaged = ModelEmaV3(model, decay=0.5) if kind is ModelEmaV3 else AveragedModel(model)
    update = averaged.update if kind is ModelEmaV3 else averaged.update_parameters
    kept = [copy.deepcopy(model.state_dict())]
    train(model, 2, lambda: (update(model), kept.append(copy.deepcopy(model.state_dict()))))
    weights = [0.25, 0.25, 0.5] if kind is ModelEmaV3 else [0., 0.5, 0.5]
    plain = timm_sd.remove_stochastic_depth(copy.deepcopy(averaged.module))
    for name, value in averaged.module.named_parameters():
        expected = sum(weight * state[name] for weight, state in zip(weights, kept, strict=True))
        torch.testing.assert_close(value.detach(), expected, rtol=1e-5, atol=1e-6)
    averaged.module.requires_grad_(), plain.requires_grad_()
    assert_right(averaged.module, plain, [(block, ('drop_path',)) for block in blocks_of(plain)], pictures(), SURVIVAL)
