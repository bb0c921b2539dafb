"""The paper's eq. 5 with plain stored weights: whatever the loop, the updates are those of the naive rule."""
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

import timm_sd
from support import reference
from support.gated import PATTERNS, RATE, forced, naive, skippable
from support.networks import blocks_of, force, lively, pictures, toy

BLOCKS_PER_STAGE, LR, MOMENTUM, WEIGHT_DECAY = 2, 0.1, 0.9, 1e-2
SURVIVAL = reference.survival_probabilities(6, 0.5)


# --- the updates are the paper's, however the gradient is taken


def losses(model, batches, seen, forward=None):
    """Yields the loss of each batch; `seen` gets the batch and the gates."""
    for x, target in batches:
        loss = F.cross_entropy((forward or model)(x), target)
        seen.append((x, target, list(timm_sd.depth_gates(model).open)))
        yield loss


def accumulated(model, optimizer, batches, seen):
    for loss in losses(model, batches, seen):
        loss.backward()
    optimizer.step()


def by_one_backward(model, optimizer, batches, seen):
    sum(losses(model, batches, seen)).backward()
    optimizer.step()


def by_autograd_grad(model, optimizer, batches, seen):
    params = list(model.parameters())
    for param, grad in zip(params, torch.autograd.grad(sum(losses(model, batches, seen)), params), strict=True):
        param.grad = grad
    optimizer.step()


def by_functional_call(model, optimizer, batches, seen):
    leaves = {name: param.detach().clone().requires_grad_() for name, param in model.named_parameters()}
    sum(losses(model, batches, seen, lambda x: torch.func.functional_call(model, leaves, (x,)))).backward()
    for name, param in model.named_parameters():
        param.grad = leaves[name].grad
    optimizer.step()


def by_grad_scaler(model, optimizer, batches, seen):
    scaler = torch.amp.GradScaler('cpu', init_scale=256.)
    for loss in losses(model, batches, seen):
        scaler.scale(loss).backward()
    scaler.step(optimizer)
    assert scaler.get_scale() == 256.  # nothing overflowed, so the step was taken


def frozen_and_released(model, optimizer, batches, seen):
    free = getattr(model, 'updates', 0) >= 2
    model.updates = getattr(model, 'updates', 0) + 1
    for module in (model.layer1[1].bn2, model.layer3):
        module.requires_grad_(free)
    accumulated(model, optimizer, batches, seen)


def as_it_is(model):
    return model


def reloaded(model):
    return pickle.loads(pickle.dumps(model))


def hooked(model):
    """The last layer of each branch has a hook."""
    for block in blocks_of(model):
        block.bn2.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(('way', 'copied'), [
    (accumulated, as_it_is), (by_one_backward, as_it_is), (by_autograd_grad, as_it_is), (by_functional_call, as_it_is),
    (by_grad_scaler, as_it_is), (frozen_and_released, as_it_is), (accumulated, copy.deepcopy), (accumulated, reloaded),
    (accumulated, hooked)])
def test_five_updates_are_those_of_the_naive_eq_5(way, copied):
    model = copied(lively(toy(BLOCKS_PER_STAGE, drop_path_scale='eval')).double().train())
    optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY)
    state = {name: buffer.clone() for name, buffer in model.named_buffers()}
    papers = reference.last_norms(dict(model.named_parameters()), BLOCKS_PER_STAGE, [1 / p for p in SURVIVAL])
    momenta, drawn = {}, set()
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        batches = [(torch.randn(8, 3, 8, 8, generator=generator).double(),
                    torch.randint(10, (8,), generator=generator)) for _ in range(2)]
        seen = []
        optimizer.zero_grad()
        way(model, optimizer, batches, seen)

        gradients = {name: torch.zeros_like(value) for name, value in papers.items()}
        for x, target, gates in seen:
            drawn.add(tuple(gates))
            _, found = reference.loss_and_gradients(
                papers, state, x, target, BLOCKS_PER_STAGE, [float(is_open) for is_open in gates])
            gradients = {name: gradients[name] + found[name] for name in found}
        free = {name: papers[name] for name, param in model.named_parameters() if param.requires_grad}
        reference.sgd_step(free, gradients, momenta, LR, MOMENTUM, WEIGHT_DECAY)
        expected = reference.last_norms(papers, BLOCKS_PER_STAGE, SURVIVAL)
        for name, param in model.named_parameters():
            torch.testing.assert_close(param.detach(), expected[name], rtol=0., atol=1e-5, msg=lambda m, n=name: n + m)
    assert len(drawn) > 3
    assert any(sum(gates) < 4 for gates in drawn)  # closed steps too
    x = pictures().double()
    torch.testing.assert_close(model.eval()(x), reference.forward({**state, **papers}, x, BLOCKS_PER_STAGE, SURVIVAL),
                               rtol=0., atol=1e-5)


@pytest.mark.parametrize('name', ['toy', 'test_vit'])
def test_the_last_layers_gradient_is_the_plain_ones_times_the_survival_probability_squared(name):
    """Whatever the layer, and wherever it stands in the block."""
    model, x = forced(name, scale='eval')
    plain, _ = naive(model, PATTERNS[name])
    for net in (model, plain):
        net(x).square().sum().backward()
    last = {id(getattr(block.get_submodule('.'.join(path)), name)) for block in skippable(model)
            for _, path, names, _ in block.last_affine for name in names}
    assert len(last) == 2 * sum(len(block.last_affine) for block in skippable(model))
    for (where, param), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        factor = (1. - RATE) ** 2 if id(param) in last else 1.
        torch.testing.assert_close(param.grad, factor * expected.grad, msg=lambda text, where=where: f'{where}: {text}')


def test_under_autocast_the_gradient_is_about_the_papers():
    model = lively(toy(BLOCKS_PER_STAGE, drop_path_scale='eval')).train()
    gates = [True, False, True, True, False, True]
    force(model, gates)
    papers = reference.last_norms(dict(model.named_parameters()), BLOCKS_PER_STAGE, [1 / p for p in SURVIVAL])
    target = torch.arange(4)
    _, gradients = reference.loss_and_gradients(
        papers, dict(copy.deepcopy(model).named_buffers()), pictures(), target, BLOCKS_PER_STAGE,
        [float(is_open) for is_open in gates])
    with torch.autocast('cpu', torch.bfloat16):
        logits = model(pictures())
    F.cross_entropy(logits.float(), target).backward()
    expected = reference.last_norms(gradients, BLOCKS_PER_STAGE, SURVIVAL)
    for name, param in model.named_parameters():
        found, wanted = param.grad.flatten(), expected[name].flatten()
        assert found.dtype == torch.float32
        # the size along the paper's direction, which bfloat16's noise moves little
        assert (found @ wanted).item() == pytest.approx((wanted @ wanted).item(), rel=0.15), name
