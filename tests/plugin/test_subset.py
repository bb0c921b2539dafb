"""Mode 'subset': the branch on some of the samples, the shortcut on all of them."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F

from support.kinds import added
from support.networks import CountOps, pictures, toy


def network(rate=0.3, blocks_per_stage=1, **kwargs):
    return toy(blocks_per_stage, drop_path_rate=rate, drop_path_schedule='uniform', drop_path_mode='subset', **kwargs)


def inputs(n=8, size=4):
    return torch.rand(n, 16, size, size, generator=torch.Generator().manual_seed(2))


def changed(x, y):
    """Which samples of an identity block went through its branch."""
    return (y != x).flatten(1).any(1)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_the_branch_runs_on_some_samples_scaled_by_how_many(memory_format):
    """Eight samples at p_l = 0.7: on six of them, times 8/6; batch norm sees the six."""
    block = network().train().layer1[0]
    naive = copy.deepcopy(block)
    x = inputs().to(memory_format=memory_format).requires_grad_()
    y = block(x)
    kept = changed(x, y)
    assert kept.sum() == 6
    assert y.is_contiguous(memory_format=memory_format)

    z = x.detach().clone().requires_grad_()
    f = naive.bn2(naive.conv2(F.relu(naive.bn1(naive.conv1(z[kept])))))
    torch.testing.assert_close(y[kept], F.relu(z[kept] + 8 / 6 * f))
    weights = torch.randn(y.shape)
    ((y * weights)[kept].sum() + (y * weights)[~kept].sum()).backward()
    ((F.relu(z[kept] + 8 / 6 * f) * weights[kept]).sum() + (z * weights)[~kept].sum()).backward()
    torch.testing.assert_close(x.grad, z.grad)
    for ours, theirs in zip(block.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(block.buffers(), naive.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_downsampling_block_pools_all_samples():
    block = network(rate=0.5).train().layer2[0]
    x = inputs()
    y = block(x)
    shortcut = F.pad(F.avg_pool2d(x, 2), (0, 0, 0, 0, 0, 16))
    kept = changed(shortcut, y)
    assert kept.sum() == 4
    assert torch.equal(y[~kept], shortcut[~kept])


@pytest.mark.parametrize(('rate', 'n', 'count'), [(0.5, 1, 1), (0.9, 2, 1), (0.7, 4, 1), (0.6, 4, 2), (0.1, 4, 4)])
def test_the_number_of_samples_is_rounded_and_never_zero(rate, n, count):
    block = network(rate).train().layer1[0]
    ran = []
    block.conv1.register_forward_pre_hook(lambda _, args: ran.append(len(args[0])))
    block(inputs(n))
    assert ran == [count]


def test_an_empty_batch_passes():
    model = network(rate=0.5).train()
    assert model(pictures(0)).shape == (0, 10)


def test_each_sample_is_kept_as_often_as_any_other():
    block = network(rate=0.5).train().layer1[0]
    x = inputs(4, 2)
    with torch.no_grad():
        kept = torch.stack([changed(x, block(x)) for _ in range(400)]).float()
    assert (kept.sum(1) == 2).all()
    assert ((kept.mean(0) - 0.5).abs() < 4 * 0.5 / math.sqrt(400)).all()


def test_blocks_and_steps_keep_different_samples():
    model = network(rate=0.5, blocks_per_stage=2).train()
    x = inputs(12)
    kept = [[tuple(changed(x, block(x)).tolist()) for block in model.layer1] for _ in range(3)]
    assert all(first != second for first, second in kept)
    assert len({first for first, _ in kept}) == 3


def test_a_step_always_costs_the_same():
    model = network(rate=0.5).train()
    counts = []
    for _ in range(3):
        model.zero_grad()
        with CountOps() as ops:
            model(pictures()).sum().backward()
        counts.append(ops.counts)
    assert counts[0] == counts[1] == counts[2]


def test_evaluation_is_that_of_the_plain_network():
    plain = toy(drop_path_rate=0.).eval()
    assert torch.equal(network().eval()(pictures()), plain(pictures()))


def test_of_a_transformer_both_branches_run_on_the_same_samples():
    model = added('test_vit', 0.5, schedule='uniform', mode='subset', seed=1).train()
    plain = added('test_vit', 0.).train().blocks[0]
    x = torch.randn(10, 5, 64)
    y = model.blocks[0](x)
    kept = changed(x, y)
    assert kept.sum() == 5
    # twice the output of either branch: attention first, and the MLP on what it gives
    z = x[kept]
    z = z + 2 * plain.ls1(plain.attn(plain.norm1(z)))
    z = z + 2 * plain.ls2(plain.mlp(plain.norm2(z)))
    torch.testing.assert_close(y[kept], z)
    y.sum().backward()
    assert all(param.grad is not None for param in model.blocks[0].parameters())
