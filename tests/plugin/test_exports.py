"""What is exported, traced or scripted of a network is the plain network, in training as in evaluation.

A graph that held one draw would close the same blocks for ever, or run all of them at 1 / p.
"""
import copy

import pytest
import torch
from timm.models import GraphExtractNet
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import timm_sd
from support.kinds import added, images, network
from support.networks import force, pictures, toy
from timm_sd.skippable import SkippableBlock

# torch says of its older ways that they are old, and tracing that it follows one way through the code
pytestmark = [pytest.mark.filterwarnings('ignore:.torch.jit'), pytest.mark.filterwarnings('ignore:.torch.ao'),
              pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')]


def kernels(exported):
    return [node.target for node in exported.graph.nodes if node.op == 'call_function']


def convolutions(graph_module):
    """How many convolutions a graph of torch.fx runs, as functions or as modules."""
    modules = [graph_module.get_submodule(node.target) for node in graph_module.graph.nodes if node.op == 'call_module']
    return sum('Conv' in type(module).__name__ for module in modules) + sum(
        'conv' in str(target) for target in kernels(graph_module))


# --- each way: network, input -> what was made of it, and how many convolutions it runs


def exported(model, x, strict):
    program = torch.export.export(model, (x,), strict=strict)
    return program.module(), convolutions(program)


def traced(model, x):
    made = torch.jit.trace(model, x, check_trace=False)
    return made, str(made.inlined_graph).count('aten::_convolution(')


def scripted(model, x):
    made = torch.jit.script(model)
    return made, str(made.inlined_graph).count('aten::conv2d(')


def of_operators(model, x):
    # the parameters are inputs, or they would be constants that require gradients
    parameters = dict(model.named_parameters())
    graph = make_fx(lambda params, x: torch.func.functional_call(model, params, (x,)))(parameters, x)
    return lambda x: graph(parameters, x), convolutions(graph)


def of_fake_operators(model, x):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    graph = make_fx(
        lambda tensors, x: torch.func.functional_call(model, tensors, (x,)), tracing_mode='fake')(tensors, x)
    return lambda x: graph(tensors, x), convolutions(graph)


def symbolic(model, x):
    graph = torch.fx.symbolic_trace(model)
    return graph, convolutions(graph)


def extractor(model, x):
    from torchvision.models.feature_extraction import create_feature_extractor

    head = [name for name, _ in model.named_children()][-1]
    graph = create_feature_extractor(model, train_return_nodes=[head], eval_return_nodes=[head])
    return lambda x: graph(x)[head], convolutions(graph)


def prepared_for_quantisation(model, x):
    quantize_fx = pytest.importorskip('torch.ao.quantization.quantize_fx')
    from torch.ao.quantization import get_default_qat_qconfig_mapping, get_default_qconfig_mapping

    if model.training:
        graph = quantize_fx.prepare_qat_fx(model, get_default_qat_qconfig_mapping('x86'), (x,))
    else:
        graph = quantize_fx.prepare_fx(model, get_default_qconfig_mapping('x86'), (x,))
    return graph, convolutions(graph)


ANY = {'exported': lambda model, x: exported(model, x, strict=False),
       'exported strictly': lambda model, x: exported(model, x, strict=True),
       'traced': traced, 'scripted': scripted, 'operators': of_operators, 'fake operators': of_fake_operators}
# torch.fx can't follow the control flow of the other networks
RESNETS = {**ANY, 'symbolic': symbolic, 'extractor': extractor, 'quantisation': prepared_for_quantisation}


def pair(name, scale, training):
    """A network at rate 0.9, and a plain one of the same weights; both with images."""
    if name == 'toy':
        plain, x = toy(drop_path_rate=0., drop_path_scale='train'), pictures()
        model = toy(drop_path_rate=0.9, drop_path_schedule='uniform', drop_path_scale=scale)
        plain.load_state_dict(model.state_dict())
    else:
        plain, model = network(name), added(name, 0.9, schedule='uniform', scale=scale)
        x = images(plain)
    return plain.train(training), model.train(training), x


def check(name, way, scale, training):
    make = RESNETS[way]
    plain, model, x = pair(name, scale, training)
    types = [type(module) for module in model.modules()]
    made, count = make(model, x)
    plain_made, plain_count = make(plain, x)
    assert count == plain_count
    assert count == sum(isinstance(module, nn.Conv2d) for module in plain.modules())
    found, expected = made(x), plain_made(x)
    torch.testing.assert_close(found, expected)
    if way != 'quantisation':
        torch.testing.assert_close(found, plain(x))
    # the network itself is as before, and drops
    gates = timm_sd.depth_gates(model)
    assert gates.step == 0
    assert [type(module) for module in model.modules()] == types
    assert model.training == training
    force(model, [False] * len(gates.open))
    ran = []
    for block in (block for block in model.modules() if isinstance(block, SkippableBlock)):
        next(layer for layer in block.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))).register_forward_hook(
            lambda *_: ran.append(1))
    model.train()(x)
    assert not ran


