"""Rates that change over the training: standard, early and late, with what is compiled, checkpointed and resumed."""
import copy
import pickle

import pytest
import timm
import torch
from torch.utils.checkpoint import checkpoint

import timm_sd
from support.networks import pictures, toy
from timm_sd.functional import as_tensor, scaled
from timm_sd.rates import RateOverTime
from timm_sd.skippable import DropPathSlot

EARLY = dict(when='early', epochs=8, change='linear', cutoff=4)


def network(mode='batch', scale='train', rate=0.5, **kwargs):
    model = toy(drop_path_rate=rate, drop_path_schedule='uniform', drop_path_mode=mode, drop_path_scale=scale, **kwargs)
    return model.train(), timm_sd.depth_gates(model)


def rates_by_epoch(gates, epochs):
    found = []
    for epoch in range(epochs):
        gates.set_epoch(epoch)
        found.append(gates.drop_path_rates[-1])
    return found


# --- the schedule


@pytest.mark.parametrize(('when', 'change', 'cutoff', 'shares'), [
    ('standard', 'constant', None, [1, 1, 1, 1, 1, 1]),
    ('standard', 'linear', None, [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1]),
    ('early', 'constant', 4, [1, 1, 1, 1, 0, 0]),
    ('early', 'linear', 4, [1, 3 / 4, 2 / 4, 1 / 4, 0, 0]),
    ('late', 'constant', 4, [0, 0, 0, 0, 1, 1]),
    ('late', 'linear', 2, [0, 0, 1 / 4, 2 / 4, 3 / 4, 1]),
])
def test_the_rate_of_each_epoch(when, change, cutoff, shares):
    _, gates = network(rate=0.4)
    gates.set_drop_path_when(when, 6, change, cutoff)
    assert gates.drop_path_rates[-1] == pytest.approx(0.4 * shares[0])  # at once
    assert gates.mean_depth == pytest.approx(3 - 3 * 0.4 * sum(shares) / 6)
    assert rates_by_epoch(gates, 6) == pytest.approx([0.4 * share for share in shares])


def test_early_is_late_backwards():
    early, late = RateOverTime('early', 10, 'linear', 7), RateOverTime('late', 10, 'linear', 3)
    assert [early.share(epoch) for epoch in range(10)] == pytest.approx([late.share(9 - epoch) for epoch in range(10)])


@pytest.mark.parametrize(('when', 'cutoff', 'epoch', 'share'), [
    ('early', 1, -1, 1.), ('early', 4, 9, 0.), ('late', 4, 9, 1.), ('late', 4, -1, 0.)])
def test_an_epoch_that_is_none_of_the_training_has_a_rate_all_the_same(when, cutoff, epoch, share):
    assert RateOverTime(when, 6, 'linear', cutoff).share(epoch) == share


def test_a_schedule_in_depth_keeps_its_proportions():
    model = toy(drop_path_rate=0.6)
    gates = timm_sd.depth_gates(model)
    gates.set_drop_path_when('early', 4, 'linear', 2)
    gates.set_epoch(1)
    assert gates.drop_path_rates == pytest.approx([0.1, 0.2, 0.3])
    assert [slot.drop_prob for slot in model.modules() if isinstance(slot, DropPathSlot)] == list(gates.drop_path_rates)


@pytest.mark.parametrize(('flags', 'words'), [
    (dict(when='sometimes', epochs=4), "drop_path_when is 'sometimes'; choose one of standard, early, late"),
    (dict(when='early', epochs=4, cutoff=2, change='cosine'), "drop_path_change is 'cosine'"),
    (dict(when='early', epochs=4, cutoff=4), 'drop_path_cutoff is 4, and the training ends after 4 epochs'),
    (dict(when='late', epochs=4), "drop_path_cutoff is None; drop_path_when 'late' needs the epoch"),
    (dict(when='late', epochs=4, cutoff=0), 'at which dropping begins'),
    (dict(when='early', epochs=4, cutoff=-1), 'at which dropping ends'),
    (dict(when='standard', epochs=4, cutoff=2), "drop_path_when 'standard' has none"),
    (dict(when='standard', epochs=0), 'has 0 epochs'),
    (dict(when='early', epochs=4, cutoff=2.5), 'drop_path_cutoff is 2.5; it must be a whole number'),
    (dict(when='early', epochs='4', cutoff=2), "epochs is '4'"),
])
def test_bad_values_are_named_and_nothing_is_changed(flags, words):
    _, gates = network()
    with pytest.raises(ValueError, match=words) as error:
        gates.set_drop_path_when(**flags)
    assert '\n' not in str(error.value)
    assert rates_by_epoch(gates, 4) == [0.5] * 4


