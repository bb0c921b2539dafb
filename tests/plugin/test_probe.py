"""Which blocks of timm's networks can be closed, and what is left as it was when they are looked for."""
import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import timm_sd
from support.kinds import KINDS, each_kind, network, residuals
from support.networks import toy
from timm_sd.probe import residual_blocks


@each_kind
def test_number_of_blocks(name):
    found, stay_open = residual_blocks(network(name))
    assert (len(found), len(stay_open)) == KINDS[name][1:]


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'closable', 'stay_open'), [
    ('resnet33ts', 10, 0), ('nf_regnet_b0', 13, 3), ('davit_tiny', 12, 0), ('xcit_nano_12_p16_224', 12, 2),
    ('poolformer_s12', 12, 0), ('caformer_s18', 18, 0), ('coatnet_pico_rw_224', 12, 0), ('fastvit_t8', 10, 0),
])
def test_number_of_blocks_of_networks_of_full_size(name, closable, stay_open):
    found, opens = residual_blocks(timm.create_model(name))
    assert (len(found), len(opens)) == (closable, stay_open)


def test_the_kinds_have_every_sort_of_shortcut():
    """What is beside the branch, as timm names it: a kind that changes its names needs another one in its place."""
    paths = {name: {found.shortcut_path for found in residuals(network(name)).values()} for name in KINDS}
    assert paths['test_vit'] == paths['mobilenetv2_035'] == {()}
    assert paths['test_resnet'] == {('act2',), ('downsample', 'act2'), ('downsample', 'act3')}
    assert paths['resnet33ts'] == {('act',), ('shortcut', 'act')}
    assert paths['davit_tiny'] == {('cpe1', 'cpe2')}
    assert paths['caformer_s18'] == {(), ('res_scale1', 'res_scale2')}
    assert paths['fastvit_t8'] == {('token_mixer',)}
    assert paths['coatnet_pico_rw_224'] == {(), ('shortcut',)}


