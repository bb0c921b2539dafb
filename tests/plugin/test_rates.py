"""The rate of a block stands in one place, may change between any two passes, and is followed by whatever runs."""
import json
import math

import pytest
import torch
from timm.layers import DropPath
from torch import nn
from torchvision.ops import StochasticDepth

import timm_sd
from support.kinds import added, images
from support.kinds import network as plain_network
from support.networks import Naive, blocks_of, force, pictures, toy
from timm_sd.skippable import DropPathSlot

BAD_RATES = pytest.mark.parametrize('rate', [1., 1.5, -0.1, float('nan')])


def network(**kwargs):
    """A network whose batch norm is frozen, in double precision."""
    model = toy(**{'drop_path_schedule': 'uniform', **kwargs}).train().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def x64(n=4):
    return pictures(n).double()


def slots_of(model):
    return [module for module in model.modules() if isinstance(module, DropPath)]


def run_counts(model, passes):
    """How often each block's branch runs."""
    counts = [0] * len(blocks_of(model))
    hooks = [block.conv1.register_forward_hook(lambda *_, index=index: counts.__setitem__(index, counts[index] + 1))
             for index, block in enumerate(blocks_of(model))]
    for _ in range(passes):
        model(x64(1)[:, :, :4, :4])
    for hook in hooks:
        hook.remove()
    return counts


def assert_binomial(counts, rates, passes):
    for count, rate in zip(counts, rates, strict=True):
        assert abs(count - passes * (1 - rate)) <= 4.5 * math.sqrt(passes * rate * (1 - rate))


def with_factors(model, factors):
    """The reference: the plain network with the branch of each block times a number."""
    twin = network(drop_path_rate=0.)
    twin.load_state_dict(model.state_dict())
    for block, factor in zip(blocks_of(twin), factors, strict=True):
        block.drop_path = Naive(factor)
    return twin


# --- the rate changes between two passes


@pytest.mark.parametrize('scale', ['train', 'eval'])
def test_a_new_rate_decides_how_often_blocks_run(scale):
    model = network(drop_path_schedule='linear', drop_path_scale=scale)
    gates = timm_sd.depth_gates(model)
    for rate in (0.5, 0.9, 0., 0.3):
        gates.set_drop_path_rate(rate)
        expected = [rate / 3, rate * 2 / 3, rate]
        assert gates.drop_path_rates == pytest.approx(expected)
        assert gates.expected_depth == pytest.approx(3 - 2 * rate)
        assert_binomial(run_counts(model, 250), expected, 250)


