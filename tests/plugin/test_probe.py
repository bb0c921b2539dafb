"""Which blocks of timm's networks can be closed, and what is left as it was when they are looked for."""
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
    torch.manual_seed(0)
    model = own(*(Layers(lambda self, x: x.mul_(2.) * 0.5 + self.one(x), one=conv()) for _ in range(2)))
    found, _ = residual_blocks(model, example_input=PICTURE)
    assert len(found) < 2 or not found[0].chained


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
    with pytest.raises(RuntimeError, match='out of memory'):
        residual_blocks(model, 'eval')
    hook.remove()
    assert [(type(module), module.training, list(module._modules)) for module in model.modules()] == before
    assert {key: (value.data_ptr(), value.dtype) for key, value in model.state_dict().items()} == pointers
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize('example', [
    torch.zeros(1, 3, 96, 64), (torch.zeros(1, 3, 64, 64),), dict(x=torch.zeros(2, 3, 64, 64))])
def test_what_the_network_is_called_with_may_be_given(example):
    found, _ = residual_blocks(network(), example_input=example)
    assert len(found) == 4


def test_a_network_in_float64():
    assert len(residual_blocks(network('test_vit').double(), 'eval').closable) == 6
