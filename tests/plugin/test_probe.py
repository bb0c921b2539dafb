"""Which blocks of timm's networks can be closed, and what is left as it was when they are looked for."""
import pytest
import timm
import torch

from support.kinds import KINDS, each_kind, network, residuals
from support.networks import toy
from timm_sd.probe import residual_blocks


@each_kind
def test_number_of_blocks(name):
    found, stay_open = residual_blocks(network(name))
    assert (len(found), len(stay_open)) == KINDS[name][1:]


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'closable', 'stay_open'), [
    ('resnet33ts', 10, 0), ('nf_regnet_b0', 12, 4), ('davit_tiny', 12, 0), ('xcit_nano_12_p16_224', 12, 2),
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
