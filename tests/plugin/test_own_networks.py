"""Stochastic depth on networks of torchvision, transformers and one's own, against rules that are written out here."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import nn
from torchvision.models import convnext, efficientnet, resnet, swin_transformer, vision_transformer

import timm_sd
from support.gated import skippable
from support.networks import force, freeze_statistics, lively

RATE = 0.5


# --- networks of one's own

class OwnResNet(nn.Module):
    """As in many repositories: the ReLUs are functions, and the shortcut is an empty Sequential."""

    class Block(nn.Module):
        def __init__(self, channels, out, stride=1):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
            self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
            self.shortcut = nn.Sequential()
            if stride != 1:
                self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

        def forward(self, x):
            y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
            y += self.shortcut(x)
            return F.relu(y)

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.Sequential(self.Block(8, 8), self.Block(8, 16, 2), self.Block(16, 16))
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        return self.fc(self.layers(F.relu(self.conv(x))).mean((2, 3)))


class OwnTransformer(nn.Module):
    """Of timm's blocks."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 24, 8, 8)
        self.blocks = nn.Sequential(*(Block(24, 3) for _ in range(3)))

    def forward(self, x):
        return self.blocks(self.embed(x).flatten(2).mT).mean(1)


class OwnPreActivation(nn.Module):
    """Blocks that write into their input before they use it."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            return F.relu_(x) + self.conv(F.relu_(self.norm(x)))

    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(*(self.Block() for _ in range(3)))

    def forward(self, x):
        return self.blocks(self.stem(x)).mean((2, 3))


class OwnSizes(nn.Module):
    """Blocks that take and return the size of the feature map too, as MViT's, and those of transformers None."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x, scale, size):
            y = self.conv(F.relu(self.norm(x))).flatten(2).unflatten(2, size)
            return x + y, None, list(size)

    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 8, 3, padding=1), nn.ModuleList(self.Block() for _ in range(3))

    def forward(self, x):
        x, size = self.stem(x), x.shape[2:]
        for block in self.blocks:
            x, nothing, size = block(x, 1., size)
            assert nothing is None
        return x.mean((2, 3))


class OwnChildren(nn.Module):
    """Blocks that go over their children, and whose branch is scaled by a parameter beside layers."""

    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.gamma, self.conv = nn.Parameter(torch.full((8, 1, 1), 0.7)), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            return self.gamma * torch.tanh(self.conv(x))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.branch = nn.BatchNorm2d(8), OwnChildren.Branch()

        def forward(self, x):
            y = x
            for child in self.children():
                y = child(y)
            return x + y

    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(*(self.Block() for _ in range(3)))

    def forward(self, x):
        return self.blocks(self.stem(x)).mean((2, 3))


