"""A closed block is a module call like any other: hooks, memory, arguments.

The reference is the plain block, which computes its whole branch and multiplies it by 0 or by 1 / p.
"""

import pytest
import timm
import torch
from torch import nn
from torch.autograd import forward_ad

import timm_sd
from support.gated import PATTERNS, RATE, each_network, each_scale, forced, gradients, naive, skippable
from support.kinds import added, network
from support.networks import CountOps, force, freeze_statistics, pictures, toy
from timm_sd.gates import DepthGates
from timm_sd.stochastic_depth import Affine, Residual, make_skippable


def record(blocks):
    """Registers a hook of each kind on each block; returns the list into which they write what they see."""
    seen, ends = [], {}

    def note(index, kind):
        def hook(module, *values):
            assert module is blocks[index]
            tensors = [tensor.detach().clone() for value in values if not isinstance(value, dict)
                       for tensor in ([value] if isinstance(value, torch.Tensor) else value)]
            if kind == 'forward':
                ends[index] = tensors
            if 'backward' in kind:
                # a closed block has no ReLU, for its input comes out of one, which stops the gradient at 0
                places = ends[index][-len(tensors):]
                tensors = [tensor * (end != 0) for tensor, end in zip(tensors, places, strict=True)]
            seen.append((index, kind, tensors))
        return hook

    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(note(index, 'pre'))
        block.register_forward_pre_hook(note(index, 'pre with kwargs'), with_kwargs=True)
        block.register_forward_pre_hook(note(index, 'pre, prepended'), prepend=True)
        block.register_forward_hook(note(index, 'forward'))
        block.register_forward_hook(note(index, 'forward with kwargs'), with_kwargs=True)
        block.register_forward_hook(note(index, 'forward, prepended'), prepend=True)
        block.register_forward_hook(note(index, 'forward, always called'), always_call=True)
        block.register_full_backward_pre_hook(note(index, 'backward pre'))
        block.register_full_backward_hook(note(index, 'backward'))
    return seen


# --- hooks


@each_network
def test_hooks_see_what_those_of_plain_blocks_see(name):
    model, x = forced(name)
    plain, plain_blocks = naive(model, PATTERNS[name])
    records = [record(skippable(model)), record(plain_blocks)]
    for net in (model, plain):
        for _ in range(2):
            net(x.clone().requires_grad_()).square().sum().backward()
    assert len(records[0]) == 2 * 9 * len(plain_blocks)
    for ours, theirs in zip(*records, strict=True):
        assert ours[:2] == theirs[:2]
        torch.testing.assert_close(ours[2], theirs[2], msg=lambda text, where=ours[:2]: f'{where}: {text}')


def test_hooks_of_all_modules_see_a_closed_block_once():
    model, x = forced('test_vit')  # in-place activations and torch's backward hooks don't go together
    blocks, seen = skippable(model), []
    everywhere = torch.nn.modules.module
    hooks = [register(lambda module, *_, kind=kind: seen.append((kind, module))) for kind, register in (
        ('pre', everywhere.register_module_forward_pre_hook), ('forward', everywhere.register_module_forward_hook),
        ('backward pre', everywhere.register_module_full_backward_pre_hook),
        ('backward', everywhere.register_module_full_backward_hook))]
    try:
        model(x).sum().backward()
    finally:
        for hook in hooks:
            hook.remove()
    for block, is_open in zip(blocks, PATTERNS['test_vit'], strict=True):
        for kind in ('pre', 'forward', 'backward pre', 'backward'):
            assert seen.count((kind, block)) == 1, kind
            assert seen.count((kind, block.mlp.fc1)) == is_open


@each_network
@pytest.mark.parametrize('change', [
    lambda block: block.register_forward_pre_hook(lambda _, args: (2 * args[0], *args[1:])),
    lambda block: block.register_forward_hook(lambda _, args, y: y * 1.5),
    lambda block: block.register_full_backward_pre_hook(lambda _, grads: (3 * grads[0],)),
    lambda block: block.register_full_backward_hook(lambda _, grads, __: (grads[0] / 3,))])
