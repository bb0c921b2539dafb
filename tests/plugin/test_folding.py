"""Scale 'eval', the paper's eq. 5: every state_dict is that of a plain network, whatever was done to the model."""
import copy
import pickle

import pytest
import torch
from timm.layers import freeze_batch_norm_2d
from torch import nn

import timm_sd
from support.kinds import added, images, network
from support.networks import pictures, toy


def lively(model):
    """Gives batch norm weights and biases that aren't those of the start."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model


def test_a_plain_network_of_the_checkpoint_computes_the_same():
    model = lively(toy(drop_path_scale='eval')).eval()
    logits = model(pictures())
    plain = toy(drop_path_rate=0.).eval()
    assert plain.state_dict().keys() == model.state_dict().keys()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(pictures()), logits, rtol=0, atol=1e-5)
    # and back: a plain checkpoint means the same function in a network of any rate and scale
    for kwargs in (dict(drop_path_scale='eval', drop_path_rate=0.3), dict(drop_path_rate=0.9)):
        other = toy(**kwargs).eval()
        other.load_state_dict(plain.state_dict())
        torch.testing.assert_close(other(pictures()), logits, rtol=0, atol=1e-5)
    # neither direction changes the tensors it is given
    assert not torch.equal(model.layer3[0].bn2.weight, plain.layer3[0].bn2.weight)
    torch.testing.assert_close(model.layer3[0].bn2.weight * 0.5, plain.layer3[0].bn2.weight)
    torch.testing.assert_close(model.layer1[0].bn2.bias * (5 / 6), plain.layer1[0].bn2.bias)


@pytest.mark.parametrize('replace', [nn.SyncBatchNorm.convert_sync_batchnorm, freeze_batch_norm_2d])
def test_folding_survives_another_batch_norm(replace):
    model = toy(drop_path_scale='eval')
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model = replace(model)
    for _ in ('as it is', 'loaded again'):
        state = model.state_dict()
        assert all(torch.equal(tensor, plain[name]) for name, tensor in state.items())
        model.load_state_dict(state)


@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_folds_its_own_weights(duplicate):
    model = lively(toy(drop_path_scale='eval'))
    twin = duplicate(model)
    with torch.no_grad():
        twin.layer3[0].bn2.weight.fill_(3.)
    assert twin.state_dict()['layer3.0.bn2.weight'].tolist() == pytest.approx([1.5] * 64)
    torch.testing.assert_close(model.state_dict()['layer3.0.bn2.weight'], model.layer3[0].bn2.weight * 0.5)


def test_averaging_the_parameters_works_with_folding():
    model = toy(drop_path_scale='eval')
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)
    with torch.no_grad():
        model.layer3[0].bn2.weight.fill_(3.)
    average.update_parameters(model)
    assert average.module.layer3[0].bn2.weight.tolist() == pytest.approx([2.] * 64)
    assert average.module.state_dict()['layer3.0.bn2.weight'].tolist() == pytest.approx([1.] * 64)


@pytest.mark.parametrize('name', ['test_vit', 'resnet33ts', 'mobilenetv2_035'])
def test_evaluation_and_checkpoint_stay_where_it_is_added_and_removed(name):
    plain = network(name).eval()
    x, state = images(plain), plain.state_dict()
    model = added(name, 0.5, scale='eval').eval()
    assert any(not torch.equal(ours, theirs)
               for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True))

    def assert_plain(model):
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
        for key, value in model.state_dict().items():
            torch.testing.assert_close(value, state[key], rtol=1e-6, atol=1e-7)

    with torch.no_grad():
        assert_plain(model)
        twin = copy.deepcopy(model)
        for removed in (timm_sd.remove_stochastic_depth(model), timm_sd.remove_stochastic_depth(twin)):
            assert_plain(removed)
            removed.load_state_dict(state)  # nothing unfolds it any more
            assert_plain(removed)
            assert all(torch.equal(ours, theirs)
                       for ours, theirs in zip(removed.parameters(), plain.parameters(), strict=True))