class OwnNested(nn.Module):
    """Blocks of two branches whose layers are in one module."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
            self.first, self.second = nn.Identity(), nn.Identity()

        def forward(self, x):
            x = x + self.first(self.layers[1](F.gelu(self.layers[0](x))))
            return x + self.second(self.layers[3](F.gelu(self.layers[2](x))))

    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Linear(3, 8), nn.Sequential(*(self.Block() for _ in range(3)))

    def forward(self, x):
        return self.blocks(self.stem(x.flatten(2).mT)).mean(1)


# --- the rule, as a forward of each class of block, whose branches are multiplied by self.gate

def own_resnet_rule(self, x):
    branch = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
    return F.relu(self.shortcut(x) + self.gate * branch)


def own_pre_activation_rule(self, x):
    x = F.relu(x)
    return x + self.gate * self.conv(F.relu(self.norm(x)))


def own_children_rule(self, x):
    return x + self.gate * self.branch(self.norm(x))


def own_nested_rule(self, x):
    x = x + self.gate * self.layers[1](F.gelu(self.layers[0](x)))
    return x + self.gate * self.layers[3](F.gelu(self.layers[2](x)))


def own_sizes_rule(self, x, scale, size):
    return x + self.gate * self.conv(F.relu(self.norm(x))), None, list(size)


def timm_vit_rule(self, x):
    x = x + self.gate * self.attn(self.norm1(x))
    return x + self.gate * self.mlp(self.norm2(x))


def torchvision_resnet_rule(self, x):
    branch = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
    return F.relu((x if self.downsample is None else self.downsample(x)) + self.gate * branch)


def torchvision_vit_rule(self, input):
    y = self.ln_1(input)
    x = input + self.gate * self.self_attention(y, y, y, need_weights=False)[0]
    return x + self.gate * self.mlp(self.ln_2(x))


def torchvision_convnext_rule(self, input):
    return input + self.gate * self.layer_scale * self.block(input)


def torchvision_swin_rule(self, x):
    x = x + self.gate * self.attn(self.norm1(x))
    return x + self.gate * self.mlp(self.norm2(x))


def torchvision_efficientnet_rule(self, input):
    return input + self.gate * self.block(input) if self.use_res_connect else self.block(input)


def transformers_vit_rule(self, x, *args, **kwargs):
    x = x + self.gate * self.attention(self.layernorm_before(x), *args, **kwargs)[0]
    return x + self.gate * self.mlp(self.layernorm_after(x))


def transformers_dinov2_rule(self, x, *args, **kwargs):
    x = x + self.gate * self.layer_scale1(self.attention(self.norm1(x), *args, **kwargs)[0])
    return x + self.gate * self.layer_scale2(self.mlp(self.norm2(x)))


def transformers_swin_rule(self, x, *args, **kwargs):
    """transformers' own, with both branches multiplied: they go through nothing but `dropout`."""
    self.dropout.forward = lambda branch: self.gate * branch
    self.drop_path = nn.Identity()  # it had a rate
    return type(self).forward(self, x, *args, **kwargs)


SMALL = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=48, image_size=32,
             patch_size=8)


def of_transformers(kind, **config):
    transformers = pytest.importorskip('transformers', reason='not among the oldest releases')
    return getattr(transformers, f'{kind}Model')(getattr(transformers, f'{kind}Config')(**config))


# a network, its images, the class of its blocks, their rule, and how many there are
NETWORKS = {
    'own resnet': (OwnResNet, 16, OwnResNet.Block, own_resnet_rule, 3),
    'own transformer': (OwnTransformer, 32, Block, timm_vit_rule, 3),
    'own pre-activation': (OwnPreActivation, 16, OwnPreActivation.Block, own_pre_activation_rule, 3),
    'own children': (OwnChildren, 16, OwnChildren.Block, own_children_rule, 3),
    'own nested': (OwnNested, 16, OwnNested.Block, own_nested_rule, 3),
    'own sizes': (OwnSizes, 16, OwnSizes.Block, own_sizes_rule, 3),
    'torchvision resnet18': (resnet.resnet18, 64, resnet.BasicBlock, torchvision_resnet_rule, 8),
    'torchvision vit': (lambda: vision_transformer.VisionTransformer(32, 8, 3, 3, 24, 48),
                        32, vision_transformer.EncoderBlock, torchvision_vit_rule, 3),
    'torchvision convnext': (lambda: convnext.ConvNeXt([convnext.CNBlockConfig(16, 24, 2),
                                                        convnext.CNBlockConfig(24, None, 2)], num_classes=4),
                             32, convnext.CNBlock, torchvision_convnext_rule, 4),
    'torchvision swin': (lambda: swin_transformer.SwinTransformer(
        [4, 4], 24, [2, 2], [2, 2], [4, 4], num_classes=4, stochastic_depth_prob=0.1),
        64, swin_transformer.SwinTransformerBlock, torchvision_swin_rule, 4),
    'torchvision efficientnet': (efficientnet.efficientnet_b0, 64, efficientnet.MBConv, torchvision_efficientnet_rule,
                                 9),
    'transformers vit': (lambda: of_transformers('ViT', **SMALL), 32, 'ViTLayer', transformers_vit_rule, 3),
    'transformers dinov2': (lambda: of_transformers('Dinov2', **SMALL), 32, 'Dinov2Layer', transformers_dinov2_rule, 3),
    'transformers swin': (lambda: of_transformers(
        'Swin', image_size=32, patch_size=2, embed_dim=12, depths=[2, 2], num_heads=[2, 2], window_size=4),
        32, 'SwinLayer', transformers_swin_rule, 4),
}
each_network = pytest.mark.parametrize('name', NETWORKS)


