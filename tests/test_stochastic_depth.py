"""The method: statistics of the gates, what a closed block costs and moves, eq. 5, checkpoints."""
import copy
import math
import pickle
import random
from collections import Counter

import pytest
import timm
import torch
from timm.layers import freeze_batch_norm_2d
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import timm_sd
from timm_sd.gates import DepthGates
from timm_sd.stochastic_depth import DepthGate, Residual, closed_block, gate_blocks


def network(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('sd_resnet20_cifar', **kwargs)


def images(n=4):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def force(model, gates):
    """Makes every draw of `model` these gates."""
    depth_gates = timm_sd.depth_gates(model)
    depth_gates.draw = lambda: setattr(depth_gates, 'open', list(gates))


class CountOps(TorchDispatchMode):
    """Counts the operators that really run, forward and backward."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_rates_are_the_papers():
    assert timm_sd.drop_path_rates(54, 0.5) == pytest.approx([0.5 * block / 54 for block in range(1, 55)])
    assert timm_sd.drop_path_rates(3, 0.2, 'uniform') == [0.2, 0.2, 0.2]
    assert DepthGates(timm_sd.drop_path_rates(54, 0.5)).expected_depth == pytest.approx((3 * 54 - 1) / 4)


@pytest.mark.parametrize(('rate', 'schedule', 'word'), [
    (1.0, 'linear', '1.0'), (-0.1, 'linear', '-0.1'), (0.5, 'cubic', 'cubic'), (float('nan'), 'linear', 'nan'),
])
def test_rates_refuse_bad_values(rate, schedule, word):
    with pytest.raises(ValueError, match=word):
        timm_sd.drop_path_rates(3, rate, schedule)


@pytest.mark.parametrize('name', ['drop_path_mode', 'drop_path_scale', 'drop_path_schedule'])
def test_unknown_choices_are_named(name):
    with pytest.raises(ValueError, match=f'{name} is .rows.'):
        network(**{name: 'rows'})


def test_gate_frequencies_within_binomial_bound():
    draws = 4000
    gates = DepthGates(timm_sd.drop_path_rates(54, 0.5), seed=3)
    opened = torch.tensor([gates.draw() for _ in range(draws)]).double()
    survival = 1 - torch.tensor(gates.drop_path_rates).double()
    bound = 4 * (survival * (1 - survival) / draws).sqrt()  # 4 sigma: 54 blocks all pass with probability 0.997
    assert ((opened.mean(0) - survival).abs() < bound).all()
    # independent across blocks: the variance of the depth is the sum of the variances
    depth = opened.sum(1)
    assert depth.mean().item() == pytest.approx(gates.expected_depth, abs=4 * depth.std().item() / math.sqrt(draws))
    assert depth.var().item() == pytest.approx((survival * (1 - survival)).sum().item(), rel=0.1)
    # and across steps
    now, following = opened[:-1, -1], opened[1:, -1]
    assert torch.corrcoef(torch.stack([now, following]))[0, 1].abs() < 4 / math.sqrt(draws)


def test_gates_depend_on_seed_epoch_and_step_alone():
    def sequence(seed, epoch, n=20):
        gates = DepthGates([0.5] * 10, seed)
        gates.set_epoch(epoch)
        return [gates.draw() for _ in range(n)]

    first = sequence(0, 0)
    torch.manual_seed(99)
    assert sequence(0, 0) == first
    assert sequence(1, 0) != first
    assert sequence(0, 1) != first
    gates = DepthGates([0.5] * 10, 0)
    for _ in range(7):
        gates.draw()
    resumed = DepthGates([0.5] * 10, 5)
    resumed.load_state_dict(gates.state_dict())
    assert [resumed.draw() for _ in range(13)] == first[7:]


def test_drawing_leaves_the_global_generators_alone():
    model, x = network().train(), images()
    state, pythons_state = torch.get_rng_state(), random.getstate()
    model(x)
    assert torch.equal(state, torch.get_rng_state())
    assert pythons_state == random.getstate()


def test_one_draw_a_forward_pass_by_every_way_in():
    model = network().train()
    gates = timm_sd.depth_gates(model)
    for way in (model, model.forward_features, model.forward_intermediates):
        before = gates.step
        way(images())
        assert gates.step == before + 1
    features = timm.create_model('sd_resnet20_cifar', features_only=True).train()
    features(images())
    assert timm_sd.depth_gates(features).step == 1
    model.eval()(images())
    assert gates.step == 3


def test_still_one_draw_a_pass_with_the_first_stage_frozen():
    model = network().train()
    gates = timm_sd.depth_gates(model)
    model.layer1.eval()
    drawn = set()
    for step in range(8):
        model(images())
        assert gates.step == step + 1
        drawn.add(tuple(gates.open))
    assert len(drawn) > 1


def test_another_module_in_the_drop_path_slot_is_used():
    model = network(drop_path_rate=0.).train()
    x = images()
    plain = model(x)
    model.layer2[1].drop_path = nn.Dropout(1.)  # all of the branch
    assert not torch.allclose(model(x), plain)


def test_constant_depth_has_no_gates():
    assert timm_sd.depth_gates(network(drop_path_rate=0.)) is None


def test_closed_blocks_run_no_kernel_forward_or_backward():
    model = network().train()

    def convolutions(gates):
        force(model, gates)
        with CountOps() as ops:
            model(images()).sum().backward()
        return ops.counts['convolution'], ops.counts['convolution_backward'], ops.counts['native_batch_norm_backward']

    assert convolutions([True] * 9) == (19, 19, 19)  # stem, and two a block
    assert convolutions([False] * 9) == (1, 1, 1)
    assert convolutions([True, False, True, False, True, False, True, True, True]) == (13, 13, 13)


def test_a_closed_identity_block_is_free_but_for_its_zero_gradients():
    model = network().train()
    block = model.layer1[0]
    force(model, [False] * 9)
    x = torch.rand(2, 16, 8, 8, requires_grad=True)
    with CountOps() as ops:
        y = block(x)
    assert y.data_ptr() == x.data_ptr()
    assert set(ops.counts) <= {'view', 'alias', 'detach'}


def test_closed_block_moves_no_batch_norm_statistic():
    model = network().train()
    force(model, [True, False] * 4 + [True])
    before = copy.deepcopy(model.state_dict())
    model(images())
    after = model.state_dict()
    for index, block in enumerate([*model.layer1, *model.layer2, *model.layer3]):
        name = next(name for name, module in model.named_modules() if module is block)
        moved = [not torch.equal(before[key], after[key]) for key in before
                 if key.startswith(f'{name}.bn') and ('running' in key or 'tracked' in key)]
        assert all(moved) if index % 2 == 0 else not any(moved)


def test_closed_block_gets_zero_gradient_and_sgd_moves_it_as_the_reference():
    model = network().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    gates = [[True] * 9, [False] * 9, [False, True] * 4 + [False]]
    block = model.layer2[1]  # open, closed, closed
    value = block.conv1.weight.detach().clone()
    momentum = torch.zeros_like(value)
    for step, step_gates in enumerate(gates):
        force(model, step_gates)
        optimizer.zero_grad()
        model(images()).logsumexp(1).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        assert all((p.grad == 0).all() for p in block.parameters()) == (step > 0)
        grad = block.conv1.weight.grad + 0.01 * value
        momentum = 0.9 * momentum + grad
        value = value - 0.1 * (grad + 0.9 * momentum)
        optimizer.step()
        torch.testing.assert_close(block.conv1.weight.detach(), value, rtol=1e-6, atol=1e-7)


def test_frozen_parameters_of_a_closed_block_stay_without_gradient():
    weight = nn.Parameter(torch.ones(2), requires_grad=False)
    x = torch.ones(2, requires_grad=True)
    closed_block(x, [weight]).sum().backward()
    assert weight.grad is None
    assert torch.equal(x.grad, torch.ones(2))


@pytest.mark.parametrize('scale', ['train', 'eval'])
def test_scale_of_an_open_block(scale):
    gates = DepthGates([0.2, 0.75])
    gate = DepthGate(gates, 1, scale=scale)
    x = torch.ones(3)
    assert gate.train()(x).tolist() == pytest.approx([4. if scale == 'train' else 1.] * 3)
    assert gate.eval()(x).tolist() == pytest.approx([1. if scale == 'train' else 0.25] * 3)


def test_eval_scale_is_equation_5_and_folds_into_a_plain_network():
    model = network(drop_path_scale='eval').eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    logits = model(images())
    plain = network(drop_path_rate=0.).eval()
    assert plain.state_dict().keys() == model.state_dict().keys()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(images()), logits, rtol=0, atol=1e-5)
    # and back: a plain checkpoint means the same function in a network of any rate and scale
    for kwargs in (dict(drop_path_scale='eval', drop_path_rate=0.3), dict(drop_path_rate=0.9)):
        other = network(**kwargs).eval()
        other.load_state_dict(plain.state_dict())
        torch.testing.assert_close(other(images()), logits, rtol=0, atol=1e-5)
    # neither direction changes the tensors it is given
    assert not torch.equal(model.layer3[2].bn2.weight, plain.layer3[2].bn2.weight)
    torch.testing.assert_close(model.layer3[2].bn2.weight * 0.5, plain.layer3[2].bn2.weight)


@pytest.mark.parametrize('replace', [nn.SyncBatchNorm.convert_sync_batchnorm, freeze_batch_norm_2d])
def test_folding_survives_another_batch_norm(replace):
    model = network(drop_path_scale='eval')
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model = replace(model)
    for _ in ('as it is', 'loaded again'):
        state = model.state_dict()
        assert all(torch.equal(tensor, plain[name]) for name, tensor in state.items())
        model.load_state_dict(state)


def test_activation_checkpointing_with_frozen_batch_norm():
    model = freeze_batch_norm_2d(network().train())
    model.set_grad_checkpointing()
    model(images()).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_subset_of_nothing():
    model = network(drop_path_mode='subset').train()
    assert model(images(0)).shape == (0, 10)


def test_a_branch_that_ends_in_an_attention_can_not_absorb_p():
    squeeze = dict(block_args=dict(attn_layer='se'))
    timm.create_model('sd_resnet18', **squeeze)
    with pytest.raises(ValueError, match="use 'train'"):
        timm.create_model('sd_resnet18', drop_path_scale='eval', **squeeze)


@pytest.mark.parametrize('scale', ['train', 'eval'])
def test_activation_checkpointing_sees_the_gates_of_its_own_forward_pass(scale):
    def gradients(checkpointing):
        model = network(drop_path_scale=scale, drop_path_seed=2).train()
        model.set_grad_checkpointing(checkpointing)
        # two forward passes before one backward pass: the recomputation comes after the second draw
        (model(images()).square().sum() + model(images(6)).square().sum()).backward()
        statistics = dict(model.named_buffers())  # which the recomputation must not move a second time
        return [p.grad for p in model.parameters()] + list(statistics.values()), timm_sd.depth_gates(model).step

    (plain, steps), (recomputed, checkpointed_steps) = gradients(False), gradients(True)
    assert steps == checkpointed_steps == 2
    for a, b in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('scale', ['train', 'eval'])
@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_draw_on_their_own(scale, duplicate):
    model = network(drop_path_scale=scale).train()
    model(images())
    twin = duplicate(model)
    gates, twin_gates = timm_sd.depth_gates(model), timm_sd.depth_gates(twin)
    assert twin_gates is not gates
    assert twin_gates.state_dict() == gates.state_dict()
    torch.testing.assert_close(twin(images()), model(images()))
    assert twin_gates.open == gates.open
    twin(images())
    assert twin_gates.step == gates.step + 1
    for key, value in model.state_dict().items():
        if 'running' not in key and 'tracked' not in key:
            assert torch.equal(value, twin.state_dict()[key])


def test_gates_add_nothing_to_the_state_dict():
    assert network().state_dict().keys() == network(drop_path_rate=0.).state_dict().keys()


def test_gate_blocks_leaves_rate_zero_alone():
    blocks = list(network(drop_path_rate=0.).layer1)
    gate_blocks([Residual(block) for block in blocks], 0.)
    assert all(isinstance(block.drop_path, nn.Identity) for block in blocks)


def test_averaging_the_parameters_works_with_folding():
    model = network(drop_path_scale='eval')
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)
    with torch.no_grad():
        model.layer3[2].bn2.weight.fill_(3.)
    average.update_parameters(model)
    assert average.module.layer3[2].bn2.weight.tolist() == pytest.approx([2.] * 64)
    assert average.module.state_dict()['layer3.2.bn2.weight'].tolist() == pytest.approx([1.] * 64)


def test_evaluation_compiles_into_one_graph():
    torch._dynamo.reset()
    model = network().eval()
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    torch.testing.assert_close(compiled(images()), model(images()))


def test_whole_model_compile_does_not_freeze_a_draw():
    torch._dynamo.reset()
    model, twin = network().train(), network().train()
    compiled = torch.compile(model, backend='eager')
    for _ in range(12):  # more patterns than dynamo's recompile limit
        torch.testing.assert_close(compiled(images()), twin(images()))
    assert timm_sd.depth_gates(model).step == 12
