"""Several threads and several networks: no forward pass mixes draws, and what can't be kept apart is refused."""
import copy
import pickle
import sys
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import timm_sd
from support.networks import blocks_of, pictures, toy

MODES = pytest.mark.parametrize('mode', ['batch', 'subset'])
REPLICA = r'\A[^\n]*DataParallel[^\n]*\Z'


def network(mode='batch', blocks_per_stage=3, **kwargs):
    """A network whose batch norm is frozen, so a pass is a function of its draw and its input."""
    model = toy(blocks_per_stage, drop_path_mode=mode, drop_path_schedule='uniform', **kwargs).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


@pytest.fixture
def restless():
    """Threads take turns after every few bytecodes."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def in_threads(*works):
    """Runs functions at once, each in a thread of its own; returns the exceptions they raised."""
    errors, start = [], threading.Barrier(len(works))

    def run(work):
        start.wait()
        try:
            work()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return errors


@MODES
@pytest.mark.parametrize('gradients', [False, True])
def test_passes_in_threads_do_not_mix_draws(mode, gradients, restless):
    """Each pass is one that a single thread would have run, with the samples and the scale of its own batch size."""
    model, sizes, passes = network(mode, 6), (3, 4, 7), 6
    found = {size: [] for size in sizes}

    def work(size):
        for _ in range(passes):
            with torch.set_grad_enabled(gradients):
                found[size].append(model(pictures(size)).detach())

    assert in_threads(*(lambda size=size: work(size) for size in sizes)) == []
    alone = network(mode, 6)
    gates, steps = timm_sd.depth_gates(alone), []
    for step in range(passes * len(sizes)):
        matches = []
        for size in sizes:
            gates.set_epoch(0)
            gates.step = step
            expected = alone(pictures(size)).detach()
            matches += [size for y in found[size] if torch.allclose(y, expected, rtol=1e-5, atol=1e-5)]
        steps.append(len(matches))
    assert timm_sd.depth_gates(model).step == passes * len(sizes)
    assert steps == [1] * len(steps)  # each draw was run once, whole


def test_blocks_that_run_in_threads_are_those_of_one_draw(restless):
    model, passes = network(blocks_per_stage=9), []
    blocks, local = blocks_of(model), threading.local()
    for index, block in enumerate(blocks):
        block.conv1.register_forward_hook(lambda *_, index=index: local.ran.add(index))

    def work():
        for _ in range(8):
            local.ran = set()
            model(pictures(1, 4))
            passes.append(tuple(index in local.ran for index in range(len(blocks))))

    assert in_threads(*[work] * 3) == []
    gates = timm_sd.depth_gates(network(blocks_per_stage=9))
    assert sorted(passes) == sorted(tuple(gates.draw()) for _ in range(24))


@pytest.mark.parametrize('reentrant', [False, True])
@MODES
def test_checkpointing_in_two_threads_is_an_error(mode, reentrant):
    model, one_at_a_time, both_forward = network(mode), threading.Lock(), threading.Barrier(2, timeout=60)

    def work():
        with one_at_a_time:
            loss = checkpoint(model, pictures().requires_grad_(), use_reentrant=reentrant).sum()
        both_forward.wait()
        loss.backward()

    errors = in_threads(work, work)
    assert len(errors) == 2
    for error in errors:
        assert isinstance(error, RuntimeError)
        assert 'several threads' in str(error)
        assert '\n' not in str(error)


def test_a_thread_that_has_ended_is_forgotten_at_the_next_epoch():
    model = network()

    def step():
        checkpoint(model, pictures().requires_grad_(), use_reentrant=True).sum().backward()

    assert in_threads(step) == []
    with pytest.raises(RuntimeError, match='call set_epoch when the others end'):
        step()
    timm_sd.depth_gates(model).set_epoch(1)
    step()


@pytest.mark.parametrize('reentrant', [False, True])
def test_checkpointing_in_a_thread_that_is_not_the_first_one(reentrant):
    def gradients(call):
        model = network()
        for _ in range(2):
            call(model, pictures().requires_grad_()).square().sum().backward()
        return [param.grad for param in model.parameters()]

    found = []
    assert in_threads(lambda: found.extend(
        gradients(lambda model, x: checkpoint(model, x, use_reentrant=reentrant)))) == []
    for ours, theirs in zip(found, gradients(lambda model, x: model(x)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_made_while_a_thread_trains_are_whole(duplicate, restless):
    model, copies, stop = network(), [], threading.Event()

    def train():
        while not stop.is_set():
            with torch.no_grad():
                checkpoint(model, pictures(2), use_reentrant=True)
            checkpoint(model, pictures(2), use_reentrant=False)

    def duplicate_often():
        try:
            copies.extend(duplicate(model) for _ in range(10))
        finally:
            stop.set()

    assert in_threads(train, duplicate_often) == []
    x = pictures()
    for twin in copies:
        gates = timm_sd.depth_gates(twin)
        assert gates is not timm_sd.depth_gates(model)
        step, fresh = gates.step, network()
        timm_sd.depth_gates(fresh).load_state_dict(gates.state_dict())
        assert torch.equal(twin(x), fresh(x))
        assert gates.step == step + 1


def replica_of(module):
    """What nn.DataParallel makes for each device of a module and all within it."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        setattr(replica, name, replica_of(child))
    for name, param in module._parameters.items():
        setattr(replica, name, param.view_as(param) if param is not None else None)
    return replica


