"""Activation checkpointing: a recomputation runs by the gates of its own forward pass.

The reference is always the same network without checkpointing.
"""
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import timm_sd
from support.checkpointing import (
    assert_same,
    both_checkpoints,
    each_block,
    each_epoch,
    each_kind,
    each_way,
    gradients_of,
    network,
    plain,
    two_passes,
    whole,
)
from support.kinds import added, images
from support.networks import blocks_of, pictures
from timm_sd.skippable import SkippableBlock

# --- the gradients are those without checkpointing


@both_checkpoints
@each_kind
@each_way
def test_two_passes_have_the_gradients_of_their_own_gates(way, kind, reentrant):
    assert_same(two_passes(network(kind), way, reentrant), two_passes(network(kind), plain))


@each_epoch
@both_checkpoints
def test_three_passes_have_the_gradients_of_their_own_gates(epoch, reentrant):
    sizes = (4, 2, 3)
    assert_same(two_passes(network(epoch=epoch), whole, reentrant, sizes),
                two_passes(network(epoch=epoch), plain, sizes=sizes))


@both_checkpoints
@each_kind
@each_way
def test_the_same_input_twice_is_two_passes(way, kind, reentrant):
    def gradients(way):
        model, x = network(kind), pictures().requires_grad_()
        (way(model, x, reentrant) * way(model, x, reentrant)).sum().backward()
        assert timm_sd.depth_gates(model).step == 2
        return [x.grad, *gradients_of(model)]

    assert_same(gradients(way), gradients(plain))


@both_checkpoints
@each_kind
def test_under_autocast(kind, reentrant):
    def gradients(way):
        def low_precision(*args):
            with torch.autocast('cpu', torch.bfloat16):
                return way(*args)
        return two_passes(network(kind), low_precision, reentrant)

    assert_same(gradients(whole), gradients(plain))


@both_checkpoints
@each_way
def test_dropout_repeats_its_masks(way, reentrant):
    class Dropout(nn.Module):
        """Notes the masks of forward passes, or repeats those of `masks`."""

        def __init__(self, masks=()):
            super().__init__()
            self.masks, self.seen = list(masks), []

        def forward(self, x):
            mask = self.masks.pop(0) if self.masks else F.dropout(torch.ones_like(x), 0.5)
            if torch._C._current_graph_task_id() == -1:
                self.seen.append(mask)
            return x * mask

    def gradients(way, *masks):
        model = network()
        layers = [Dropout(masks[place] if masks else ()) for place in range(2)]  # open and closed blocks meet both
        model.layer2[0].shortcut.register_forward_pre_hook(lambda _, args, layer=layers[0]: layer(*args))
        model.fc = nn.Sequential(layers[1], model.fc)
        return two_passes(model, way, reentrant), [layer.seen for layer in layers]

    ours, masks = gradients(way)
    assert [len(seen) for seen in masks] == [2, 2]
    assert_same(ours, gradients(plain, *masks)[0])


@pytest.mark.parametrize('way', [each_block, whole])
def test_a_selective_checkpoint_repeats_gates_and_masks(way, monkeypatch):
    """It takes operators from its cache, unless told to run them again; the number that a block draws is none of them.

    The reference is an ordinary checkpoint, for it draws the same number.
    """
    def policy(context, operator, *args, **kwargs):
        again = any(word in str(operator) for word in ('dropout', 'bernoulli', 'empty', 'div', 'mul'))
        return CheckpointPolicy.MUST_RECOMPUTE if again else CheckpointPolicy.PREFER_SAVE

    def gradients(**options):
        model = network(epoch=3, drop_path_rate=0.3)
        for block in blocks_of(model):
            block.act1, block.act2 = nn.Sequential(nn.ReLU(), nn.Dropout(0.5)), nn.ReLU()  # nothing in place
        model.act1 = nn.ReLU()
        monkeypatch.setattr('support.checkpointing.checkpoint', partial(checkpoint, **options))
        torch.manual_seed(5)
        return two_passes(model, way)

    assert_same(gradients(context_fn=partial(create_selective_checkpoint_contexts, policy)), gradients())


@both_checkpoints
def test_two_networks_in_one_checkpoint(reentrant):
    def gradients(way):
        pair = [network(epoch=3), network('subset', epoch=4)]
        for _ in range(2):
            x = pictures().requires_grad_()
            together = way(lambda x: pair[0](x) * pair[1](x), x, reentrant)
            together.sum().backward()
        return [grad for model in pair for grad in gradients_of(model)]

    assert_same(gradients(whole), gradients(plain))


@both_checkpoints
@pytest.mark.parametrize('mode', ['batch', 'subset'])
def test_timms_networks(mode, reentrant, monkeypatch):
    monkeypatch.setattr('timm.layers.config._USE_REENTRANT_CKPT', reentrant)

    def gradients(checkpointing):
        model = added('test_vit', schedule='uniform', mode=mode).train()
        model.set_grad_checkpointing(checkpointing)
        x = images(model)
        loss = sum(model(batch.requires_grad_()).square().sum() for batch in (x[:2].clone(), x))
        loss.backward()
        assert timm_sd.depth_gates(model).step == 2
        return gradients_of(model)

    assert_same(gradients(True), gradients(False))


@pytest.mark.parametrize('implementation', CheckpointImpl)
@each_kind
def test_torchs_checkpoint_wrapper(kind, implementation):
    model = network(kind)
    keys = model.state_dict().keys()
    apply_activation_checkpointing(
        model, check_fn=lambda module: isinstance(module, SkippableBlock),
        checkpoint_wrapper_fn=lambda module: checkpoint_wrapper(module, checkpoint_impl=implementation))
    assert sum(type(module).__name__ == 'CheckpointWrapper' for module in model.modules()) == 6
    assert model.state_dict().keys() == keys
    assert_same(two_passes(model, plain), two_passes(network(kind), plain))


def load_rate_0(gates):
    gates.load_state_dict(timm_sd.depth_gates(network(drop_path_rate=0.)).state_dict())


@both_checkpoints
@each_kind
@pytest.mark.parametrize('change', [
    *(lambda gates, rate=rate: gates.set_drop_path_rate(rate) for rate in (0., 0.1, 0.9)), load_rate_0])
def test_rates_that_change_before_backward_are_not_the_recomputations(change, kind, reentrant):
    def gradients(way):
        model = network(kind)
        loss = way(model, pictures().requires_grad_(), reentrant).square().sum()
        change(timm_sd.depth_gates(model))
        loss.backward()
        return gradients_of(model)

    assert_same(gradients(whole), gradients(plain))


@both_checkpoints
def test_two_backward_passes_through_one_graph(reentrant):
    def gradients(way):
        model = network()
        loss = way(model, pictures().requires_grad_(), reentrant).square().sum()
        way(model, pictures(2), reentrant)
        loss.backward(retain_graph=True)
        loss.backward()
        return gradients_of(model)

    assert_same(gradients(whole), gradients(plain))


@both_checkpoints
def test_a_network_made_at_rate_0_needs_no_random_state(reentrant):
    def gradients(call):
        model, x = network(drop_path_rate=0.), pictures().requires_grad_()
        (call(model, x) * call(model, x)).sum().backward()
        return gradients_of(model)

    assert_same(gradients(lambda model, x: checkpoint(model, x, use_reentrant=reentrant, preserve_rng_state=False)),
                gradients(lambda model, x: model(x)))
