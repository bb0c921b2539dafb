"""Ways of running the paper's network with activation checkpointing."""
import pytest
import torch
from timm.models import checkpoint_seq
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import timm_sd
from support.networks import blocks_of, freeze_statistics, pictures, toy

KINDS = dict(batch_train=dict(drop_path_scale='train'), batch_eval=dict(drop_path_scale='eval'),
             subset=dict(drop_path_mode='subset'))
each_kind = pytest.mark.parametrize('kind', KINDS)
each_epoch = pytest.mark.parametrize('epoch', [0, 3, 6])
both_checkpoints = pytest.mark.parametrize('reentrant', [False, True])


def network(kind='batch_eval', blocks_per_stage=2, epoch=3, **kwargs):
    """A network whose batch norm is frozen: its running statistics would move again in a recomputation."""
    model = freeze_statistics(toy(blocks_per_stage, **{'drop_path_schedule': 'uniform', **KINDS[kind], **kwargs}))
    timm_sd.depth_gates(model).set_epoch(epoch)
    return model


def stem(model, x):
    return model.act1(model.bn1(model.conv1(x)))


def each_block(model, x, reentrant):
    x = stem(model, x)
    for block in blocks_of(model):
        x = checkpoint(block, x, use_reentrant=reentrant)
    return model.forward_head(x)


def second_block(model, x, reentrant):
    first, second, *others = blocks_of(model)
    x = checkpoint(second, first(stem(model, x)), use_reentrant=reentrant)
    return model.forward_head(nn.Sequential(*others)(x))


def torchs_sequential(model, x, reentrant):
    return model.forward_head(checkpoint_sequential(blocks_of(model), 2, stem(model, x), use_reentrant=reentrant))


def timms_sequential(model, x, reentrant):
    x = checkpoint_seq(model.layer2, model.layer1(stem(model, x)), every=2, use_reentrant=reentrant)
    return model.forward_head(checkpoint_seq(model.layer3, x, use_reentrant=reentrant))


def whole(model, x, reentrant):
    return checkpoint(model, x, use_reentrant=reentrant)


def nested(model, x, reentrant):
    return checkpoint(lambda x: each_block(model, x, reentrant), x, use_reentrant=reentrant)


def plain(model, x, reentrant):
    return model(x)


each_way = pytest.mark.parametrize('way', [
    each_block, second_block, torchs_sequential, timms_sequential, whole, nested], ids=lambda way: way.__name__)


def gradients_of(model):
    return [torch.zeros_like(param) if param.grad is None else param.grad for param in model.parameters()]


def two_passes(model, way, reentrant=False, sizes=(4, 6)):
    """The gradients of several forward passes that meet in one backward pass; no two passes have the same gates."""
    gates, draws, loss = timm_sd.depth_gates(model), [], 0.
    for number, size in enumerate(sizes, start=1):
        x = pictures(size).requires_grad_()  # a reentrant checkpoint recomputes nothing of what needs no gradient
        loss = loss + number * way(model, x, reentrant).square().sum()
        draws.append(tuple(gates.open))
    assert len(set(draws)) == len(sizes)
    loss.backward()
    assert gates.step == len(sizes)
    return gradients_of(model)


def assert_same(ours, theirs):
    assert any(grad.any() for grad in theirs)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-5)


def refusal(words):
    """An error whose one line holds `words`."""
    return pytest.raises(RuntimeError, match=rf'\A[^\n]*{words}[^\n]*\Z')