@pytest.mark.parametrize('name', ['test_resnet', 'nf_regnet_b0'])
@pytest.mark.parametrize('training', [False, True])
def test_looking_changes_nothing(name, training):
    model = network(name).train(training)
    model.get_submodule('stem' if name == 'nf_regnet_b0' else 'bn1').train(not training)
    before = [(type(module), module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
              for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    residual_blocks(model)
    assert [(type(module), module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
            for module in model.modules()] == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)


def test_an_untrained_network_may_be_very_deep():
    model = toy(110, drop_path_rate=0.)
    model.pretrained_cfg = dict(input_size=(3, 8, 8))
    residuals_, stay_open = residual_blocks(model)
    assert (len(residuals_), stay_open) == (330, [])


# --- what is no residual block, and what can't be tried


class Layers(nn.Module):
    """What a test makes of a few layers, applied to pictures."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.rule = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.rule(self, x)


def conv(channels=4):
    return nn.Conv2d(channels, channels, 3, padding=1)


def own(*blocks):
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *blocks)


PICTURE = torch.zeros(1, 3, 8, 8)


@pytest.mark.parametrize('block', [
    lambda: Layers(lambda self, x: self.one(x) + self.two(x), one=conv(), two=conv()),  # side by side
    lambda: Layers(lambda self, x: x + F.gelu(self.one(x)), one=conv()),  # not proportional to what the layer returns
    lambda: Layers(lambda self, x: self.act(self.one(x)), one=conv(), act=nn.ReLU()),
    lambda: Layers(lambda self, x: x * self.gate(self.one(x)), one=conv(), gate=nn.Sigmoid()),
    lambda: Layers(lambda self, x: torch.cat([x, self.one(x)], 1)[:, 2:6], one=conv()),
])
def test_what_is_no_residual_block(block):
    torch.manual_seed(0)
    assert residual_blocks(own(block(), block()), example_input=PICTURE) == ([], [])


@pytest.mark.parametrize('value', [0., 1e-9])
def test_dying_features_make_nothing_a_residual_block(value):
    """Zero is near to all that is small."""
    torch.manual_seed(0)
    model = own(*(Layers(lambda self, x: self.act(self.one(x)), one=conv(), act=nn.ReLU()) for _ in range(3)))
    nn.init.constant_(model[0].weight, value)
    nn.init.zeros_(model[0].bias)
    assert residual_blocks(model, example_input=PICTURE) == ([], [])


def test_a_projection_counts_beside_blocks_of_its_class_that_have_none():
    torch.manual_seed(0)

    class Block(Layers):
        pass

    def block(projects):
        def rule(self, x):
            return F.relu(self.shortcut(x) + self.last(F.relu(self.one(x))))
        return Block(rule, one=conv(), last=conv(), shortcut=conv() if projects else nn.Identity())
    found, _ = residual_blocks(own(block(False), block(True)), example_input=PICTURE)
    assert [(residual.branch_ends, residual.relu_behind) for residual in found] == [(('last',), True)] * 2
    assert residual_blocks(own(block(True), block(True)), example_input=PICTURE) == ([], [])


def test_a_block_that_writes_into_its_input_gets_one_of_its_own():
    def found(rule):
        torch.manual_seed(0)
        model = own(*(Layers(rule, one=conv(), act=nn.ReLU()) for _ in range(3)))
        return residual_blocks(model, example_input=PICTURE).closable
    assert [block.chained for block in found(lambda self, x: self.act(x) + self.one(x))] == [True, True, False]
    assert [block.chained for block in found(lambda self, x: F.relu_(x) + self.one(x))] == [False] * 3


def test_features_that_are_all_zero_are_not_taken_for_those_behind_a_relu():
    """They may become negative when the stem has learned."""
    model = own(*(Layers(lambda self, x: self.act(x + self.one(x)), one=conv(), act=nn.ReLU()) for _ in range(2)))
    nn.init.constant_(model[0].weight, 0.)
    nn.init.constant_(model[0].bias, 0.)
    found, _ = residual_blocks(model, example_input=PICTURE)
    assert [block.nonnegative for block in found] == [False, True]


def test_a_block_that_returns_more_than_features_stays_open():
    torch.manual_seed(0)
    inner = [Layers(lambda self, x: (x + self.one(x), x.mean()), one=conv()) for _ in range(2)]
    model = Layers(lambda self, x: self.two(self.one(self.stem(x))[0])[0], stem=nn.Conv2d(3, 4, 1), one=inner[0],
                   two=inner[1])
    assert residual_blocks(model, example_input=PICTURE) == ([], [])


@pytest.mark.parametrize(('make', 'kwargs', 'words'), [
    (lambda: own(conv()), {}, "Sequential is none of timm's networks.*example_input"),
    (lambda: nn.Sequential(nn.ReLU()), dict(example_input=PICTURE), 'Sequential has no parameters'),
    (lambda: timm.create_model('resnet18', device='meta'), {}, 'ResNet is on the meta device'),
])
def test_what_can_not_be_tried_is_one_line(make, kwargs, words):
    with pytest.raises(ValueError, match=words) as error:
        timm_sd.add_stochastic_depth(make(), 0.5, **kwargs)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('when', [1, 2, 6])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_network_that_fails_while_it_is_tried_is_as_it_was(when, dtype):
    model = network().to(dtype).train()
    model.layer2.eval()
    calls = []

    def fail(*_):
        calls.append(None)
        if len(calls) == when:
            raise RuntimeError('out of memory')
    hook = model.layer3[0].bn2.register_forward_hook(fail)
    before = [(type(module), module.training, list(module._modules)) for module in model.modules()]
    pointers = {key: (value.data_ptr(), value.dtype) for key, value in model.state_dict().items()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match='ResNet can not be run with what example_input describes: out of memory'):
        residual_blocks(model, 'eval')
    hook.remove()
    assert [(type(module), module.training, list(module._modules)) for module in model.modules()] == before
    assert {key: (value.data_ptr(), value.dtype) for key, value in model.state_dict().items()} == pointers
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize('example', [
    torch.zeros(1, 3, 16, 16),  # batch norm is given one pixel in the end
    torch.zeros(1, 3, 96, 64), (torch.zeros(1, 3, 64, 64),), dict(x=torch.zeros(2, 3, 64, 64))])
def test_what_the_network_is_called_with_may_be_given(example):
    found, _ = residual_blocks(network(), example_input=example)
    assert len(found) == 4


def test_a_network_in_float64():
    assert len(residual_blocks(network('test_vit').double(), 'eval').closable) == 6


# --- what shows elsewhere than where the network starts


def closed_output(model, x):
    """What the network returns in training, with all blocks closed; None if no block can be."""
    if not residual_blocks(model, example_input=x).closable:
        return None
    timm_sd.add_stochastic_depth(model, 0.5, example_input=x)
    gates = timm_sd.depth_gates(model)
    gates.draw = lambda: setattr(gates, 'open', [False] * len(gates.open))
    return model.train()(x)


@pytest.mark.parametrize(('rule', 'layers', 'closed'), [
    (lambda self, x: self.drop(x + self.one(x)), dict(drop=nn.Dropout(0.5)), None),
    (lambda self, x: F.dropout(x, 0.5, self.training) + self.one(x), {}, None),
    (lambda self, x: (x + 0.5 if self.training else x) + self.one(x), {}, None),
    (lambda self, x: F.relu6(x + self.one(x)), {}, None),
    (lambda self, x: (x + self.one(x)).clamp(-10., 10.), {}, None),
    (lambda self, x: self.act(x + self.one(x)), dict(act=nn.ReLU6()), lambda block, x: F.relu6(x)),
    (lambda self, x: self.norm(x + self.one(x)), dict(norm=nn.BatchNorm2d(4, affine=False)),
     lambda block, x: F.batch_norm(x, None, None, training=True)),
    (lambda self, x: x + self.one(torch.ones_like(x)), {}, None),  # a position encoding
])
def test_a_closed_block_is_right_in_training_too(rule, layers, closed):
    torch.manual_seed(0)
    model = own(*(Layers(rule, one=conv(), **layers) for _ in range(2)))
    x = 20. * torch.randn(4, 3, 8, 8)
    found = closed_output(copy.deepcopy(model), x)
    if closed is None:
        assert found is None
    else:
        expected = model[0](x)
        for block in model[1:]:
            expected = closed(block, expected)
        torch.testing.assert_close(found, expected)


def test_an_argument_that_is_zero_at_first_counts():
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.pos = nn.Parameter(torch.zeros(1, 4, 1, 1))
            self.blocks = nn.ModuleList(Layers(None, one=conv()) for _ in range(2))
            self.stem = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            x = self.stem(x)
            for block in self.blocks:
                x = block(x, self.pos)
            return x
    model = Model()
    for block in model.blocks:
        block.forward = (lambda self, x, pos: (x + pos) + self.one(x)).__get__(block)
    assert residual_blocks(model, example_input=PICTURE) == ([], [])


def test_something_in_place_between_two_blocks():
    torch.manual_seed(0)
    blocks = [Layers(lambda self, x: x + self.one(x), one=conv()) for _ in range(2)]
    model = own(blocks[0], nn.ReLU(inplace=True), blocks[1], nn.ReLU(inplace=True))
    x = torch.randn(2, 3, 8, 8)
    expected = F.relu(F.relu(model[0](x)))
    closed = closed_output(model, x)
    torch.testing.assert_close(closed, expected)
    closed.sum().backward()


def test_what_train_and_eval_of_a_module_do_is_not_done():
    """Such as LoRA's merge."""
    class Merging(nn.Conv2d):
        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)
    torch.manual_seed(0)
    model = own(Layers(lambda self, x: x + self.one(x), one=Merging(4, 4, 1))).train()
    assert len(residual_blocks(model, example_input=PICTURE).closable) == 1
    assert not model[1].one.merged


def test_buffers_that_a_forward_moves_are_as_they_were():
    torch.manual_seed(0)

    def rule(self, x):
        self.count += 1
        return x + self.norm(self.one(x))
    block = Layers(rule, one=conv(), norm=nn.BatchNorm2d(4))
    block.register_buffer('count', torch.zeros(()))
    model = own(block)
    state = copy.deepcopy(model.state_dict())
    generator = torch.get_rng_state()
    assert len(residual_blocks(model, 'eval', PICTURE).closable) == 1
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize('example', [
    torch.zeros(1, 4, 8, 8), torch.zeros(3), 'x', dict(y=PICTURE), (PICTURE, PICTURE), (), torch.zeros(0, 3, 8, 8)])
def test_a_wrong_example_is_one_line(example):
    model = own(Layers(lambda self, x: x + self.one(x), one=conv()))
    with pytest.raises(ValueError, match='Sequential can not be run with what example_input describes') as error:
        timm_sd.add_stochastic_depth(model, 0.5, example_input=example)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', ['chained', 'relu_behind', 'depth_gate'])
def test_attributes_of_these_names_are_refused(name):
    model = own(Layers(lambda self, x: x + self.one(x), one=conv(), **{name: nn.Identity()}))
    with pytest.raises(ValueError, match=f"1 has an attribute '{name}' of its own"):
        timm_sd.add_stochastic_depth(model, 0.5, example_input=PICTURE)
