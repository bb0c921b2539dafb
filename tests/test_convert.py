"""Stochastic depth on timm's own networks, one of each kind: the same evaluation, nothing run, timm's gradients."""
import copy
import io
import pickle
import subprocess
import sys
import warnings

import onnx
import onnxruntime
import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator, debug_launcher
from timm.layers import DropPath
from timm.models import get_model_input_config
from timm.utils import ModelEmaV3
from torch import nn

import timm_sd
from test_stochastic_depth import CountOps, force
from timm_sd.convert import residual_blocks
from timm_sd.stochastic_depth import GatedBlock

BEIT = dict(embed_dim=48, depth=3, num_heads=3, img_size=64)
SWIN = dict(embed_dim=24, depths=(1, 2, 1), num_heads=(1, 2, 3), img_size=64, window_size=4)
# a small network of each kind: its arguments, the blocks that can be closed, and those that can't
KINDS = {
    'test_resnet': ({}, 4, 0),
    'resnext50_32x4d': (dict(layers=(2, 1, 1, 1)), 5, 0),
    'seresnet18': ({}, 8, 0),
    'regnetx_002': ({}, 13, 0),
    'resnet33ts': ({}, 10, 0),
    'nf_regnet_b0': ({}, 12, 4),
    'test_convnext': ({}, 9, 0),
    'test_vit': ({}, 6, 0),
    'deit_tiny_patch16_224': (dict(depth=3), 3, 0),
    'beit_base_patch16_224': (BEIT, 3, 0),
    'eva02_tiny_patch14_224': (dict(depth=3), 3, 0),
    'swin_tiny_patch4_window7_224': (SWIN, 4, 0),
    'davit_tiny': (dict(depths=(1, 1, 1, 1)), 8, 0),
    'xcit_nano_12_p16_224': (dict(depth=3), 3, 2),
    'mixer_s32_224': ({}, 8, 0),
    'poolformer_s12': ({}, 12, 0),
    'caformer_s18': ({}, 18, 0),
    'hiera_tiny_224': (dict(stages=(1, 2, 2, 1)), 3, 3),
    'mobilenetv2_035': ({}, 10, 0),
    'mobilenetv3_small_050': ({}, 7, 0),
    'coatnet_pico_rw_224': ({}, 12, 0),
    'fastvit_t8': ({}, 10, 0),
    'swiftformer_xs': (dict(layers=(2, 1, 1, 1)), 5, 4),
}


def network(name='test_resnet', **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **{**KINDS[name][0], **kwargs})
    for module in model.modules():  # zero-initialised branches would prove nothing
        for param in module.parameters(recurse=False):
            if not param.any():
                nn.init.uniform_(param, 0.1, 0.5)
            if type(module).__name__.startswith('LayerScale') or param.abs().max() < 1e-3:
                nn.init.uniform_(param, 0.5, 1.)
    return model


def images(model, n=4):
    size = get_model_input_config(model)['input_size']
    if not model.pretrained_cfg.get('fixed_input_size') and size[-1] > 160:
        size = (3, 96, 96)
    return torch.randn(n, *size, generator=torch.Generator().manual_seed(1))