def test_what_a_hook_changes_is_used(name, change):
    model, x = forced(name)
    plain, plain_blocks = naive(model, PATTERNS[name])
    unchanged = [model(x)]
    unchanged[0].square().sum().backward()
    unchanged.append(next(model.parameters()).grad.clone())
    model.zero_grad()
    for blocks in (skippable(model), plain_blocks):
        for block in blocks:
            change(block)
    found, expected = model(x), plain(x)
    torch.testing.assert_close(found, expected)
    for y in (found, expected):
        y.square().sum().backward()
    torch.testing.assert_close(gradients(model), gradients(plain))
    assert not all(map(torch.allclose, unchanged, (found, next(model.parameters()).grad)))


def test_a_hook_that_is_always_called_is_called_where_a_closed_block_fails():
    model, _ = forced('toy', [False] * 3)
    seen = []
    model.layer2[0].register_forward_hook(lambda *_: seen.append('always'), always_call=True)
    model.layer2[0].register_forward_hook(lambda *_: seen.append('else'))
    with pytest.raises(IndexError):
        model.layer2[0](torch.ones(1))
    assert seen == ['always']


# --- attributes


class Counting(nn.Module):
    """A block that keeps what it saw, as blocks with attention maps or auxiliary losses do."""

    def __init__(self):
        super().__init__()
        self.branch, self.drop_path, self.passes, self.mean = nn.Linear(4, 4), nn.Identity(), 0, None
        self.register_buffer('seen', torch.zeros(()))

    def forward(self, x):
        self.passes += 1
        self.mean = x.mean()
        self.seen = self.seen + 1
        return x + self.drop_path(self.branch(x))


class CountingLinear(nn.Linear):
    passes = 0

    def forward(self, x):
        self.passes += 1
        return super().forward(x)


@each_scale
def test_what_an_open_block_and_its_layers_assign_to_themselves_stays(scale):
    block = Counting()
    block.branch = nn.Sequential(CountingLinear(4, 4), CountingLinear(4, 4))
    last_affine = (Affine('drop_path', block.branch[1]),)
    make_skippable([Residual(block, last_affine=last_affine)], DepthGates(1, 0.5, scale=scale))
    gates, x, opened = block.drop_path.gates, torch.randn(2, 4), 0
    for _ in range(20):
        block(x)
        opened += gates.open[0]
    assert 0 < opened < 20
    assert (block.passes, block.seen.item(), block.mean) == (opened, opened, x.mean())
    assert [layer.passes for layer in block.branch] == [opened, opened]
    assert block.state_dict()['seen'] == opened


# --- the activation behind the addition


@pytest.mark.parametrize('activation', [nn.ReLU, nn.SiLU, nn.LeakyReLU, nn.PReLU])
@pytest.mark.parametrize('make', [
    toy, lambda: timm.create_model('sd_resnet18', num_classes=3),
    lambda: timm_sd.add_stochastic_depth(timm.create_model('resnet10t', num_classes=3), RATE)])
def test_a_closed_block_runs_the_activation_that_stands_there_now(make, activation):
    model = make()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, activation())
    gates = [index % 2 == 0 for index in range(len(skippable(model)))]
    freeze_statistics(model)
    timm_sd.depth_gates(model).drop_path_rates = [RATE] * len(gates)
    force(model, gates)
    plain, _ = naive(model, gates)
    x = pictures(2, 32)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)


def test_hooks_of_the_last_activation_fire_and_what_they_return_is_used():
    model, x = forced('toy', [False] * 3)
    plain, plain_blocks = naive(model, [False] * 3)
    for blocks in (skippable(model), plain_blocks):
        for block in blocks:
            block.act2.register_forward_hook(lambda _, args, y: y * 2)
    torch.testing.assert_close(model(x), plain(x))


def test_an_activation_in_place_leaves_the_output_of_the_shortcut_alone():
    model, x = forced('toy', [False] * 3)
    plain, plain_blocks = naive(model, [False] * 3)
    for blocks in (skippable(model), plain_blocks):
        blocks[1].shortcut = nn.Sequential(blocks[1].shortcut, nn.Sigmoid())  # whose gradient needs its output
    for net in (model, plain):
        net(x).square().sum().backward()
    torch.testing.assert_close(model.conv1.weight.grad, plain.conv1.weight.grad)


# --- memory


@pytest.mark.parametrize('with_grad', [True, False])
@pytest.mark.parametrize(('name', 'kwargs'), [
    ('toy', {}), ('test_resnet', {}), ('test_vit', {}), *(
        (name, dict(features_only=True)) for name in ('test_resnet', 'test_vit', 'test_convnext'))])
