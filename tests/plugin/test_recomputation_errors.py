"""Where a recomputation could mean two forward passes it is an error, and what is none; the user's random numbers."""
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import timm_sd
from support.checkpointing import (
    assert_same,
    both_checkpoints,
    each_block,
    each_kind,
    each_way,
    gradients_of,
    network,
    plain,
    refusal,
    second_block,
    stem,
    timms_sequential,
    whole,
)
from support.networks import blocks_of, pictures
from timm_sd import recomputation

# --- where two passes could be meant, it is an error


@both_checkpoints
@pytest.mark.parametrize('per_block', [False, True])
def test_without_the_random_state_it_is_an_error(per_block, reentrant):
    """Also where the first block that was checkpointed is not recomputed, for nothing before stage 3 is trained."""
    model, bias = network(), torch.zeros(1, requires_grad=True)
    parts = [block if per_block else nn.Sequential(block) for block in blocks_of(model)]
    model.requires_grad_(False)
    model.layer3.requires_grad_()

    def run(x):
        x = stem(model, x)
        for index, part in enumerate(parts):
            x = checkpoint(part, x + bias if index == 4 else x, use_reentrant=reentrant, preserve_rng_state=False)
        return model.forward_head(x)

    loss = run(pictures()).square().sum() + run(pictures(6)).square().sum()
    with refusal('preserve_rng_state=True'):
        loss.backward()


@both_checkpoints
def test_a_whole_network_without_the_random_state_is_an_error(reentrant):
    loss = checkpoint(network(), pictures().requires_grad_(), use_reentrant=reentrant, preserve_rng_state=False).sum()
    with refusal('preserve_rng_state=True'):
        loss.backward()


@both_checkpoints
@each_way
def test_the_same_torch_seed_before_two_passes_is_an_error(way, reentrant):
    def run():
        model, x = network(), pictures().requires_grad_()
        loss = 0.
        for _ in range(2):
            torch.manual_seed(7)
            loss = loss + way(model, x, reentrant).square().sum()
        loss.backward()

    with refusal('random numbers'):
        run()


@both_checkpoints
def test_the_same_torch_seed_is_an_error_after_many_passes_too(reentrant, monkeypatch):
    """The beginning of a pass is remembered far longer than its gates."""
    assert recomputation.REMEMBERED_BEGINNINGS >= 100 * recomputation.REMEMBERED_PASSES
    monkeypatch.setattr(recomputation, 'REMEMBERED_PASSES', 3)

    def run():
        model, x = network(), pictures().requires_grad_()
        torch.manual_seed(7)
        loss = whole(model, x, reentrant).square().sum()
        for _ in range(4):
            with torch.no_grad():
                model(x)
        torch.manual_seed(7)
        whole(model, x, reentrant)
        loss.backward()

    with refusal('random numbers'):
        run()


def grad_cache(model, run, chunks):
    """Representations without gradients first, then a second pass with the random state of the first one."""
    states, targets = [], []
    for x in chunks:
        states.append(torch.get_rng_state())
        with torch.no_grad():
            targets.append(model(x))
    for x, state, target in zip(chunks, states, targets, strict=True):
        torch.set_rng_state(state)
        (run(model, x) * target).sum().backward()


@pytest.mark.parametrize('way', [plain, whole])
@both_checkpoints
def test_grad_cache_is_an_error(way, reentrant):
    with refusal('random numbers'):
        grad_cache(network(), lambda model, x: way(model, x.requires_grad_(), reentrant),
                   [pictures(2), pictures(3)])


@pytest.mark.parametrize('way', [plain, whole])
@both_checkpoints
def test_grad_cache_of_many_chunks_is_an_error(way, reentrant, monkeypatch):
    monkeypatch.setattr(recomputation, 'REMEMBERED_PASSES', 3)
    with refusal('random numbers'):
        grad_cache(network(), lambda model, x: way(model, x.requires_grad_(), reentrant),
                   [pictures(2) for _ in range(4)])


@both_checkpoints
def test_more_passes_than_are_remembered_are_an_error(reentrant, monkeypatch):
    monkeypatch.setattr(recomputation, 'REMEMBERED_PASSES', 3)
    model = network()
    losses = [whole(model, pictures().requires_grad_(), reentrant).sum() for _ in range(4)]
    sum(losses[1:]).backward()
    with refusal('last 3 forward passes'):
        losses[0].backward()


@both_checkpoints
def test_passes_of_an_epoch_before_are_an_error(reentrant):
    model = network()
    loss = whole(model, pictures().requires_grad_(), reentrant).sum()
    timm_sd.depth_gates(model).set_epoch(1)
    with refusal('none of the last 100 forward passes'):
        loss.backward()


class InBackward(torch.autograd.Function):
    """Runs a function of `x` in the forward pass, and in the backward pass again, as a checkpoint of one's own does."""

    @staticmethod
    def forward(ctx, function, x):
        ctx.function = function
        ctx.save_for_backward(x)
        return function(x)

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            torch.autograd.backward(ctx.function(x), grad)
        return None, x.grad


