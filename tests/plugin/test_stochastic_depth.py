"""The method in training: what a closed block costs and moves, how an open one is scaled, copies that go on."""
import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from timm.layers import freeze_batch_norm_2d
from torch import nn

import timm_sd
from support.networks import CountOps, blocks_of, force, pictures, toy


def constant_branch(block, value):
    """Makes the branch of a block of the paper's network return `value` everywhere."""
    nn.init.zeros_(block.bn2.weight)
    nn.init.constant_(block.bn2.bias, value)


# --- a closed block


def test_closed_blocks_run_no_kernel_forward_or_backward():
    model = toy().train()

    def kernels(gates):
        force(model, gates)
        with CountOps() as ops:
            model(pictures()).sum().backward()
        return [ops.counts[name] for name in (
            'convolution', 'convolution_backward', 'native_batch_norm_backward', 'avg_pool2d', 'avg_pool2d_backward')]

    assert kernels([True] * 3) == [7, 7, 7, 2, 2]  # stem, and two a block; two shortcuts are pooled
    assert kernels([False] * 3) == [1, 1, 1, 2, 2]
    assert kernels([False, True, False]) == [3, 3, 3, 2, 2]


def test_a_closed_block_is_its_shortcut():
    model = toy().train()
    force(model, [False] * 3)
    x = torch.rand(2, 16, 8, 8)
    same, halved = model.layer1[0](x), model.layer2[0](x)
    assert torch.equal(same, x)
    assert halved.shape == (2, 32, 4, 4)
    torch.testing.assert_close(halved[:, :16], F.avg_pool2d(x, 2))
    assert not halved[:, 16:].any()


def test_a_closed_identity_block_is_free_but_for_its_zero_gradients():
    model = toy(2).train()
    force(model, [False] * 6)
    x = torch.rand(2, 16, 8, 8, requires_grad=True)
    with CountOps() as ops:
        y = model.layer1[0](x)
    assert y.data_ptr() == x.data_ptr()
    assert set(ops.counts) <= {'view', 'alias', 'detach'}


def test_closed_block_moves_no_batch_norm_statistic():
    model = toy(2).train()
    gates = [True, False, False, True, False, True]
    force(model, gates)
    before = [{key: value.clone() for key, value in block.named_buffers()} for block in blocks_of(model)]
    model(pictures())
    for block, values, is_open in zip(blocks_of(model), before, gates, strict=True):
        assert len(values) == 6  # mean, variance and number of batches of two layers
        for key, value in block.named_buffers():
            assert torch.equal(value, values[key]) != is_open, key


def test_closed_block_gets_zero_gradient_and_sgd_moves_it_as_the_reference():
    model = toy().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    block = model.layer2[0]
    value = block.conv1.weight.detach().clone()
    momentum = torch.zeros_like(value)
    for gates in ([True, True, True], [False, False, False], [True, False, True]):
        force(model, gates)
        optimizer.zero_grad()
        model(pictures()).logsumexp(1).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        assert all((p.grad == 0).all() != gates[1] for p in block.parameters())
        grad = block.conv1.weight.grad + 0.01 * value
        momentum = 0.9 * momentum + grad
        value = value - 0.1 * (grad + 0.9 * momentum)
        optimizer.step()
        torch.testing.assert_close(block.conv1.weight.detach(), value, rtol=1e-6, atol=1e-7)


def test_frozen_parameters_of_a_closed_block_stay_without_gradient():
    model = toy().train()
    force(model, [False] * 3)
    frozen = model.layer2[0].conv1.weight.requires_grad_(False)
    model(pictures()).sum().backward()
    assert frozen.grad is None
    assert all(p.grad is not None for p in model.parameters() if p is not frozen)


def test_a_wholly_frozen_closed_block_hands_the_gradient_on():
    model = toy().train()
    force(model, [False] * 3)
    model.layer1.requires_grad_(False)
    x = torch.rand(2, 16, 8, 8, requires_grad=True)
    model.layer1[0](x).sum().backward()
    assert torch.equal(x.grad, torch.ones(2, 16, 8, 8))


# --- an open block


@pytest.mark.parametrize('scale', timm_sd.SCALES)
def test_scale_of_an_open_block(scale):
    """p_l is 1/4 and the branch is 1 everywhere, so what is added is the scale."""
    model = toy(drop_path_rate=0.75, drop_path_schedule='uniform', drop_path_scale=scale).train()
    force(model, [True] * 3)
    constant_branch(model.layer1[0], 1.)
    constant_branch(model.layer2[0], 1.)
    x = torch.rand(2, 16, 8, 8)
    for factor in (4., 1.):  # in training, in evaluation
        torch.testing.assert_close(model.layer1[0](x), x + factor)
        torch.testing.assert_close(model.layer2[0](x)[:, 16:], torch.full((2, 16, 4, 4), factor))
        model.eval()


@pytest.mark.parametrize('scale', timm_sd.SCALES)
def test_each_block_is_scaled_by_its_own_rate(scale):
    model = toy(2, drop_path_rate=0.6, drop_path_scale=scale).train()  # rates 0.1 and 0.2 in the first stage
    force(model, [True] * 6)
    x = torch.rand(2, 16, 8, 8)
    for block, survival in zip(model.layer1, (0.9, 0.8), strict=True):
        constant_branch(block, 1.)
        torch.testing.assert_close(block(x), x + 1 / survival)


