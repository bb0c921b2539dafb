"""torch.func and autograd go through blocks that can be skipped as through those that multiply their branch."""
import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, linearize, stack_module_state, vmap

from support.gated import PATTERNS, each_network, each_scale, forced, gradients, naive, skippable
from support.networks import force

# --- torch.func


@pytest.mark.parametrize(('name', 'scale'), [
    ('toy', 'eval'), pytest.param('test_vit', 'train', marks=pytest.mark.slow)])
def test_per_sample_gradients_are_those_of_single_samples(name, scale):
    model, x = forced(name, scale=scale)

    def loss(params, picture):
        return functional_call(model, params, (picture[None],)).square().sum()

    found = vmap(grad(loss), (None, 0))(dict(model.named_parameters()), x)
    for index in range(len(x)):
        model.zero_grad()
        model(x[index:index + 1]).square().sum().backward()
        torch.testing.assert_close({key: of_all[index] for key, of_all in found.items()}, gradients(model),
                                   rtol=1e-4, atol=1e-5)


@each_scale
def test_derivatives_of_torch_func_are_those_of_autograd(scale):
    model, x = forced('toy', scale=scale)
    model, x, v = model.double(), x.double(), torch.randn(4, 3, 8, 8, dtype=torch.double)
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    rows = [torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in y[0]]
    torch.testing.assert_close(grad(lambda x: model(x)[0, 0])(x), rows[0])
    torch.testing.assert_close(jacrev(lambda x: model(x)[0])(x), torch.stack(rows))
    value, product = jvp(model, (x,), (v,))
    torch.testing.assert_close(value, y)
    torch.testing.assert_close(product[0], torch.stack([(row * v).sum() for row in rows]))


def test_a_linearization_is_refused_in_training():
    model, x = forced('toy')
    for module in model.modules():
        module.inplace = False  # which linearize can't do
    model.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r'\Atorch.func.linearize [^\n]*eval\(\)\Z'):
        linearize(model, x)
    model.eval()
    value, tangent = linearize(model, x)
    torch.testing.assert_close((value, tangent(x)), jvp(model, (x,), (x,)))


@each_scale
def test_gradients_of_several_outputs_at_once_are_those_of_each(scale):
    model, x = forced('toy', scale=scale)
    y, params = model(x)[0], list(model.parameters())
    at_once = torch.autograd.grad(y, params, torch.eye(10), is_grads_batched=True, retain_graph=True)
    mapped = vmap(lambda v: torch.autograd.grad(y, params, v, retain_graph=True))(torch.eye(10))
    for index in range(10):
        expected = torch.autograd.grad(y[index], params, retain_graph=True)
        for found in (at_once, mapped):
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours[index], theirs)


@each_scale
def test_a_functional_call_uses_the_parameters_it_is_given(scale):
    model, x = forced('toy', scale=scale)
    params = {name: (param * 1.5).detach().requires_grad_() for name, param in model.named_parameters()}
    other = copy.deepcopy(model)
    force(other, PATTERNS['toy'])
    other.load_state_dict({**other.state_dict(), **params})
    y = functional_call(model, params, (x,))
    torch.testing.assert_close(y, other(x))
    y.sum().backward()
    other(x).sum().backward()
    torch.testing.assert_close({name: param.grad for name, param in params.items()}, gradients(other))
    assert all(param.grad is None for param in model.parameters())


@each_scale
def test_an_ensemble_under_vmap_gives_closed_blocks_zeros(scale):
    (model, x), (other, _) = forced('toy', scale=scale), forced('toy', scale=scale)
    with torch.no_grad():
        for param in other.parameters():
            param.mul_(1.25)
    params, buffers = stack_module_state([model, other])
    y = vmap(lambda p, b: functional_call(model, (p, b), (x,)))(params, buffers)
    torch.testing.assert_close(y, torch.stack([model(x), other(x)]))
    y.square().sum().backward()
    for net in (model, other):
        net(x).square().sum().backward()
    for name, param in params.items():
        assert param.grad is not None, name
        torch.testing.assert_close(param.grad, torch.stack([net.get_parameter(name).grad for net in (model, other)]))
    assert not params['layer2.0.conv1.weight'].grad.any()


# --- gradients


@each_network
def test_the_gradients_of_a_closed_block_are_zeros_for_every_caller(name):
    model, x = forced(name)
    plain, _ = naive(model, PATTERNS[name])
    closed = [param for block, is_open in zip(skippable(model), PATTERNS[name], strict=True) if not is_open
              for key, param in block.named_parameters() if not key.startswith('downsample')]
    for param, found in zip(closed, torch.autograd.grad(model(x).sum(), closed), strict=True):
        assert found.shape == param.shape
        assert not found.any()
    every = torch.autograd.grad(model(x)[0], closed, torch.eye(10), is_grads_batched=True)
    assert all(found.shape[1:] == param.shape and not found.any() for found, param in zip(every, closed, strict=True))
    for net in (model, plain):
        net(x).square().sum().backward()
    norms = [nn.utils.clip_grad_norm_(net.parameters(), 0.1) for net in (model, plain)]
    torch.testing.assert_close(*norms)
    torch.testing.assert_close(gradients(model), gradients(plain))
