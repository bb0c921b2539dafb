"""The recorded step against the eager one, bit for bit, with the recorder's stand-in; and what it refuses."""
import gc
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import timm
import torch
from accelerate import Accelerator
from torch import nn

import timm_sd
from harness import graphs
from harness.engine import TrainStep
from harness.errors import UserError
from harness.graphs import RecordedStep, check_recordable
from harness.network import DepthSettings
from harness.run_folder import RunFolder
from support.commands import assert_same_run, read_results, refused, run_here
from support.twin_steps import Twins

KINDS = {
    'the paper': dict(),
    'scale train': dict(scale='train'),
    'uniform': dict(schedule='uniform'),
    'uniform, scale train': dict(schedule='uniform', scale='train'),
    'bf16': dict(bf16=True),
    'bf16, scale train, uniform': dict(bf16=True, scale='train', schedule='uniform'),
    'NCHW': dict(channels_last=False),
    'constant depth': dict(rate=0.),
    'constant depth, bf16, three batches an update': dict(rate=0., bf16=True, accumulate=3),
    'three batches an update': dict(accumulate=3),
    'bf16, four batches an update': dict(bf16=True, accumulate=4),
}


@pytest.mark.parametrize('kind', KINDS)
def test_twenty_steps_are_those_of_the_eager_step(kind):
    """Losses, gates and gradients in each step, at the end parameters, momenta, statistics and evaluation."""
    twins = Twins(**KINDS[kind])
    twins.train()
    if twins.recorded.gates.active:  # both blocks that downsample, and the last, were closed and open
        assert all({draw[block] for draw in twins.draws} == {True, False} for block in (3, 6, 8))
    else:
        assert all(map(all, twins.draws))


@pytest.mark.slow
@pytest.mark.parametrize('scale', timm_sd.SCALES)
def test_compiled_branches_are_recorded_too(scale):
    Twins(scale=scale, bf16=True, compiled=True).train()


@pytest.mark.parametrize('scale', timm_sd.SCALES)
def test_a_rate_may_change_without_a_new_recording(scale):
    """Of all blocks, of one, to 0 and back again."""
    twins = Twins(scale=scale)
    every_gates = [timm_sd.depth_gates(step.model) for step in twins.steps]

    def change(number):
        for gates in every_gates:
            if number == 5:
                gates.drop_path_rates = [0.25, *gates.drop_path_rates[1:]]
            else:
                gates.set_drop_path_rate({3: 0.2, 11: 0., 14: 0.7}[number])

    twins.train({number: lambda number=number: change(number) for number in (3, 5, 11, 14)})
    assert len(twins.recorded.recordings) == 2  # of the full and of the last batch


def test_constant_depth_may_get_a_rate():
    twins = Twins(rate=0.)
    twins.train({7: lambda: [timm_sd.depth_gates(step.model).set_drop_path_rate(0.6) for step in twins.steps]})
    assert {sum(draw) for draw in twins.draws[:7]} == {9}
    assert min(sum(draw) for draw in twins.draws[7:]) < 7


def test_the_learning_rate_may_change():
    twins = Twins()

    def milestone():
        for step in twins.steps:
            step.optimizer.param_groups[0]['lr'] /= 10

    twins.train({12: milestone})


def test_evaluation_in_the_middle_of_an_epoch_changes_nothing():
    twins = Twins(accumulate=3)
    twins.train({4: twins.check, 13: twins.check})


@pytest.mark.parametrize('bf16', [False, True])
def test_a_resume_goes_on_bit_for_bit(bf16):
    """Recorded, then another recording of another network, then eager; beside an eager training."""
    twins = Twins(bf16=bf16)

    def resume(kind):
        twins.recorded = twins.resumed(kind, twins.recorded)

    twins.train({6: lambda: resume(RecordedStep), 14: lambda: resume(TrainStep)})


def test_recording_leaves_statistics_and_gradients_alone():
    twins = Twins()
    step, before = twins.recorded, {name: tensor.clone() for name, tensor in twins.network.state_dict().items()}
    step.gradient.normal_()
    gradient = step.gradient.clone()
    step.record(*twins.batch(0))
    assert torch.equal(step.gradient, gradient)
    assert all(torch.equal(tensor, before[name]) for name, tensor in step.model.state_dict().items())