@MODES
@pytest.mark.parametrize('scale', ['train', 'eval'])
def test_replicas_of_data_parallel_are_refused_in_training(mode, scale):
    model = network(mode, drop_path_scale=scale if mode == 'batch' else 'train')
    with pytest.raises(RuntimeError, match=REPLICA):
        replica_of(model)(pictures())


def test_replicas_of_data_parallel_evaluate_and_run_without_drops():
    x = pictures()
    model = network().eval()
    assert torch.equal(replica_of(model)(x), model(x))
    model = network(drop_path_rate=0.)
    assert torch.equal(replica_of(model)(x), model(x))


def test_data_parallel_without_several_devices_is_the_network():
    model, twin = nn.DataParallel(network()), network()
    assert timm_sd.depth_gates(model) is timm_sd.depth_gates(model.module)
    for _ in range(3):
        assert torch.equal(model(pictures()), twin(pictures()))


def draws_of(model, torch_seed):
    torch.manual_seed(torch_seed)
    gates, draws = timm_sd.depth_gates(model), []
    for _ in range(8):
        model(pictures(1, 4))
        draws.append(tuple(gates.open))
    return draws


def test_two_networks_of_one_seed_draw_the_same_whatever_torchs_seed():
    assert draws_of(network(), 1) == draws_of(network(), 2)
    assert draws_of(network(drop_path_seed=5), 1) == draws_of(network(drop_path_seed=5), 2)


def test_two_networks_of_other_seeds_draw_on_their_own():
    one, two = draws_of(network(drop_path_seed=5), 1), draws_of(network(drop_path_seed=6), 1)
    assert all(ours != theirs for ours, theirs in zip(one, two, strict=True))


@pytest.mark.parametrize('both', [
    lambda: nn.ModuleList([toy(), toy()]),
    lambda: (lambda model: nn.Sequential(model, copy.deepcopy(model.layer3)))(toy())])
def test_the_gates_of_two_networks_are_asked_for_one_by_one(both):
    with pytest.raises(ValueError, match=r'\A\w+ holds 2 networks with gates of their own[^\n]*\Z'):
        timm_sd.depth_gates(both())


def test_two_networks_that_take_turns_do_not_meet():
    models = [network(drop_path_seed=5), network(drop_path_seed=6)]
    expected = [draws_of(network(drop_path_seed=seed), 1) for seed in (5, 6)]
    found = [[], []]
    for _ in range(8):
        for model, draws in zip(models, found, strict=True):
            model(pictures(1, 4))
            draws.append(tuple(timm_sd.depth_gates(model).open))
    assert found == expected