def pictures(size, n=2):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def plain_network(name):
    """Its branches don't start at zero, which would prove nothing."""
    torch.manual_seed(0)
    model = lively(NETWORKS[name][0]())
    for module_name, param in model.named_parameters():
        if 'layer_scale' in module_name or 'lambda1' in module_name:
            nn.init.uniform_(param, 0.5, 1.)
    return model.eval()


def added(name, **kwargs):
    return timm_sd.add_stochastic_depth(plain_network(name), RATE, 'uniform',
                                        example_input=torch.zeros(1, 3, *[NETWORKS[name][1]] * 2), **kwargs)


def blocks(name, model):
    wanted = NETWORKS[name][2]
    return [module for module in model.modules()
            if (type(module).__name__ == wanted if isinstance(wanted, str) else type(module) is wanted)
            and getattr(module, 'use_res_connect', True)]


def by_rule(name, gates):
    """The plain network, whose blocks' branches are multiplied by 0 or by 1 / p."""
    model = plain_network(name)
    for block, is_open in zip(blocks(name, model), gates, strict=True):
        block.gate = is_open / (1. - RATE)
        block.forward = NETWORKS[name][3].__get__(block)
    return model


def features(output):
    return output if isinstance(output, torch.Tensor) else output.last_hidden_state


def without_dropout(model):
    for module in freeze_statistics(model).modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.
    return model


@each_network
def test_evaluation_and_keys_stay_and_the_method_can_be_taken_away(name):
    plain, model, x = plain_network(name), added(name), pictures(NETWORKS[name][1])
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert len(timm_sd.depth_gates(model).open) == NETWORKS[name][4] == len(blocks(name, plain))
    with torch.no_grad():
        assert torch.equal(features(model.eval()(x)), features(plain(x)))
        timm_sd.remove_stochastic_depth(model)
        assert torch.equal(features(model(x)), features(plain(x)))
    assert {key: type(module) for key, module in model.named_modules() if 'stochastic_depth' not in key
            and 'drop_path' not in key} == {key: type(module) for key, module in plain.named_modules()
                                            if 'stochastic_depth' not in key and 'drop_path' not in key}


@each_network
@pytest.mark.parametrize('scale', ['train', 'eval'])
def test_outputs_and_gradients_are_those_of_the_rule(name, scale):
    depth, x = NETWORKS[name][4], pictures(NETWORKS[name][1])
    for pattern in ([index % 2 == 0 for index in range(depth)], [False] * depth, [True] * depth):
        model = without_dropout(added(name, scale=scale))
        force(model, pattern)
        reference = without_dropout(by_rule(name, pattern))
        ours, theirs = features(model(x)), features(reference(x))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        ours.square().mean().backward()
        theirs.square().mean().backward()
        last = {id(getattr(block.get_submodule('.'.join(path)), key)) for block in skippable(model)
                for _, path, keys, _ in block.last_affine for key in keys}
        assert bool(last) == (scale == 'eval')
        for (key, param), other in zip(model.named_parameters(), reference.parameters(), strict=True):
            if other.grad is not None:
                factor = (1. - RATE) ** 2 if id(param) in last else 1.
                torch.testing.assert_close(param.grad, factor * other.grad, rtol=1e-3, atol=1e-5, msg=key)


@each_network
def test_a_closed_block_runs_nothing_of_its_branch(name):
    model = added(name).train()
    force(model, [False] * NETWORKS[name][4])
    ran = []
    for block in skippable(model):
        for end in block.branch_ends or ('attn', 'block', 'mlp'):
            if isinstance(getattr(block, end, None), nn.Module):
                getattr(block, end).register_forward_hook(lambda *_, end=end: ran.append(end))
    model(pictures(NETWORKS[name][1]))
    assert not ran