def test_another_module_in_the_drop_path_slot_is_used():
    model = toy(drop_path_rate=0.).train()
    x = torch.rand(2, 16, 8, 8)
    assert not torch.equal(model.layer1[0](x), x)
    model.layer1[0].drop_path = nn.Dropout(1.)  # all of the branch
    assert torch.equal(model.layer1[0](x), x)


@pytest.mark.parametrize('mode', timm_sd.MODES)
def test_at_rate_zero_a_step_is_that_of_the_plain_network(mode):
    model = toy(drop_path_rate=0., drop_path_mode=mode).train()
    plain = timm_sd.remove_stochastic_depth(copy.deepcopy(model))
    assert {type(block).__name__ for block in blocks_of(plain)} == {'BasicBlock'}
    assert all(type(block.drop_path) is nn.Identity for block in blocks_of(plain))
    counts = []
    for network in (model, plain):
        with CountOps() as ops:
            network(pictures()).square().sum().backward()
        counts.append(ops.counts)
    assert counts[0] == counts[1]
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_mode_sample_drops_single_samples_and_draws_no_gate():
    model = toy(drop_path_rate=0.5, drop_path_schedule='uniform', drop_path_mode='sample').train()
    block = model.layer1[0]
    constant_branch(block, 1.)
    x = torch.rand(400, 16, 2, 2)
    difference = block(x) - x
    per_sample = difference[:, 0, 0, 0]
    torch.testing.assert_close(difference, per_sample[:, None, None, None].expand_as(difference))
    kept = per_sample > 1.
    torch.testing.assert_close(per_sample, 2. * kept)
    assert kept.float().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(400))
    assert torch.equal(block.eval()(x), F.relu(x + 1.))
    assert timm_sd.depth_gates(model).step == 0


# --- copies


@pytest.mark.parametrize('mode', ['batch', 'subset'])
@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_draw_on_their_own(mode, duplicate):
    model = toy(drop_path_schedule='uniform', drop_path_mode=mode).train()
    model(pictures())
    twin = duplicate(model)
    gates, twin_gates = timm_sd.depth_gates(model), timm_sd.depth_gates(twin)
    assert twin_gates is not gates
    assert twin_gates.state_dict() == gates.state_dict()
    patterns = set()
    for _ in range(4):
        torch.testing.assert_close(twin(pictures()), model(pictures()))
        assert twin_gates.open == gates.open
        patterns.add(tuple(gates.open))
    assert len(patterns) > 1
    twin(pictures())
    assert twin_gates.step == gates.step + 1
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.data_ptr() != theirs.data_ptr()


# --- activation checkpointing


@pytest.mark.parametrize(('mode', 'scale'), [('batch', 'train'), ('batch', 'eval'), ('subset', 'train')])
def test_activation_checkpointing_sees_the_gates_of_its_own_forward_pass(mode, scale):
    def gradients(checkpointing):
        model = toy(2, drop_path_schedule='uniform', drop_path_mode=mode, drop_path_scale=scale).train()
        model.set_grad_checkpointing(checkpointing)
        gates = timm_sd.depth_gates(model)
        # two forward passes before one backward pass: the recomputation comes after the second draw
        first = model(pictures()).square().sum()
        opens = list(gates.open)
        second = model(pictures(6)).square().sum()
        assert gates.open != opens
        (first + second).backward()
        assert gates.step == 2
        statistics = dict(model.named_buffers())  # which the recomputation must not move a second time
        return [p.grad for p in model.parameters()] + list(statistics.values())

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_activation_checkpointing_recomputes_the_branches_of_open_blocks_alone():
    model = toy().train()
    model.set_grad_checkpointing()
    force(model, [True, False, True])
    with CountOps() as ops:
        model(pictures()).sum().backward()
    assert ops.counts['convolution'] == 1 + 2 * 4  # stem, and two blocks of two, twice
    assert ops.counts['convolution_backward'] == 1 + 4


def test_activation_checkpointing_with_frozen_batch_norm():
    model = freeze_batch_norm_2d(toy().train())
    model.set_grad_checkpointing()
    force(model, [True, False, True])
    model(pictures()).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_activation_checkpointing_with_layers_that_keep_no_statistics():
    model = toy()
    for block in blocks_of(model):
        block.bn1, block.bn2 = (nn.InstanceNorm2d(block.bn2.num_features, affine=True) for _ in range(2))
    model.train()
    force(model, [True, False, True])
    expected = torch.autograd.grad(model(pictures()).square().sum(), list(model.parameters()))
    model.set_grad_checkpointing()
    found = torch.autograd.grad(model(pictures()).square().sum(), list(model.parameters()))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize('scale', timm_sd.SCALES)
def test_a_momentum_set_before_backward_stays_where_branches_are_recomputed(scale):
    model = toy(drop_path_scale=scale).train()
    model.set_grad_checkpointing()
    force(model, [True] * 3)
    loss = model(pictures()).square().sum()
    layers = [layer for block in blocks_of(model) for layer in (block.bn1, block.bn2)]
    for layer in layers:
        layer.momentum = 0.01
    loss.backward()
    assert [layer.momentum for layer in layers] == [0.01] * 6
