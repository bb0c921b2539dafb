"""The draws: the paper's rates, their statistics, and what they depend on."""
import math
import random

import pytest
import timm
import torch

import timm_sd
from support.networks import pictures, toy
from timm_sd import DepthGates


def test_rates_are_the_papers():
    rates = timm_sd.drop_path_rates(54, 0.5)
    assert len(rates) == 54
    # survival of the 110 layers: 107/108 in the first block, 3/4 in the middle, 1/2 in the last
    assert [1 - rates[block - 1] for block in (1, 27, 54)] == pytest.approx([107 / 108, 0.75, 0.5])
    assert timm_sd.drop_path_rates(5, 0.5) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert timm_sd.drop_path_rates(4, 0.2) == pytest.approx([0.05, 0.1, 0.15, 0.2])
    assert timm_sd.drop_path_rates(3, 0.2, 'uniform') == [0.2, 0.2, 0.2]
    assert timm_sd.drop_path_rates(2, 0.) == [0., 0.]


def test_expected_depth_of_110_layers_is_the_papers():
    assert DepthGates(54, 0.5).expected_depth == pytest.approx(40.25)  # "approximately 40"
    assert DepthGates(2, 0.5).expected_depth == pytest.approx(1.25)
    assert DepthGates(4, 0.25, 'uniform').expected_depth == pytest.approx(3.)


@pytest.mark.parametrize(('rate', 'schedule', 'word'), [
    (1.0, 'linear', '1.0'), (-0.1, 'linear', '-0.1'), (0.5, 'cubic', 'cubic'), (float('nan'), 'linear', 'nan'),
])
def test_rates_refuse_bad_values(rate, schedule, word):
    with pytest.raises(ValueError, match=word):
        timm_sd.drop_path_rates(3, rate, schedule)


@pytest.mark.parametrize('name', ['drop_path_mode', 'drop_path_scale', 'drop_path_schedule'])
def test_unknown_choices_are_named(name):
    with pytest.raises(ValueError, match=f'{name}.* is .rows.'):
        toy(**{name: 'rows'})
    with pytest.raises(ValueError, match=f'{name}.* is .rows.'):
        DepthGates(3, 0.5, **{name.removeprefix('drop_path_'): 'rows'})


def test_the_scale_is_the_papers_where_it_can_be():
    assert {mode: DepthGates(3, 0.5, mode=mode).scale for mode in timm_sd.MODES} \
        == {'batch': 'eval', 'subset': 'train', 'sample': 'train'}
    assert {mode: timm_sd.depth_gates(toy(drop_path_mode=mode)).scale for mode in timm_sd.MODES} \
        == {'batch': 'eval', 'subset': 'train', 'sample': 'train'}
    for mode in ('subset', 'sample'):
        with pytest.raises(ValueError, match=f'drop_path_scale in mode .{mode}. is .eval.; choose one of train'):
            DepthGates(3, 0.5, mode=mode, scale='eval')


def test_gate_frequencies_within_binomial_bound():
    draws = 4000
    gates = DepthGates(54, 0.5, seed=3)
    opened = torch.tensor([gates.draw() for _ in range(draws)]).double()
    survival = 1 - torch.arange(1, 55).double() / 108
    bound = 4 * (survival * (1 - survival) / draws).sqrt()  # 4 sigma: 54 blocks all pass with probability 0.997
    assert ((opened.mean(0) - survival).abs() < bound).all()
    # independent across blocks: the variance of the depth is the sum of the variances
    depth = opened.sum(1)
    assert depth.mean().item() == pytest.approx(40.25, abs=4 * depth.std().item() / math.sqrt(draws))
    assert depth.var().item() == pytest.approx((survival * (1 - survival)).sum().item(), rel=0.1)
    # and across steps
    now, following = opened[:-1, -1], opened[1:, -1]
    assert torch.corrcoef(torch.stack([now, following]))[0, 1].abs() < 4 / math.sqrt(draws)


