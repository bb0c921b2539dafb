"""Stochastic depth on timm's own networks, one of each kind: the same evaluation, nothing run, timm's gradients."""
import copy
import io
import pickle
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.utils import ModelEmaV3
from torch import nn

import timm_sd
from support.kinds import KINDS, added, each_kind, images, network, residuals
from support.networks import CountOps, Naive, force


def classes(model):
    """The class of each module. The slots are left out: timm has None, an identity or no drop path in them."""
    return {name: type(module) for name, module in model.named_modules() if 'drop_path' not in name}


@each_kind
def test_evaluation_keys_and_classes_stay(name):
    plain = network(name).eval()
    x = images(plain)
    model = added(name).eval()
    assert len(timm_sd.depth_gates(model).open) == KINDS[name].closable
    assert model.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        expected = plain(x)
        assert torch.equal(model(x), expected)
        removed = timm_sd.remove_stochastic_depth(model)
        assert removed is model
        assert torch.equal(removed(x), expected)
    assert timm_sd.depth_gates(removed) is None
    assert classes(removed) == classes(plain)
    with torch.no_grad():
        removed.train()(x)


ABSORB = [name for name in KINDS if name != 'seresnet18']  # whose branches end in attention, which multiplies


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('scale', ['train', 'eval'])
@each_kind
def test_weights_and_evaluation_stay_to_the_bit_in_any_precision(name, scale, dtype):
    plain = network(name).to(dtype).eval()
    model = copy.deepcopy(plain)
    if scale == 'eval' and name not in ABSORB:
        with pytest.raises(ValueError, match='absorb p_l'):
            timm_sd.add_stochastic_depth(model, 0.5, scale=scale)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            timm_sd.add_stochastic_depth(model, 0.5, scale=scale)
        assert len(timm_sd.depth_gates(model).open) == KINDS[name].closable
    state = plain.state_dict()
    assert model.state_dict().keys() == state.keys()
    assert all(value.dtype == state[key].dtype and torch.equal(value, state[key])
               for key, value in model.state_dict().items())
    with torch.no_grad():
        x = images(plain, 1).to(dtype)
        assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize('mode', timm_sd.MODES)
def test_a_model_in_evaluation_mode_stays_in_it(mode):
    model = network('test_vit').eval()
    with torch.no_grad():
        expected = model(images(model))
        assert timm_sd.add_stochastic_depth(model, 0.5, mode=mode) is model
        assert torch.equal(model(images(model)), expected)
    assert not any(module.training for module in model.modules())


@each_kind
def test_gradients_are_those_of_the_naive_rule(name):
    model = added(name, schedule='uniform').train()
    gates = [index % 3 != 1 for index in range(KINDS[name].closable)]
    force(model, gates)
    naive = network(name).train()
    for found, is_open in zip(residuals(naive).values(), gates, strict=True):
        for slot in found.slots:
            setattr(found.block, slot, Naive(2. if is_open else 0.))
    x = images(model)
    ours, theirs = model(x), naive(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    ours.square().mean().backward()
    theirs.square().mean().backward()
    for (key, ours), theirs in zip(model.named_parameters(), naive.parameters(), strict=True):
        assert ours.grad is not None, key
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=lambda m, key=key: f'{key}: {m}')


# What makes, copies, renames or forgets a tensor, and doesn't compute: zero gradients and in-place activations need it.
BOOKKEEPING = {'_foreach_zero_', 'alias', 'clone', 'detach', 'empty_like', 'fill_', 'view', 'zero_', 'zeros_like'}


@each_kind
def test_closed_blocks_run_what_is_beside_the_branch_alone(name):
    """Forward and backward, the kernels of a network that never had the branches."""
    model, naive = added(name).train(), network(name).train()
    force(model, [False] * KINDS[name].closable)
    for found in residuals(naive).values():
        path = [getattr(found.block, module) for module in found.shortcut_path]
        path = nn.Sequential(*(module for module in path if not isinstance(module, nn.Identity)))
        if found.nonnegative and [type(module) for module in path] == [nn.ReLU]:
            path = nn.Identity()  # it changes nothing
        found.block.forward = lambda x, *_, path=path, **__: path(x.clone())

    def kernels(model):
        with CountOps() as ops:
            model(images(model)).sum().backward()
        return {kernel: count for kernel, count in ops.counts.items() if kernel not in BOOKKEEPING}

    found, expected = kernels(model), kernels(naive)
    assert found == expected
    force(model, [True] * KINDS[name].closable)
    assert sum(kernels(model).values()) > sum(expected.values())