def test_no_garbage_is_collected_in_a_recording(monkeypatch):
    """A CUDA graph that dies there breaks the recording; what is garbage by then is collected before."""
    class Cycle:
        def __init__(self):
            self.itself = self

    twins, collecting = Twins(rate=0.), []
    dead = weakref.ref(Cycle())
    monkeypatch.setattr(graphs.StandIn, 'warm_up', lambda recorder, function: collecting.append(
        (gc.isenabled(), dead())) or function())
    twins.recorded.record(*twins.batch(0))
    assert set(collecting) == {(False, None)}
    assert gc.isenabled()


def test_gradients_begin_at_multiples_of_512_bytes_and_lie_apart():
    step = Twins().recorded
    for value, param in enumerate(step.model.parameters(), start=1):
        assert param.grad.storage_offset() % 128 == 0
        assert param.grad.stride() == param.stride()
        param.grad.fill_(value)
    for value, param in enumerate(step.model.parameters(), start=1):
        assert (param.grad == value).all()


def test_each_gradient_is_handed_on_in_the_layout_that_was_warmed_up():
    """That of the head's pooling isn't channels_last of itself."""
    twins = Twins()
    recording = twins.recorded.record(*twins.batch(0))
    for segment in (recording.head, *(opened for opened, _ in recording.blocks)):
        assert segment.grad_x.stride() == segment.x.stride()


def test_a_batch_of_one_image_is_equal_up_to_rounding():
    """Its memory format is ambiguous, so the two steps may run other kernels."""
    twins = Twins(schedule='uniform')
    x, target = (tensor[:1] for tensor in twins.batch(0))
    for _ in range(12):
        for step in twins.steps:
            step.backward(x, target, 1, True)
        for ours, theirs in zip(twins.eager.model.parameters(), twins.recorded.model.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)


def test_what_a_recording_can_not_know_is_an_error():
    twins = Twins()
    step, (x, target) = twins.recorded, twins.batch(0)
    step.backward(x, target, 8, True)
    step.model.eval()
    with pytest.raises(RuntimeError, match=r'call model\.train\(\)'):
        step.backward(x, target, 8, True)
    step.model.train()
    step.optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r'clear them by update\(\)'):
        step.backward(x, target, 8, True)


def test_a_block_is_recorded_as_a_cuda_graph_on_the_stream_that_it_was_warmed_up_on(monkeypatch):
    """With a torch.cuda that takes down what it is told: the lines that this machine can't run."""
    said, current = [], ['default']

    class Stream:
        def wait_stream(self, other):
            said.append(('wait', other))

    class CUDAGraph:
        def replay(self):
            said.append('replay')

    @contextmanager
    def on(stream):
        current.append(stream)
        yield
        current.pop()

    def graph(recorded, pool, stream):
        said.append((recorded, pool))
        return on(stream)

    for name, value in dict(graph_pool_handle=lambda: 'pool', Stream=Stream, CUDAGraph=CUDAGraph, stream=on,
                            graph=graph, current_stream=lambda: current[-1],
                            synchronize=lambda: said.append('wait')).items():
        monkeypatch.setattr(torch.cuda, name, value)
    recorder = graphs.CudaRecorder()
    recorder.warm_up(lambda: said.append(current[-1]))
    assert said == [('wait', 'default'), recorder.stream, recorder.stream, 'wait']
    said.clear()
    output, replay = recorder.record(lambda: current[-1])
    assert output is recorder.stream
    replay()
    assert said == [(recorder.graphs[0], 'pool'), 'replay']