@each_network
def test_mode_subset_runs_the_branch_on_half_of_the_samples(name):
    depth, x = NETWORKS[name][4], pictures(NETWORKS[name][1], 4)
    model = without_dropout(added(name, mode='subset'))
    seen = []
    skippable(model)[0].register_forward_hook(lambda block, args, output: seen.append((args[0], output)))
    reference = by_rule(name, [True] * depth)
    features(model(x)).sum().backward()
    (given, output), = seen
    output = output[0] if isinstance(output, tuple) else output
    block = blocks(name, reference)[0]
    more = {'transformers swin': [(16, 16)], 'own sizes': [1., (16, 16)]}.get(name, [])
    open_ = block(given, *more)
    block.gate = 0.
    closed = block(given, *more)
    open_, closed = (y[0] if isinstance(y, tuple) else y for y in (open_, closed))
    found = [min((name, (output[i] - y[i]).abs().max().item()) for name, y in (('open', open_), ('closed', closed))
                 if torch.allclose(output[i], y[i], rtol=1e-3, atol=1e-4))[0] for i in range(4)]
    assert sorted(found) == ['closed', 'closed', 'open', 'open']


@each_network
def test_other_sizes_of_images(name):
    if name in ('torchvision vit', 'transformers vit'):
        pytest.skip('it takes one size')
    depth, x = NETWORKS[name][4], pictures(2 * NETWORKS[name][1])
    gates = [index % 2 == 0 for index in range(depth)]
    model = without_dropout(added(name))
    force(model, gates)
    torch.testing.assert_close(features(model(x)), features(without_dropout(by_rule(name, gates))(x)), rtol=1e-4,
                               atol=1e-5)


def test_mode_sample_needs_slots():
    with pytest.raises(ValueError, match="'sample' needs a drop_path slot in each block, which OwnResNet lacks"):
        added('own resnet', mode='sample')
    assert timm_sd.depth_gates(added('torchvision convnext', mode='sample')).mode == 'sample'


WITHOUT_SLOTS = pytest.mark.parametrize('name', ['own resnet', 'own sizes', 'torchvision vit', 'transformers vit'])


@WITHOUT_SLOTS
@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_draw_on_their_own(name, duplicate):
    model, x = without_dropout(added(name)), pictures(NETWORKS[name][1])
    twin = without_dropout(duplicate(model))
    assert timm_sd.depth_gates(twin) is not timm_sd.depth_gates(model)
    for _ in range(4):
        torch.testing.assert_close(features(twin(x)), features(model(x)))
    timm_sd.remove_stochastic_depth(twin)
    assert {type(module) for module in twin.modules()} == {type(module) for module in plain_network(name).modules()}


@WITHOUT_SLOTS
def test_blocks_are_compiled_around_their_gates(name):
    depth, x = NETWORKS[name][4], pictures(NETWORKS[name][1])
    model, eager = without_dropout(added(name)), without_dropout(added(name))
    timm_sd.compile_blocks(model, backend='aot_eager')
    torch._dynamo.reset()
    for pattern in ([True] * depth, [False] * depth, [index % 2 == 0 for index in range(depth)]):
        for training in (True, False):  # the graph of an open block is not that of evaluation
            for network in (model, eager):
                force(network, pattern)
                without_dropout(network) if training else network.eval()
            torch.testing.assert_close(features(model(x)), features(eager(x)))
    torch._dynamo.reset()


@pytest.mark.parametrize('reentrant', [False, True])
def test_transformers_own_checkpointing_has_the_gates_of_its_pass(reentrant):
    def gradients(checkpointing):
        model = without_dropout(added('transformers vit'))
        if checkpointing:
            model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
        x = pictures(32)
        loss = sum((features(model(x + n)) * pictures(32)[0, 0, 0, :24]).sum() for n in range(3))
        loss.backward()
        return {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    with_, without = gradients(True), gradients(False)
    assert with_.keys() == without.keys()
    for name, grad in with_.items():
        torch.testing.assert_close(grad, without[name], rtol=1e-4, atol=1e-5)