def test_what_leaves_the_closed_blocks_can_be_written_in_place(name, kwargs, with_grad):
    def run(write):
        model = toy() if name == 'toy' else timm_sd.add_stochastic_depth(network(name, **kwargs), RATE)
        force(freeze_statistics(model), [False] * len(timm_sd.depth_gates(model).open))
        inputs = []
        skippable(model)[-1].register_forward_pre_hook(lambda _, args: inputs.append((args[0], args[0].clone())))
        with torch.set_grad_enabled(with_grad):
            x = pictures(2, 64 if name == 'test_vit' else 32)
            y = model(x)[-1] if kwargs else model.forward_features(x)
            y = write(y)
            if with_grad:
                y.square().mean().backward()
        torch.testing.assert_close(*inputs[0], rtol=0, atol=0)
        return y.detach(), gradients(model)

    torch.testing.assert_close(run(lambda y: y.sub_(0.5).relu_()), run(lambda y: (y - 0.5).relu()))


def test_nothing_is_copied_within_the_chain():
    model = freeze_statistics(toy(3))
    force(model, [False] * 9)
    inputs = []
    for block in skippable(model):
        block.register_forward_pre_hook(lambda _, args: inputs.append(args[0].data_ptr()))
    with CountOps() as ops:
        y = model.forward_features(pictures())
        y.sum().backward()
    outputs, downsampling, last = [*inputs[1:], y.data_ptr()], (3, 6), (2, 5, 8)  # of each stage
    assert [y == x for x, y in zip(inputs, outputs, strict=True)] == [
        index not in (*downsampling, *last) for index in range(9)]
    # and before the downsampling blocks' activations, which work in place
    assert ops.counts['clone'] + ops.counts['copy_'] == len(last) + len(downsampling)


def test_a_hook_may_write_into_what_a_closed_block_returned():
    model = freeze_statistics(toy(3))
    force(model, [False] * 9)
    kept = []
    for block in skippable(model):
        block.register_forward_hook(lambda _, args, y: kept.append((args[0], args[0].clone(), y.mul_(2.))))
    with torch.no_grad():
        model(pictures())
    for x, before, _ in kept:
        assert torch.equal(x, before)


def test_a_cuda_graph_of_the_whole_network_is_refused(monkeypatch):
    """No GPU is needed: what asks it is replaced."""
    model = freeze_statistics(toy())
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
    model(pictures())

    class OnGpu(torch.Tensor):
        is_cuda = True

    with pytest.raises(RuntimeError, match='CUDA graph of the whole network would freeze one draw'):
        model.layer1[0](pictures().as_subclass(OnGpu))


def test_a_closed_block_has_a_forward_derivative():
    model, _ = forced('toy', [False] * 3)
    x, tangent = torch.ones(2, 16, 8, 8), torch.full((2, 16, 8, 8), 3.)
    with forward_ad.dual_level():
        y = model.layer1[0](forward_ad.make_dual(x, tangent))
        assert torch.equal(forward_ad.unpack_dual(y).tangent, tangent)