@pytest.mark.parametrize(('scale', 'training'), [('eval', True), *(
    pytest.param(*case, marks=pytest.mark.slow) for case in (('eval', False), ('train', True), ('train', False)))])
@pytest.mark.parametrize('way', RESNETS)
def test_what_is_made_of_the_papers_network_is_plain(scale, way, training):
    check('toy', way, scale, training)


@pytest.mark.slow
@pytest.mark.parametrize('training', [True, False], ids=['training', 'evaluation'])
@pytest.mark.parametrize(('name', 'way'), [
    (name, way) for name, ways in (('test_resnet', RESNETS), ('test_vit', ANY), ('test_convnext', ANY))
    for way in ways])
def test_what_is_made_of_timms_networks_is_plain(name, way, training):
    check(name, way, 'train', training)


@pytest.mark.parametrize('name', ['test_resnet', *(
    pytest.param(name, marks=pytest.mark.slow) for name in ('test_vit', 'test_convnext'))])
def test_exports_run_the_operators_of_the_plain_network(name):
    plain, model, x = pair(name, 'train', training=True)
    assert kernels(torch.export.export(model, (x,))) == kernels(torch.export.export(plain, (x,)))


@pytest.mark.parametrize('make', [
    lambda: toy(drop_path_schedule='uniform'), lambda: added('test_resnet', schedule='uniform')])
def test_a_graph_of_timms_tracer_draws_anew_in_each_training_pass(make):
    model, x = make().train(), pictures(size=32)
    graph = GraphExtractNet(copy.deepcopy(model), ['fc'], squeeze_out=True).train()
    patterns = set()
    for _ in range(6):
        torch.testing.assert_close(graph(x), model(x))
        patterns.add(tuple(timm_sd.depth_gates(graph).open))
    assert len(patterns) > 1


@pytest.mark.slow
@pytest.mark.parametrize('training', [True, False], ids=['training', 'evaluation'])
@pytest.mark.parametrize('name', ['toy', 'test_resnet', 'test_vit', 'test_convnext'])
def test_onnx_holds_the_plain_network(name, training, tmp_path):
    import onnx  # neither is needed by the package
    import onnxruntime

    plain, model, x = pair(name, 'train', training)
    for module in (*plain.modules(), *model.modules()):
        if isinstance(module, nn.BatchNorm2d):  # onnxruntime trains no batch norm
            module.eval()
    mode = torch.onnx.TrainingMode.PRESERVE
    torch.onnx.export(model, (x,), tmp_path / 'model.onnx', verbose=False, training=mode)
    session = onnxruntime.InferenceSession(tmp_path / 'model.onnx')
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), plain(x), rtol=1e-3, atol=1e-4)
    torch.onnx.export(plain, (x,), tmp_path / 'plain.onnx', verbose=False, training=mode)
    kinds = [[node.op_type for node in onnx.load(tmp_path / file).graph.node] for file in ('model.onnx', 'plain.onnx')]
    assert kinds[0] == kinds[1]


def test_what_aot_autograd_takes_apart_is_plain_and_draws_nothing():
    from functorch.compile import aot_module, nop

    model = toy(drop_path_rate=0.9, drop_path_schedule='uniform').train()
    plain = timm_sd.remove_stochastic_depth(copy.deepcopy(model))
    torch.testing.assert_close(aot_module(model, nop)(pictures()), plain(pictures()))
    assert timm_sd.depth_gates(model).step == 0