def test_a_training_pass_within_a_backward_pass_is_an_error():
    loss = InBackward.apply(network(), pictures().requires_grad_()).sum()
    with refusal('within a backward pass'):
        loss.backward()


@pytest.mark.parametrize('before', [False, True])
def test_a_stage_that_is_repeated_without_its_random_state_is_an_error(before):
    """Also behind a checkpoint, which leaves the random state as the later blocks saw it."""
    model, loss = network(), 0.
    for x in (pictures().requires_grad_(), pictures(6).requires_grad_()):
        y = model.layer1(stem(model, x))
        y = checkpoint(model.layer2, y, use_reentrant=False) if before else model.layer2(y)
        loss = loss + InBackward.apply(model.layer3, y).square().sum()
    with refusal('within a backward pass'):
        loss.backward()


@both_checkpoints
def test_evaluation_mode_before_backward_has_the_passs_gates_or_is_an_error(reentrant):
    def gradients(way):
        model = network()
        loss = way(model, pictures().requires_grad_(), reentrant).square().sum()
        model.eval()
        loss.backward()
        return gradients_of(model)

    theirs = gradients(plain)
    try:
        ours = gradients(whole)
    except RuntimeError:
        return
    assert_same(ours, theirs)


# --- what is fine, and the user's own random numbers


@both_checkpoints
def test_the_same_torch_seed_in_each_epoch(reentrant):
    """set_epoch forgets the passes before it, so none of them can be meant."""
    def train(way):
        model = network()
        for epoch in range(3):
            timm_sd.depth_gates(model).set_epoch(epoch)
            torch.manual_seed(7)
            way(model, pictures().requires_grad_(), reentrant).square().sum().backward()
        return gradients_of(model)

    assert_same(train(whole), train(plain))


def test_the_same_torch_seed_before_ordinary_passes():
    model, draws = network(), set()
    for _ in range(8):
        torch.manual_seed(7)
        model(pictures()).sum().backward()
        draws.add(tuple(timm_sd.depth_gates(model).open))
    assert len(draws) > 4


def test_the_same_torch_seed_before_passes_without_gradients():
    model, draws = network(), set()
    for _ in range(8):
        torch.manual_seed(7)
        with torch.no_grad():
            model(pictures())
        draws.add(tuple(timm_sd.depth_gates(model).open))
    assert len(draws) > 4


@both_checkpoints
@pytest.mark.parametrize('way', [whole, second_block, timms_sequential])
def test_passes_of_every_kind_in_turn(way, reentrant):
    """Batch norm's statistics are often taken by training passes without gradients, before ordinary ones."""
    model, gradients = network(), []
    twin = network()
    for turn in range(3):
        for kind in (way, plain):
            gradients = [[], []]
            for network_, call, found in ((model, kind, gradients[0]), (twin, plain, gradients[1])):
                with torch.no_grad():
                    network_(pictures(2 + turn))
                network_.zero_grad()
                call(network_, pictures().requires_grad_(), reentrant).square().sum().backward()
                found += gradients_of(network_)
            assert_same(*gradients)


@pytest.mark.parametrize('way', [plain, whole])
@both_checkpoints
def test_training_is_replayed_by_its_gates_and_random_state(way, reentrant):
    model = network()
    gates, torchs = timm_sd.depth_gates(model).state_dict(), torch.get_rng_state()

    def train():
        timm_sd.depth_gates(model).load_state_dict(gates)
        torch.set_rng_state(torchs)
        model.zero_grad()
        for _ in range(3):
            way(model, pictures().requires_grad_(), reentrant).square().sum().backward()
        return gradients_of(model)

    assert_same(train(), train())


def random_states():
    """Of torch's, Python's and numpy's generators."""
    return (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()))


@each_kind
def test_an_ordinary_pass_leaves_the_users_random_numbers_alone(kind):
    model = network(kind)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random_states()
    for _ in range(3):
        model(pictures()).sum().backward()
    model.eval()(pictures())
    assert random_states() == before


@both_checkpoints
@pytest.mark.parametrize(('way', 'numbers'), [(each_block, 6), (whole, 6), (second_block, 1)])
def test_of_a_checkpointed_pass_each_block_draws_one_number_of_torchs(way, numbers, reentrant):
    model = network()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random_states()
    way(model, pictures().requires_grad_(), reentrant).sum().backward()
    found = random_states()
    torch.set_rng_state(torch.tensor(before[0], dtype=torch.uint8))
    for _ in range(numbers):
        torch.rand(())
    assert found == random_states()


@pytest.mark.parametrize('reseeded', [True, False])
def test_an_evaluation_pass_is_not_recomputed_by_the_gates_of_a_training_pass(reseeded):
    """It draws no random number, so a training pass may have its state."""
    model, x = network(), pictures().requires_grad_()
    torch.manual_seed(0)
    if reseeded:
        whole(model, x, True)
        torch.manual_seed(0)
    y = whole(model.eval(), x, True)
    if not reseeded:
        whole(model.train(), x, True)
    model.eval()
    with pytest.raises(RuntimeError, match='block 1 runs in evaluation within a backward pass'):
        y.sum().backward()