def test_rates_of_zero_have_no_schedule():
    _, gates = network(rate=0.)
    with pytest.raises(ValueError, match="drop_path_when is 'early', drop_path_change 'constant', but all"):
        gates.set_drop_path_when('early', 4, cutoff=2)
    gates.set_drop_path_when('standard', 4)


def test_another_rate_is_refused_until_the_schedule_is_taken_back():
    model, gates = network()
    gates.set_drop_path_when('late', 4, cutoff=2)
    slot = next(module for module in model.modules() if isinstance(module, DropPathSlot))
    for change in (lambda: gates.set_drop_path_rate(0.3), lambda: setattr(slot, 'drop_prob', 0.3)):
        with pytest.raises(ValueError, match=r'follow the epoch, late \(from epoch 2\), constant; end that by'):
            change()
    gates.set_drop_path_when('standard', 4)
    assert gates.drop_path_rates == (0.5,) * 3
    gates.set_drop_path_rate(0.3)
    assert gates.drop_path_rates == (0.3,) * 3


# --- training


@pytest.mark.parametrize('mode', timm_sd.MODES)
def test_a_loop_that_tells_no_epoch_is_an_error(mode):
    model, gates = network(mode)
    gates.set_epoch(0)
    gates.set_drop_path_when(**EARLY)
    with pytest.raises(RuntimeError, match=r'call depth_gates\(model\).set_epoch\(epoch\)'):
        model(pictures())
    model.eval()(pictures())
    gates.set_epoch(0)
    model.train()(pictures())


@pytest.mark.parametrize('mode', timm_sd.MODES)
def test_each_epoch_computes_what_a_network_of_its_rate_does(mode):
    """The reference has no schedule; its rate is set by hand."""
    model, gates = network(mode)
    twin, theirs = network(mode)
    gates.set_drop_path_when(**EARLY)
    for epoch, rate in enumerate([0.5, 0.375, 0.25, 0.125, 0., 0.]):
        gates.set_epoch(epoch)
        theirs.set_drop_path_rate(rate)
        theirs.set_epoch(epoch)
        for step in range(4):
            outputs = []
            for each in (model, twin):
                torch.manual_seed(100 * epoch + step)
                outputs.append(each(pictures(8)))
            assert torch.equal(*outputs)


@pytest.mark.parametrize(('mode', 'scale'), [('batch', 'train'), ('batch', 'eval'), ('subset', 'train'),
                                             ('sample', 'train')])
def test_evaluation_does_not_jump_where_a_rate_changes(mode, scale):
    """A training step between, so that it is not about a network of the start alone."""
    model, gates = network(mode, scale)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    gates.set_drop_path_when('late', 4, 'linear', cutoff=1)
    for epoch in range(4):
        outputs = [model.eval()(pictures())]
        before = copy.deepcopy(model.state_dict())
        gates.set_epoch(epoch)
        outputs.append(model.eval()(pictures()))
        assert torch.equal(*outputs)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        model.train()(pictures()).sum().backward()
        optimizer.step()


def test_in_epochs_at_rate_zero_every_block_runs_as_in_the_plain_network():
    for mode in timm_sd.MODES:
        model, gates = network(mode)
        plain, _ = network(rate=0.)
        plain.load_state_dict(model.state_dict())
        gates.set_drop_path_when('late', 4, cutoff=2)
        gates.set_epoch(1)
        x = pictures(8)
        assert torch.equal(model(x), plain(x))