@pytest.mark.parametrize('scale', ['train', 'eval'])
def test_a_new_rate_is_the_scale_of_an_open_block(scale):
    model = network(drop_path_schedule='linear', drop_path_scale=scale)
    force(model, [True, False, True])
    for rate in (0.5, 0.9, 0., 0.3):
        timm_sd.depth_gates(model).set_drop_path_rate(rate)
        twin = with_factors(model, [1 / (1 - rate / 3), 0., 1 / (1 - rate)])
        torch.testing.assert_close(model(x64()), twin(x64()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('scale', ['train', 'eval'])
def test_without_scale_by_keep_an_open_branch_is_added_as_it_is(scale):
    model = network(drop_path_scale=scale)
    force(model, [True, False, True])
    for slot in slots_of(model):
        slot.scale_by_keep = False
    torch.testing.assert_close(model(x64()), with_factors(model, [1., 0., 1.])(x64()), rtol=1e-12, atol=1e-12)


def test_without_scale_by_keep_the_samples_of_a_subset_are_those_of_the_plain_network():
    block = blocks_of(network(drop_path_mode='subset'))[0]
    x = torch.rand(10, 16, 8, 8, dtype=torch.float64)  # not negative, as behind a ReLU, which the others don't pass
    plain, found = block.eval()(x), {}
    for scale_by_keep in (True, False):
        block.train().bn1.eval(), block.bn2.eval()
        block.drop_path.scale_by_keep = scale_by_keep
        rows = block(x).isclose(plain).flatten(1).all(1)
        found[scale_by_keep] = rows.sum().item()
    assert found == {True: 0, False: 5}


def test_a_new_rate_is_the_share_of_samples_of_a_subset():
    model, sizes = network(drop_path_mode='subset'), []
    blocks_of(model)[0].conv1.register_forward_hook(lambda _, args, y: sizes.append(len(y)))
    for rate in (0.5, 0.9, 0., 0.2):
        timm_sd.depth_gates(model).set_drop_path_rate(rate)
        model(x64(10))
    assert sizes == [5, 1, 10, 8]


def test_the_rate_of_a_slot_is_read_and_set_as_timms():
    model = network(drop_path_schedule='linear')
    gates = timm_sd.depth_gates(model)
    assert [slot.drop_prob for slot in slots_of(model)] == list(gates.drop_path_rates)
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.75
    assert gates.drop_path_rates == (0.75,) * 3
    assert_binomial(run_counts(model, 250), [0.75] * 3, 250)
    slots_of(model)[1].drop_prob = 0.
    assert gates.drop_path_rates == (0.75, 0., 0.75)
    assert run_counts(model, 20)[1] == 20


def test_a_rate_set_after_a_pass_that_ended_early_is_followed():
    model = network(drop_path_rate=0.9)
    gates = timm_sd.depth_gates(model)
    model.forward_intermediates(x64(), indices=[0], stop_early=True)
    gates.set_drop_path_rate(0.)
    blocks_of(model)[0].drop_path.eval()  # so the second block asks first
    assert run_counts(model, 1) == [1, 1, 1]
    assert gates.step == 2


def test_an_epoch_set_after_a_pass_that_ended_early_is_followed():
    model = network(drop_path_rate=0.5)
    gates, draws = timm_sd.depth_gates(model), []
    for epoch in range(6):
        model.forward_intermediates(x64(), indices=[0], stop_early=True)
        gates.set_epoch(epoch)
        draws.append(gates.draw()[1:])
        gates.set_epoch(epoch)
        blocks_of(model)[0].drop_path.eval()
        assert run_counts(model, 1)[1:] == draws[-1]
        assert gates.step == 1
        blocks_of(model)[0].drop_path.train()
    assert len(set(map(tuple, draws))) > 1


@BAD_RATES
@pytest.mark.parametrize('active', [False, True])
def test_bad_rates_are_named_and_change_nothing(rate, active):
    model = network(drop_path_rate=0.5 if active else 0.)
    gates = timm_sd.depth_gates(model)
    before = gates.state_dict()
    with pytest.raises(ValueError, match=f'{rate}'):
        gates.set_drop_path_rate(rate)
    with pytest.raises(ValueError, match=f'block 2 is {rate}'):
        slots_of(model)[1].drop_prob = rate
    with pytest.raises(ValueError, match=f'block 3 is {rate}'):
        gates.drop_path_rates = [0.1, 0.2, rate]
    with pytest.raises(ValueError, match='2 drop path rates for 3 blocks'):
        gates.drop_path_rates = [0.1, 0.2]
    assert gates.state_dict() == before


# --- the slot's own training mode decides


def test_slots_in_training_mode_drop_in_a_network_in_evaluation():
    model = toy(drop_path_rate=0.8, drop_path_schedule='uniform').eval()
    statistics = {name: value.clone() for name, value in model.named_buffers()}
    for slot in slots_of(model):
        slot.train()
    outputs = {tuple(model(pictures(1)).flatten().tolist()) for _ in range(30)}
    assert len(outputs) > 1
    assert timm_sd.depth_gates(model).step == 30
    assert all(torch.equal(value, statistics[name]) for name, value in model.named_buffers())


@pytest.mark.parametrize('mode', ['batch', 'subset'])
def test_a_slot_in_evaluation_mode_keeps_its_block_open_at_scale_1(mode):
    model = network(drop_path_rate=0.9, drop_path_mode=mode)
    plain = with_factors(model, [1.] * 3)
    slots = slots_of(model)
    slots[1].eval()
    assert run_counts(model, 20)[1] == 20
    slots[0].eval(), slots[2].eval()
    step = timm_sd.depth_gates(model).step
    torch.testing.assert_close(model(x64()), plain(x64()), rtol=1e-12, atol=1e-12)
    assert timm_sd.depth_gates(model).step == step


# --- other modules in a slot


@pytest.mark.parametrize('kwargs', [
    dict(drop_path_scale='train'), dict(drop_path_scale='eval'), dict(drop_path_mode='subset')])
@pytest.mark.parametrize(('module', 'factor'), [(nn.Identity(), 1.), (Naive(0.25), 0.25)])
def test_another_module_in_a_slot_is_used(module, factor, kwargs):
    model = network(drop_path_rate=0.9, **kwargs)
    for block in blocks_of(model):
        block.drop_path = module
    twin = with_factors(model, [factor] * 3)
    torch.testing.assert_close(model(x64()), twin(x64()), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.eval()(x64()), twin.eval()(x64()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('module', [DropPath(0.5), StochasticDepth(0.5, 'row')])
def test_other_drop_paths_drop_samples(module):
    model = network(drop_path_rate=0.9)
    block = blocks_of(model)[0]
    block.drop_path = module.train()
    x = torch.rand(400, 16, 2, 2, dtype=torch.float64)
    y, twice = block(x), torch.relu(x + 2 * block.branch(x))
    dropped, kept = ((y - other).abs().amax((1, 2, 3)) < 1e-9 for other in (x, twice))
    assert (dropped | kept).all()
    assert 150 < dropped.sum() < 250


@pytest.mark.parametrize('opened', [True, False])
def test_another_module_in_one_of_two_slots_is_used(opened):
    model, twin = added('test_vit', schedule='uniform').double().train(), plain_network('test_vit').double().train()
    force(model, [opened] * 6)
    for block, plain in zip(model.blocks, twin.blocks, strict=True):
        block.drop_path1 = plain.drop_path1 = Naive(0.5)
        plain.drop_path2 = Naive(2. if opened else 0.)
    x, found = images(model).double(), []
    for net in (model, twin):
        y = net(x)
        y.square().sum().backward()
        found.append([y, *(param.grad for param in net.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_another_module_in_one_of_two_slots_is_refused_in_mode_subset():
    model = added('test_vit', mode='subset').train()
    model.blocks[1].drop_path1 = nn.Identity()
    with pytest.raises(RuntimeError, match=r"\Ablock 2 has another module[^\n]*'subset'[^\n]*\Z"):
        model(images(model))


@pytest.mark.parametrize('scale', ['train', 'eval'])
def test_a_slot_called_from_elsewhere_in_training_is_an_error(scale):
    model, x = network(drop_path_scale=scale), x64()
    slot = slots_of(model)[1]
    with pytest.raises(RuntimeError, match=r'\A[^\n]*block 2 [^\n]*\Z'):
        slot(x)
    assert slot.eval()(x) is x
    assert slots_of(network(drop_path_rate=0.))[1](x) is x


# --- rate 0, and mode sample


@pytest.mark.parametrize('kwargs', [dict(drop_path_rate=0.), dict(drop_path_mode='sample')])
def test_one_loop_serves_all(kwargs):
    model = network(**kwargs)
    gates = timm_sd.depth_gates(model)
    gates.set_epoch(1)
    gates.load_state_dict(json.loads(json.dumps(gates.state_dict())))
    assert gates.expected_depth == pytest.approx(sum(1 - rate for rate in gates.drop_path_rates))
    state = torch.get_rng_state()
    assert run_counts(model, 5) == [5] * 3
    assert (gates.epoch, gates.step, gates.open) == (1, 0, [True] * 3)
    if kwargs.get('drop_path_rate') == 0.:
        assert torch.equal(torch.get_rng_state(), state)


def test_a_network_made_at_rate_0_drops_once_its_rate_is_raised():
    model = network(drop_path_rate=0.)
    assert run_counts(model, 20) == [20] * 3
    timm_sd.depth_gates(model).set_drop_path_rate(0.6)
    assert_binomial(run_counts(model, 250), [0.6] * 3, 250)


def test_a_converted_network_of_rate_0_drops_once_its_rate_is_raised():
    model, ran = timm_sd.add_stochastic_depth(plain_network('test_vit'), 0., schedule='uniform').train(), []
    model.blocks[0].attn.register_forward_hook(lambda *_: ran.append(1))
    with torch.no_grad():
        for rate, least, most in ((0., 100, 100), (0.5, 28, 72)):
            timm_sd.depth_gates(model).set_drop_path_rate(rate)
            ran.clear()
            for _ in range(100):
                model(images(model, 1))
            assert least <= len(ran) <= most


def test_a_new_rate_reaches_timms_drop_path():
    model = network(drop_path_mode='sample')
    slot, x = slots_of(model)[0], torch.ones(4000, 1)
    for rate in (0.5, 0.2, 0., 0.9):
        timm_sd.depth_gates(model).set_drop_path_rate(rate)
        y = slot(x)
        dropped = (y == 0).sum().item()
        assert abs(dropped - 4000 * rate) <= 4.5 * math.sqrt(4000 * rate * (1 - rate))
        torch.testing.assert_close(y[y != 0], torch.full((4000 - dropped,), 1 / (1 - rate)))


# --- resuming


def test_a_state_resumes_in_the_middle_of_an_epoch():
    model = network(blocks_per_stage=3)
    gates = timm_sd.depth_gates(model)
    gates.set_epoch(4)
    gates.drop_path_rates = [0.3, 0.6, 0.9] * 3
    run_counts(model, 5)
    state = json.loads(json.dumps(gates.state_dict()))
    resumed = network(drop_path_rate=0., blocks_per_stage=3, drop_path_seed=8)
    timm_sd.depth_gates(resumed).load_state_dict(state)
    assert timm_sd.depth_gates(resumed).state_dict() == gates.state_dict()
    for _ in range(5):
        assert run_counts(resumed, 1) == run_counts(model, 1)


def test_a_state_taken_while_the_rate_is_0_goes_on_counting_passes():
    model = network()
    gates = timm_sd.depth_gates(model)
    gates.set_drop_path_rate(0.)
    resumed = network(drop_path_rate=0.)
    timm_sd.depth_gates(resumed).load_state_dict(gates.state_dict())
    for net in (model, resumed):
        run_counts(net, 3)
        timm_sd.depth_gates(net).set_drop_path_rate(0.5)
    assert timm_sd.depth_gates(resumed).state_dict() == gates.state_dict()
    assert gates.step == 3


def test_a_rate_of_numpy_gives_a_state_that_json_takes():
    gates = timm_sd.depth_gates(network())
    gates.set_drop_path_rate(torch.tensor(0.25).numpy()[()])
    assert json.loads(json.dumps(gates.state_dict()))['drop_path_rates'] == [0.25] * 3


def test_a_state_of_another_depth_is_refused():
    gates, other = timm_sd.depth_gates(network()), timm_sd.depth_gates(network(blocks_per_stage=2))
    other.set_epoch(5)
    before = gates.state_dict()
    with pytest.raises(ValueError, match=r'\A6 drop path rates for 3 blocks\Z'):
        gates.load_state_dict(other.state_dict())
    assert gates.state_dict() == before


def test_a_slot_is_timms_drop_path():
    assert all(isinstance(slot, DropPathSlot) and not list(slot.state_dict()) for slot in slots_of(network()))
