"""What is exported of a network in evaluation is the plain network: TorchScript, fx, torch.export, ONNX."""
import copy

import pytest
import torch
from timm.models import GraphExtractNet

import timm_sd
from support.kinds import added, images, network
from support.networks import pictures, toy

# torch says of its older ways that they are old, and tracing that it follows one way through the code
pytestmark = [pytest.mark.filterwarnings('ignore:.torch.jit'),
              pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')]


def kernels(exported):
    return [node.target for node in exported.graph.nodes if node.op == 'call_function']


@pytest.mark.parametrize('name', ['test_resnet', *(
    pytest.param(name, marks=pytest.mark.slow) for name in ('test_vit', 'test_convnext'))])
def test_exports_are_those_of_the_plain_network(name):
    plain, model = network(name).eval(), added(name).eval()
    x = images(plain)
    expected = plain(x)
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), expected)
    assert kernels(exported) == kernels(torch.export.export(plain, (x,)))
    if name == 'test_resnet':  # fx can't follow the control flow of the others
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)
    torch.testing.assert_close(torch.jit.script(model)(x), expected)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), expected)


@pytest.mark.parametrize('scale', ['train', 'eval'])
def test_the_papers_network_exports(scale):
    model, x = toy(drop_path_scale=scale).eval(), pictures()
    expected = model(x)
    for exported in (torch.export.export(model, (x,)).module(), torch.fx.symbolic_trace(model), torch.jit.script(model),
                     torch.jit.trace(model, x)):
        torch.testing.assert_close(exported(x), expected)


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
@pytest.mark.parametrize('name', ['test_resnet', 'test_vit', 'test_convnext'])
def test_onnx_holds_the_plain_network(name, tmp_path):
    import onnx  # neither is needed by the package
    import onnxruntime

    plain, model = network(name).eval(), added(name).eval()
    x = images(plain)
    torch.onnx.export(model, (x,), tmp_path / 'model.onnx', verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / 'model.onnx')
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), plain(x), rtol=1e-3, atol=1e-4)
    torch.onnx.export(plain, (x,), tmp_path / 'plain.onnx', verbose=False)
    kinds = [[node.op_type for node in onnx.load(tmp_path / file).graph.node] for file in ('model.onnx', 'plain.onnx')]
    assert kinds[0] == kinds[1]