def test_a_pass_that_was_left_half_way_has_no_gates_of_the_old_rate():
    model, gates = network()
    gates.set_drop_path_when('late', 4, cutoff=2)
    gates.set_epoch(3)
    first, second, _ = (*model.layer1, *model.layer2, *model.layer3)
    x = first(model.forward_stem(pictures()))
    gates.set_drop_path_when('standard', 4)
    gates.set_drop_path_rate(0.)
    step = gates.step
    second(x)
    assert gates.step == step + 1


@pytest.mark.parametrize('reentrant', [False, True])
def test_a_recomputation_has_the_rate_and_the_gates_of_its_pass(reentrant):
    def gradients(call):
        model, gates = network()
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        gates.set_drop_path_when(**EARLY)
        gates.set_epoch(1)
        x = [(factor * pictures()).requires_grad_() for factor in (1, 2)]
        (call(model, x[0]) * call(model, x[1])).sum().backward()
        return torch.cat([param.grad.flatten() for param in model.parameters()])
    wanted = gradients(lambda model, x: model(x))
    found = gradients(lambda model, x: checkpoint(model, x, use_reentrant=reentrant))
    assert torch.allclose(found, wanted, atol=1e-6)


# --- resumes and copies


def test_a_resume_needs_nothing_but_the_epoch():
    _, gates = network()
    gates.set_drop_path_when(**EARLY)
    expected = rates_by_epoch(gates, 8)
    _, resumed = network()
    resumed.set_drop_path_when(**EARLY)
    resumed.set_epoch(3)
    assert resumed.drop_path_rates[-1] == expected[3]


@pytest.mark.parametrize('again', [copy.deepcopy, lambda gates: pickle.loads(pickle.dumps(gates))])
def test_a_copy_goes_on_by_itself(again):
    _, gates = network()
    gates.set_drop_path_when(**EARLY)
    gates.set_epoch(2)
    other = again(gates)
    assert other.draw() == gates.draw()
    other.set_epoch(7)
    assert (gates.drop_path_rates[-1], other.drop_path_rates[-1]) == (0.25, 0.)
    assert (gates.survival_probs[-1], other.survival_probs[-1]) == (0.75, 1.)


def test_a_state_dict_holds_the_schedule():
    _, gates = network()
    gates.set_drop_path_when(**EARLY)
    gates.set_epoch(2)
    gates.draw()
    state = gates.state_dict()
    _, other = network()
    other.load_state_dict(state)
    assert (other.drop_path_rates, other.draw()) == (gates.drop_path_rates, gates.draw())
    assert rates_by_epoch(other, 8) == rates_by_epoch(gates, 8)


def test_a_state_dict_of_another_depth_leaves_the_schedule():
    _, gates = network()
    gates.set_drop_path_when(**EARLY)
    with pytest.raises(ValueError, match='2 drop path rates for 3 blocks'):
        gates.load_state_dict(dict(gates.state_dict(), drop_path_rates=[0.1, 0.2]))
    assert rates_by_epoch(gates, 5)[-1] == 0.


def test_a_state_dict_of_an_older_version_leaves_the_schedule():
    _, gates = network()
    state = gates.state_dict()
    del state['over_time']
    gates.set_drop_path_when(**EARLY)
    gates.load_state_dict(state)
    assert rates_by_epoch(gates, 5)[-1] == 0.


# --- compiled