def test_a_network_draws_as_often_as_its_rates_say():
    """Gates, rates and blocks belong together: the blocks that run in a network are counted, not the draws."""
    model = toy(drop_path_rate=0.8).train()
    ran = [0, 0, 0]
    for index, block in enumerate((model.layer1[0], model.layer2[0], model.layer3[0])):
        block.conv1.register_forward_hook(lambda *_, index=index: ran.__setitem__(index, ran[index] + 1))
    passes = 600
    with torch.no_grad():
        for _ in range(passes):
            model(pictures(2, 4))
    for count, survival in zip(ran, (11 / 15, 7 / 15, 3 / 15), strict=True):
        assert count / passes == pytest.approx(survival, abs=4 * math.sqrt(survival * (1 - survival) / passes))


def test_gates_depend_on_seed_epoch_and_step_alone():
    def sequence(seed, epoch, n=20):
        gates = DepthGates(10, 0.5, 'uniform', seed=seed)
        gates.set_epoch(epoch)
        return [gates.draw() for _ in range(n)]

    first = sequence(0, 0)
    torch.manual_seed(99)
    random.seed(99)
    assert sequence(0, 0) == first
    assert sequence(1, 0) != first
    assert sequence(0, 1) != first
    gates = DepthGates(10, 0.5, 'uniform')
    for _ in range(7):
        gates.draw()
    resumed = DepthGates(10, 0.9, seed=5)
    resumed.load_state_dict(gates.state_dict())
    assert [resumed.draw() for _ in range(13)] == first[7:]


def test_an_epoch_starts_again_from_its_own_first_step():
    gates = DepthGates(10, 0.5, 'uniform')
    gates.set_epoch(3)
    whole = [gates.draw() for _ in range(6)]
    for _ in range(4):
        gates.draw()
    gates.set_epoch(3)
    assert [gates.draw() for _ in range(6)] == whole


def test_drawing_leaves_the_global_generators_alone():
    model, x = toy().train(), pictures()
    state, pythons_state = torch.get_rng_state(), random.getstate()
    model(x)
    assert timm_sd.depth_gates(model).step == 1
    assert torch.equal(state, torch.get_rng_state())
    assert pythons_state == random.getstate()


def test_subsets_leave_the_global_generators_alone():
    model, x = toy(drop_path_mode='subset').train(), pictures()
    state, pythons_state = torch.get_rng_state(), random.getstate()
    model(x)
    assert torch.equal(state, torch.get_rng_state())
    assert pythons_state == random.getstate()


def test_one_draw_a_forward_pass_by_every_way_in():
    model = toy().train()
    gates = timm_sd.depth_gates(model)
    for way in (model, model.forward_features, model.forward_intermediates):
        before = gates.step
        way(pictures())
        assert gates.step == before + 1
    model.eval()(pictures())
    assert gates.step == 3


def test_one_draw_a_forward_pass_of_timms_feature_wrapper():
    features = timm.create_model('sd_resnet20_cifar', features_only=True).train()
    features(pictures())
    assert timm_sd.depth_gates(features).step == 1


def test_still_one_draw_a_pass_with_the_first_stage_frozen():
    model = toy(2, drop_path_schedule='uniform').train()
    gates = timm_sd.depth_gates(model)
    model.layer1.eval()
    drawn = set()
    for step in range(8):
        model(pictures())
        assert gates.step == step + 1
        drawn.add(tuple(gates.open))
    assert len(drawn) > 1


@pytest.mark.parametrize('kwargs', [dict(drop_path_rate=0.), dict(drop_path_mode='sample')])
def test_at_rate_zero_and_in_mode_sample_the_gates_are_there_and_never_draw(kwargs):
    model = toy(**kwargs).train()
    gates = timm_sd.depth_gates(model)
    gates.set_epoch(3)
    model(pictures())
    assert (gates.epoch, gates.step, gates.open) == (3, 0, [True] * 3)
    assert gates.expected_depth == pytest.approx(3. if 'drop_path_rate' in kwargs else 2.)


def test_a_plain_network_has_no_gates():
    assert timm_sd.depth_gates(timm.create_model('test_resnet')) is None


def test_gates_add_nothing_to_the_state_dict():
    for mode in timm_sd.MODES:
        assert toy(drop_path_mode=mode).state_dict().keys() == toy(drop_path_rate=0.).state_dict().keys()