@pytest.mark.parametrize('mode', timm_sd.MODES)
@pytest.mark.parametrize('name', ['test_resnet', 'test_vit', 'test_convnext'])
def test_training_lowers_the_loss(name, mode):
    model = added(name, 0.2, mode=mode).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    ema = ModelEmaV3(model, decay=0.5)
    x, target = images(model, 8), torch.arange(8)
    losses = []
    for _ in range(20):
        with torch.autocast('cpu', torch.bfloat16):
            loss = F.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(model)
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    with torch.no_grad():
        assert F.cross_entropy(ema.module.eval()(x), target) < losses[0]


@pytest.mark.parametrize('mode', ['batch', 'subset'])
@pytest.mark.parametrize('name', ['test_vit', 'test_convnext', 'swin_tiny_patch4_window7_224'])
@pytest.mark.parametrize('reentrant', ['0', '1'])
def test_checkpointing_sees_the_gates_of_its_own_forward_pass(name, mode, reentrant, monkeypatch):
    monkeypatch.setattr('timm.layers.config._USE_REENTRANT_CKPT', reentrant == '1')

    def gradients(checkpointing):
        model = added(name, schedule='uniform', mode=mode).train()
        model.set_grad_checkpointing(checkpointing)
        first, second = images(model), images(model, 6)
        if reentrant == '1':  # which recomputes nothing of what needs no gradient
            first.requires_grad_(), second.requires_grad_()
        # two forward passes before one backward pass: the recomputation comes after the second draw
        gates = timm_sd.depth_gates(model)
        loss = model(first).square().sum()
        opens = list(gates.open)
        loss = loss + model(second).square().sum()
        assert gates.open != opens
        loss.backward()
        assert gates.step == 2
        return [param.grad for param in model.parameters()]

    for ours, theirs in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit'])
@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_draw_on_their_own(name, duplicate):
    model = added(name).train()
    model(images(model))
    twin = duplicate(model)
    assert timm_sd.depth_gates(twin) is not timm_sd.depth_gates(model)
    patterns = set()
    for _ in range(3):
        torch.testing.assert_close(twin(images(model)), model(images(model)))
        assert timm_sd.depth_gates(twin).open == timm_sd.depth_gates(model).open
        patterns.add(tuple(timm_sd.depth_gates(twin).open))
    assert len(patterns) > 1
    # a copy can have the method taken away again, and then is plain
    timm_sd.remove_stochastic_depth(twin)
    assert classes(twin) == classes(network(name))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = network()
        self.pretrained_cfg = self.model.pretrained_cfg

    def forward(self, x):
        return self.model(x) + self.model(x)


@pytest.mark.parametrize(('make', 'kwargs', 'words'), [
    (network, dict(drop_path_rate=1.), '1.0.*\\[0, 1\\)'),
    (network, dict(drop_path_rate=-0.1), '-0.1'),
    (network, dict(drop_path_rate=0.5, mode='rows'), 'rows'),
    (network, dict(drop_path_rate=0.5, schedule='cubic'), 'cubic'),
    (network, dict(drop_path_rate=0.5, mode='subset', scale='eval'), 'eval'),
    (added, dict(drop_path_rate=0.5), 'already'),
    (Twice, dict(drop_path_rate=0.5), 'layer1.0 runs twice'),
    (lambda: timm.create_model('vgg11', num_classes=10), dict(drop_path_rate=0.5), 'no residual block'),
    (lambda: network('seresnet18'), dict(drop_path_rate=0.5, scale='eval'), 'nothing that can absorb'),
])
def test_mistakes_are_named_and_change_nothing(make, kwargs, words):
    model = make()
    before = [(type(module), module.training) for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        timm_sd.add_stochastic_depth(model, **kwargs)
    assert [(type(module), module.training) for module in model.modules()] == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_blocks_that_stay_open_are_told():
    with pytest.warns(UserWarning, match='NormFreeNet: 3 of 5 residual blocks change more than they add to'):
        timm_sd.add_stochastic_depth(network('nf_regnet_b0'), 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        timm_sd.add_stochastic_depth(network('test_vit'), 0.5)


def test_timms_own_drop_path_is_replaced():
    model = network(drop_path_rate=0.3)
    assert any(type(module) is DropPath for module in model.modules())
    timm_sd.add_stochastic_depth(model, 0.5)
    assert not any(type(module) is DropPath for module in model.modules())
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        hiera = timm_sd.add_stochastic_depth(network('hiera_tiny_224', drop_path_rate=0.3), 0.5)
    assert not any(type(module) is DropPath for module in hiera.modules())  # nor in blocks that stay open


def test_timms_own_drop_path_is_removed():
    model = timm_sd.remove_stochastic_depth(network(drop_path_rate=0.3))
    assert not any(isinstance(module, DropPath) for module in model.modules())


def test_a_whole_model_can_be_saved_and_loaded():
    model = added('test_vit').train()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    torch.testing.assert_close(loaded(images(model)), model(images(model)))