def counting(builds):
    def backend(graph, inputs):
        builds.append(graph)
        return graph.forward
    return backend


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'mode', 'scale', 'whole'), [
    ('sd_resnet20_cifar', 'batch', 'train', False), ('sd_resnet20_cifar', 'batch', 'eval', False),
    ('sd_resnet20_cifar', 'batch', 'eval', True), ('sd_resnet20_cifar', 'sample', 'train', True),
    ('test_convnext', 'batch', 'train', False), ('test_resnet', 'batch', 'eval', False),
    ('test_convnext', 'batch', 'train', True), ('test_vit', 'batch', 'train', False),
    ('test_convnext', 'subset', 'train', False), ('sd_resnet20_cifar', 'subset', 'train', False),
])
def test_a_new_rate_is_no_new_build(name, mode, scale, whole):
    """In mode 'subset' it is another size of the batch, which the second build has for all but the whole batch."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    if name.startswith('sd_'):
        model = timm.create_model(name, drop_path_mode=mode, drop_path_scale=scale, drop_path_schedule='uniform')
    else:
        model = timm_sd.add_stochastic_depth(timm.create_model(name), 0.5, 'uniform', mode=mode, scale=scale)
    twin, builds = copy.deepcopy(model.train()), []
    if whole:
        model.compile(backend=counting(builds))
    else:
        timm_sd.compile_blocks(model, backend=counting(builds))
    gates, theirs = timm_sd.depth_gates(model), timm_sd.depth_gates(twin)
    x = torch.randn(16 if mode == 'subset' else 4, *model.pretrained_cfg['input_size'])
    numbers = []
    for each in (gates, theirs):
        each.set_drop_path_when('early', 14, 'linear', 12)
    for epoch in (*range(14), 13):
        for each in (gates, theirs):
            each.set_epoch(epoch)
        for _ in range(4):
            y = model(x)
            y.sum().backward()
            if mode != 'sample':  # whose masks are others where it is compiled
                assert torch.allclose(y, twin(x), atol=1e-4)
        numbers.append(len(builds))
    assert numbers[2] == numbers[11 if mode == 'subset' else -1], numbers
    assert builds


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
def test_compiled_blocks_scale_as_exactly_as_others(dtype):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = timm_sd.add_stochastic_depth(timm.create_model('test_convnext'), 0.3).train().to(dtype)
    twin, x = copy.deepcopy(model), torch.randn(2, *model.pretrained_cfg['input_size'], dtype=dtype)
    timm_sd.compile_blocks(model, backend='eager')
    for _ in range(4):
        assert torch.equal(model(x), twin(x))


def test_a_factor_is_not_rounded_to_16_bits():
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(scaled(x, torch.tensor(1.3)), (1.3 * x.float()).bfloat16())


def test_a_factor_may_be_made_anywhere():
    """It is used again elsewhere."""
    with torch.inference_mode():
        factor = as_tensor(1.234, torch.ones(1))
    x = torch.ones(3, requires_grad=True)
    scaled(x, factor).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 1.234))
    double = torch.ones(1, dtype=torch.float64)
    with torch.device('meta'):
        assert as_tensor(1.235, double).item() == 1.235


def test_the_tensor_of_what_is_compiled_stays():
    _, gates = network('sample')
    tensor = gates.survival_probs
    gates.set_drop_path_when(**EARLY)
    gates.set_epoch(1)
    assert gates.survival_probs is tensor
    assert tensor.tolist() == [1 - 0.375] * 3


@pytest.mark.slow
@pytest.mark.parametrize('keeps', [True, False])
def test_compiled_masks_of_samples_have_the_rate_of_their_epoch(keeps):
    torch._dynamo.reset()
    gates = timm_sd.DepthGates(1, 0.4, mode='sample')
    gates.set_drop_path_when('early', 3, 'linear', 2)
    slot = DropPathSlot(gates, 0).train()
    slot.scale_by_keep = keeps
    compiled = torch.compile(slot, backend='eager')
    for epoch, rate in enumerate((0.4, 0.2, 0.)):
        gates.set_epoch(epoch)
        y = compiled(torch.ones(20_000, 2, 3))
        kept = y[:, 0, 0] != 0
        assert torch.equal(y, torch.where(kept, 1 / (1 - rate) if keeps else 1., 0.)[:, None, None].expand_as(y))
        assert abs(kept.float().mean().item() - (1 - rate)) <= 4.5 * (rate * (1 - rate) / 20_000) ** 0.5