@pytest.mark.parametrize('gates', [(False, False, False), (False, True, False)])
def test_a_closed_block_is_differentiated_twice(gates):
    model, x = forced('toy', gates)
    products = []
    for twin in (model, naive(model, gates)[0]):
        params = list(twin.parameters())
        first = torch.autograd.grad(twin(x).square().sum(), params, create_graph=True)
        products.append(torch.autograd.grad(first, params, [torch.ones_like(param) for param in params]))
    torch.testing.assert_close(*products, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(('name', 'chained'), [
    ('test_resnet', [False] * 4), ('test_vit', [True] * 5 + [False]),
    # a convolution comes before a stage
    ('test_convnext', [False, *[True, False], *[True, True, True, False], *[True, False]]),
    # a block that can't be closed comes before a stage
    ('mobilenetv2_035', [False, *[True, False], *[True, True, False], *[True, False], *[True, False]]),
    ('nf_regnet_b0', [False, False])])
def test_blocks_are_chained_where_one_feeds_the_next(name, chained):
    assert [block.chained for block in skippable(added(name))] == chained


# --- arguments


class Conditioned(nn.Module):
    """A block that takes more than its input."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.drop_path = nn.Identity()

    def forward(self, x, scale, shift=None, power=1):
        return x + self.drop_path(self.layer(x) * scale ** power + shift)


@pytest.mark.parametrize('is_open', [True, False])
def test_blocks_take_arguments_by_position_and_by_name(is_open):
    block = Conditioned()
    gates = DepthGates(1, RATE, scale='train')
    make_skippable([Residual(block)], gates)
    gates.draw = lambda: setattr(gates, 'open', [is_open])
    x, scale, shift = (torch.randn(2, 4, requires_grad=True) for _ in range(3))
    expected = x + is_open / (1 - RATE) * (block.layer(x) * scale ** 2 + shift)
    wanted = torch.autograd.grad(expected.square().sum(), (x, scale, shift))
    for call in (lambda: block(x, scale, shift, 2), lambda: block(x, scale, shift=shift, power=2),
                 lambda: block(x=x, power=2, scale=scale, shift=shift)):
        y = call()
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(torch.autograd.grad(y.square().sum(), (x, scale, shift)), wanted)


# --- layers whose own call is changed


@pytest.mark.parametrize('change', [
    lambda layer: layer.compile(backend='eager'),
    lambda layer: setattr(layer, 'forward', lambda x, forward=layer.forward: forward(x))])
@pytest.mark.parametrize(('name', 'layer'), [('toy', 'bn2'), ('test_vit', 'mlp')])
def test_a_layer_whose_call_is_replaced_keeps_the_scale(name, layer, change):
    model, x = forced(name, scale='eval')
    expected = model(x)
    for block in skippable(model):
        change(getattr(block, layer))
    torch.testing.assert_close(model(x), expected)


@each_scale
@pytest.mark.parametrize(('name', 'layer'), [('toy', 'bn2'), ('toy', 'drop_path'), ('test_vit', 'mlp.fc2'),
                                             ('test_vit', 'mlp')])
def test_hooks_within_an_open_block_get_the_module_that_they_were_registered_on(name, layer, scale):
    model, x = forced(name, scale=scale)
    expected, seen, back = model(x), [], []
    layers = [block.get_submodule(layer) for block in skippable(model)]
    for module in layers:
        module.register_forward_pre_hook(lambda module, args: seen.append(module))
        module.register_forward_hook(lambda module, args, kwargs, y: seen.append(module), with_kwargs=True)
        if name != 'toy' or layer == 'drop_path':  # torch refuses them before an activation in place
            module.register_full_backward_pre_hook(lambda module, grads: back.append(module))
            module.register_full_backward_hook(lambda module, *grads: back.append(module))
    y = model(x)
    torch.testing.assert_close(y, expected)
    ran = [module for module, is_open in zip(layers, PATTERNS[name], strict=True) if is_open for _ in range(2)]
    assert seen == ran
    y.square().sum().backward()
    assert back == (ran[::-1] if layers[0]._backward_hooks else [])


@each_scale
@pytest.mark.parametrize('name', ['toy', 'test_vit'])
def test_a_hook_of_a_slot_gets_the_branch_as_it_is(name, scale):
    model, x = forced(name, scale=scale)
    plain, plain_blocks = naive(model, PATTERNS[name])
    for blocks in (skippable(model), plain_blocks):
        for block in blocks:
            for slot in {getattr(block, slot) for slot in ('drop_path', 'drop_path1', 'drop_path2')
                         if hasattr(block, slot)}:
                slot.register_forward_pre_hook(lambda _, args: args[0].clamp(-0.1, 0.1))
    torch.testing.assert_close(model(x), plain(x))


@each_scale
@pytest.mark.parametrize('kind', ['register_full_backward_hook', 'register_full_backward_pre_hook'])
def test_a_backward_hook_of_a_slot_fires(kind, scale):
    (model, x), seen = forced('toy', scale=scale), []
    for block in skippable(model):
        block.act2 = nn.ReLU()  # torch refuses these hooks before an activation in place
        getattr(block.drop_path, kind)(lambda slot, *_: seen.append(slot))
    model(x).sum().backward()
    assert seen == [block.drop_path for block, is_open in zip(skippable(model), PATTERNS['toy'], strict=True)
                    if is_open]


@pytest.mark.parametrize('with_grad', [True, False])
def test_the_output_of_a_stage_alone_can_be_written_in_place(with_grad):
    model, _ = forced('toy', [False] * 3)
    for stage, channels in ((model.layer1, 16), (model.layer2, 16), (model.layer3, 32)):
        x = torch.ones(2, channels, 8, 8, requires_grad=with_grad)
        stage(x).add_(1.)
        assert (x == 1.).all()