@pytest.mark.parametrize(('flags', 'names'), [
    (('--drop-path-mode', 'subset', '--drop-path-scale', 'train'), '--drop-path-mode subset'),
    (('--drop-path-mode', 'sample', '--drop-path-scale', 'train'), '--drop-path-mode sample'),
    (('--grad-checkpointing',), '--grad-checkpointing'),
    (('--compile', 'model'), '--compile model'),
    (('--compile', 'blocks', '--torchcompile-mode', 'reduce-overhead'), '--torchcompile-mode reduce-overhead'),
    (('--model-kwargs', 'drop_rate=0.1'), 'dropout'),
    (('--no-in-memory', '--workers', '1'), '--no-in-memory'),
    (('--model', 'sd_resnet18', '--img-size', '32', '--drop-path-scale', 'train'),
     'StochasticDepthResNet, only the networks sd_resnet*_cifar'),
])
def test_what_can_not_be_recorded_is_refused_before_anything_is_written(toy_flags, tmp_path, flags, names):
    said = refused('train.py', *toy_flags, *flags, '--cuda-graphs', '--output', tmp_path / 'output')
    assert f'--cuda-graphs can not record {names}' in said
    assert not (tmp_path / 'output').exists()


def test_networks_and_processes_that_can_not_be_recorded_are_refused():
    depth, accelerator = DepthSettings(), Accelerator(cpu=True)

    def refused_for(change=None, **kwargs):
        model = timm.create_model('sd_resnet20_cifar')
        if change is not None:
            model = change(model) or model
        with pytest.raises(UserError, match='--cuda-graphs can not record') as found:
            check_recordable(model, depth, True, SimpleNamespace(**dict(vars(accelerator), **kwargs)))
        return str(found.value)

    cpu = torch.device('cpu')
    check_recordable(timm.create_model('sd_resnet20_cifar'), depth, True, accelerator)
    assert '2 processes' in refused_for(num_processes=2, device=cpu)
    assert "'mps'" in refused_for(num_processes=1, device=torch.device('mps'))
    one = dict(num_processes=1, device=cpu)
    assert 'frozen' in refused_for(lambda model: model.fc.requires_grad_(False) and None, **one)
    assert 'SyncBatchNorm' in refused_for(nn.SyncBatchNorm.convert_sync_batchnorm, **one)


@pytest.mark.parametrize('more', [
    ('--amp', '--eval-interval', '2', '--log-gradients', '--smoothing', '0.1', '--grad-accum-steps', '2'),
    ('--drop-path', '0', '--no-channels-last')])
def test_a_whole_training_is_that_without_recording(toy_flags, tmp_path, monkeypatch, more):
    """The last batch of an epoch is partial; the learning rate changes with each update."""
    sizes, record = [], RecordedStep.record
    monkeypatch.setattr(RecordedStep, 'record', lambda step, x, target: sizes.append(len(x)) or record(step, x, target))
    for name, flags in (('eager', ()), ('recorded', ('--cuda-graphs',))):
        result = run_here('train.py', *toy_flags, *more, '--drop-path-schedule', 'uniform', *flags,
                          '--output', tmp_path, '--experiment', name)
        assert result.returncode == 0, result.stderr
        assert ('CUDA graphs' in result.stderr.splitlines()[0]) == (name == 'recorded')
    assert sizes == [8, 4]
    assert_same_run(tmp_path / 'recorded', tmp_path / 'eager')
    ours, theirs = (read_results(tmp_path / name) for name in ('recorded', 'eager'))
    assert (ours['hardware']['cuda_graphs'], theirs['hardware']['cuda_graphs']) == (True, False)
    for key in ('test_best', 'test_last', 'best_epoch', 'val_top1_err', 'changed_from_recipe'):
        assert ours[key] == theirs[key]


def test_a_run_may_go_on_with_recordings_and_without(toy_flags, tmp_path):
    for name in ('eager', 'mixed'):
        assert run_here('train.py', *toy_flags, '--output', tmp_path, '--experiment', name).returncode == 0
    RunFolder(tmp_path / 'mixed').remove_after(2)
    (tmp_path / 'mixed' / 'results.json').unlink()
    result = run_here('train.py', *toy_flags, '--output', tmp_path, '--experiment', 'mixed', '--resume', 'auto',
                      '--cuda-graphs')
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / 'mixed', tmp_path / 'eager')