def added(name='test_resnet', rate=0.5, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return timm_sd.add_stochastic_depth(network(name), rate, **kwargs)


def gated_blocks(model):
    return [module for module in model.modules() if isinstance(module, GatedBlock)]


class Naive(nn.Module):
    """The reference: the whole branch is computed, then multiplied by 0 or by 1 / p."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


@pytest.mark.parametrize('name', KINDS)
def test_evaluation_keys_and_classes_stay(name):
    plain = network(name).eval()
    x = images(plain)
    model = added(name).eval()
    assert model.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        expected = plain(x)
        assert torch.equal(model(x), expected)
        removed = timm_sd.remove_stochastic_depth(model)
        assert torch.equal(removed(x), expected)
    assert not any(isinstance(module, GatedBlock) for module in removed.modules())
    assert timm_sd.depth_gates(removed) is None
    with torch.no_grad():
        removed.train()(x)


@pytest.mark.parametrize('mode', ['batch', 'subset', 'sample'])
def test_a_model_in_evaluation_mode_stays_in_it(mode):
    model = network('test_vit').eval()
    with torch.no_grad():
        expected = model(images(model))
        timm_sd.add_stochastic_depth(model, 0.5, mode=mode)
        assert torch.equal(model(images(model)), expected)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize('name', KINDS)
def test_number_of_blocks(name):
    found, stay_open = residual_blocks(network(name))
    assert (len(found), stay_open) == KINDS[name][1:]


@pytest.mark.parametrize('name', KINDS)
def test_gradients_are_those_of_the_naive_rule(name):
    model = added(name, schedule='uniform').train()
    gates = [index % 3 != 1 for index in range(len(gated_blocks(model)))]
    force(model, gates)
    naive = network(name).train()
    found, _ = residual_blocks(naive)
    for (block, slots, _, _), is_open in zip(found, gates, strict=True):
        for slot in slots:
            setattr(block, slot, Naive(2. if is_open else 0.))
    x = images(model)
    model(x).square().mean().backward()
    naive(x).square().mean().backward()
    for (key, ours), theirs in zip(model.named_parameters(), naive.parameters(), strict=True):
        assert ours.grad is not None, key
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=lambda m, key=key: f'{key}: {m}')


@pytest.mark.parametrize('name', KINDS)
def test_closed_blocks_run_nothing(name):
    model = added(name).train()
    blocks = gated_blocks(model)
    ran = []
    for block in blocks:
        inside = [module for child, module in block.named_children() if child not in block.shortcut_path]
        for module in inside:
            for leaf in module.modules():
                leaf.register_forward_hook(lambda *_: ran.append(1))
    force(model, [False] * len(blocks))
    with CountOps() as ops:
        loss = model(images(model)).sum()
        closed_forward = sum(ops.counts.values())
        loss.backward()
    assert not ran
    force(model, [True] * len(blocks))
    with CountOps() as ops:
        model(images(model))
    assert closed_forward < sum(ops.counts.values())
    assert ran


@pytest.mark.parametrize('mode', ['batch', 'subset', 'sample'])
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


def test_subset_is_the_branch_on_some_samples():
    model = added('test_vit', 0.5, schedule='uniform', mode='subset', seed=1).train()
    block = gated_blocks(model)[0]
    x = torch.randn(10, 5, 64)
    y = block(x)
    changed = (y != x).flatten(1).any(1)
    assert changed.sum() == 5
    plain = copy.deepcopy(block)
    for slot in block.drop_path_slots:
        setattr(plain, slot, Naive(2.))
    torch.testing.assert_close(y[changed], plain.eval()(x[changed]))
    y.sum().backward()
    assert all(param.grad is not None for param in block.parameters())


def test_eval_scale_folds():
    plain = network('test_vit').eval()
    x = images(plain)
    model = added('test_vit', 0.5, scale='eval').eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
        for key, value in model.state_dict().items():
            torch.testing.assert_close(value, plain.state_dict()[key], rtol=1e-6, atol=1e-7)
        twin = copy.deepcopy(model)
        timm_sd.remove_stochastic_depth(model)
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
        assert not any(module._state_dict_hooks for module in model.modules())
        torch.testing.assert_close(timm_sd.remove_stochastic_depth(twin)(x), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_draw_on_their_own(duplicate):
    model = added().train()
    model(images(model))
    twin = duplicate(model)
    assert timm_sd.depth_gates(twin) is not timm_sd.depth_gates(model)
    torch.testing.assert_close(twin(images(model)), model(images(model)))
    assert timm_sd.depth_gates(twin).open == timm_sd.depth_gates(model).open
    assert [type(block) for block in gated_blocks(twin)] == [type(block) for block in gated_blocks(model)]


def test_blocks_compile_for_themselves():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, twin = added('test_vit').train(), added('test_vit').train()
    timm_sd.compile_blocks(model, backend='aot_eager', dynamic=False)
    for step in range(12):
        torch.testing.assert_close(model(images(model)), twin(images(model)), rtol=1e-4, atol=1e-5)
        if step == 7:
            graphs = torch._dynamo.utils.counters['stats']['unique_graphs']
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == graphs
    assert not torch._dynamo.utils.counters['graph_break']


def test_whole_model_compile_does_not_freeze_a_draw():
    torch._dynamo.reset()
    model, twin = added('test_vit').train(), added('test_vit').train()
    compiled = torch.compile(model, backend='eager')
    for _ in range(12):
        torch.testing.assert_close(compiled(images(model)), twin(images(model)), rtol=1e-4, atol=1e-5)


def test_an_untrained_network_may_be_very_deep():
    residuals, stay_open = residual_blocks(timm.create_model('sd_resnet1202_cifar', drop_path_rate=0.))
    assert (len(residuals), stay_open) == (600, 0)


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit', 'test_convnext'])
def test_exports_are_those_of_the_plain_network(name):
    plain, model = network(name).eval(), added(name).eval()
    x = images(plain)
    expected = plain(x)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x) if name == 'test_resnet' else model(x), expected)
    torch.testing.assert_close(torch.jit.script(model)(x), expected)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), expected)


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit', 'test_convnext'])
def test_onnx_holds_the_plain_network(name, tmp_path):
    plain, model = network(name).eval(), added(name).eval()
    x = images(plain)
    torch.onnx.export(model, (x,), tmp_path / 'model.onnx', verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / 'model.onnx')
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), plain(x), rtol=1e-3, atol=1e-4)
    torch.onnx.export(plain, (x,), tmp_path / 'plain.onnx', verbose=False)
    kinds = [[node.op_type for node in onnx.load(tmp_path / file).graph.node] for file in ('model.onnx', 'plain.onnx')]
    assert kinds[0] == kinds[1]


def stay_equal():
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    network_ = added('test_vit').train()
    torch.manual_seed(accelerator.process_index)
    model, optimizer = accelerator.prepare(network_, torch.optim.SGD(network_.parameters(), 0.01, 0.9))
    for _ in range(10):
        optimizer.zero_grad()
        accelerator.backward(F.cross_entropy(model(torch.randn(4, 3, 160, 160)), torch.randint(10, (4,))))
        optimizer.step()
        flat = accelerator.gather(torch.cat([p.detach().flatten() for p in network_.parameters()])[None])
        assert torch.equal(flat[0], flat[1])


def test_on_two_ranks():
    result = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


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
    (lambda: network('nf_regnet_b0'), dict(drop_path_rate=0.5, scale='eval'), 'nothing that can absorb'),
])
def test_mistakes_are_named_and_change_nothing(make, kwargs, words):
    model = make()
    before = [(type(module), module.training) for module in model.modules()]
    with pytest.raises(ValueError, match=words):
        timm_sd.add_stochastic_depth(model, **kwargs)
    assert [(type(module), module.training) for module in model.modules()] == before


def test_timms_own_drop_path_is_replaced():
    model = network(drop_path_rate=0.3)
    assert any(isinstance(module, DropPath) for module in model.modules())
    timm_sd.add_stochastic_depth(model, 0.5)
    assert not any(isinstance(module, DropPath) for module in model.modules())
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        hiera = timm_sd.add_stochastic_depth(network('hiera_tiny_224', drop_path_rate=0.3), 0.5)
    assert not any(isinstance(module, DropPath) for module in hiera.modules())  # nor in blocks that stay open
    buffer = io.BytesIO()
    torch.save(model, buffer)


if __name__ == '__main__':
    debug_launcher(stay_equal, num_processes=2)
