"""torch.compile: one build for every pattern of gates, the numbers of eager, copies and a resume that go on."""
import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import timm_sd
from support.kinds import added, images
from support.networks import force, pictures, toy

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ('g++', 'c++', 'clang++'))),
                                    reason='torch.compile on a CPU needs a C++ compiler')


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs():
    return counters['stats']['unique_graphs']


def train(model, batches, amp=False):
    """Losses of SGD steps; the gates are those that the model draws."""
    optimizer = torch.optim.SGD(model.parameters(), 0.02, 0.9)
    losses = []
    for x, target in batches:
        with torch.autocast('cpu', torch.bfloat16, enabled=amp):
            logits = model(x)
        loss = F.cross_entropy(logits.float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_same_training(blocks_per_stage, sizes, expected_graphs, amp=False, checkpointing=False, **options):
    """Trains a compiled and an eager twin on batches of these sizes; all that is built is built in the first of each.

    Channels last, as a run on a card has it.
    """
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(size, 3, 8, 8, generator=generator).to(memory_format=torch.channels_last),
                torch.randint(10, (size,), generator=generator)) for size in sizes]
    eager = toy(blocks_per_stage, drop_path_schedule='uniform').to(memory_format=torch.channels_last).train()
    if checkpointing:
        eager.set_grad_checkpointing()
    model = copy.deepcopy(eager)
    timm_sd.compile_blocks(model, **options)

    warm_up = copy.deepcopy(model)
    force(warm_up, [True] * 3 * blocks_per_stage)  # each shape is built once for either batch size
    train(warm_up, {len(x): (x, target) for x, target in batches}.values(), amp)
    assert graphs() == expected_graphs

    losses = train(model, batches, amp)
    gates = timm_sd.depth_gates(model)
    assert gates.step == len(batches)
    assert graphs() == expected_graphs
    assert losses == pytest.approx(train(eager, batches, amp), rel=0.02 if amp else 1e-3)
    for ours, theirs in zip(model.buffers(), eager.buffers(), strict=True):
        if ours.dtype == torch.int64:
            assert torch.equal(ours, theirs)  # num_batches_tracked: of open blocks alone, and once where recomputed
    tracked = [int(block.bn1.num_batches_tracked) for block in (model.layer1[0], model.layer2[0], model.layer3[0])]
    assert min(tracked) > 0
    assert max(tracked) < len(batches)  # none was open each time, so the patterns did differ


@pytest.mark.parametrize(('blocks_per_stage', 'sizes', 'expected_graphs'), [
    (2, (8,) * 12, 5),  # six blocks of five shapes: two share a build
    pytest.param(1, (8, 8, 5) * 4, 6, marks=pytest.mark.slow),  # the last batch of an epoch is smaller
])
def test_compiled_blocks_train_as_eager_ones_without_recompilation(blocks_per_stage, sizes, expected_graphs):
    assert_same_training(blocks_per_stage, sizes, expected_graphs, backend='aot_eager')


def test_compiled_blocks_are_recomputed_without_recompilation():
    # three shapes, each built once more for the recomputation
    assert_same_training(1, (8,) * 8, expected_graphs=6, checkpointing=True, backend='aot_eager')


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(('sizes', 'expected_graphs', 'kwargs'), [
    ((8,) * 8, 3, dict(amp=True)), ((8, 8, 5) * 4, 12, dict(checkpointing=True))])
def test_code_of_the_compiler_trains_as_eager_blocks_without_recompilation(sizes, expected_graphs, kwargs):
    assert_same_training(1, sizes, expected_graphs, **kwargs)


def test_a_copy_runs_on_its_own_weights():
    model = toy(drop_path_schedule='uniform').train()
    force(model, [True] * 3)
    timm_sd.compile_blocks(model, backend='aot_eager')
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.layer3[0].bn2.bias.add_(1.)
    ours, theirs = twin.forward_features(pictures()), model.forward_features(pictures())
    torch.testing.assert_close(ours[theirs > 0], theirs[theirs > 0] + 2.)  # 1 / p_L of it


def test_a_network_whose_blocks_can_not_be_skipped_is_refused():
    for model in (timm_sd.remove_stochastic_depth(toy()), toy(drop_path_mode='sample')):
        with pytest.raises(ValueError, match='no block has a gate'):
            timm_sd.compile_blocks(model)


def test_a_network_made_at_rate_zero_can_be_compiled():
    model = toy(drop_path_rate=0.).train()
    twin = copy.deepcopy(model)
    timm_sd.compile_blocks(model, backend='aot_eager')
    torch.testing.assert_close(model(pictures()), twin(pictures()))
    assert graphs() == 3


@pytest.mark.parametrize('mode', ['batch', 'subset'])
def test_blocks_of_timms_networks_compile_for_themselves(mode):
    def make():
        return added('deit_tiny_patch16_224', schedule='uniform', mode=mode).train()

    model, twin = make(), make()
    timm_sd.compile_blocks(model, backend='aot_eager')
    patterns = set()
    for step in range(12):
        torch.testing.assert_close(model(images(model)), twin(images(model)), rtol=1e-4, atol=1e-5)
        patterns.add(tuple(timm_sd.depth_gates(model).open))
        if step == 7:
            built = graphs()
    assert graphs() == built > 0
    assert len(patterns) > 3
    assert not counters['graph_break']


def test_evaluation_compiles_into_one_graph():
    for model in (toy().eval(), added('deit_tiny_patch16_224').eval()):
        x = images(model) if hasattr(model, 'patch_embed') else pictures()
        compiled = torch.compile(model, backend='eager', fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize(('make', 'different'), [
    # more patterns than dynamo's recompile limit
    pytest.param(lambda: toy(2, drop_path_schedule='uniform'), 9, marks=pytest.mark.slow),
    # half of the eight patterns of three blocks
    (lambda: added('deit_tiny_patch16_224', schedule='uniform'), 4),
])
def test_whole_model_compile_does_not_freeze_a_draw(make, different):
    model, twin = make().train(), make().train()
    x = images(model) if hasattr(model, 'patch_embed') else pictures()
    compiled = torch.compile(model, backend='eager')
    patterns = set()
    for _ in range(12):
        torch.testing.assert_close(compiled(x), twin(x))
        patterns.add(tuple(timm_sd.depth_gates(model).open))
    assert len(patterns) >= different
    assert counters['graph_break']
    assert all('<function _run_gated at' in reason for reason in counters['graph_break'])  # at the gates alone
    assert timm_sd.depth_gates(model).step == 12


@pytest.mark.parametrize('rate', [0., 0.5])
def test_a_network_that_recomputes_its_branches_is_compiled(rate):
    model, twin = toy(drop_path_rate=rate).train(), toy(drop_path_rate=rate).train()
    model.set_grad_checkpointing()
    compiled = torch.compile(model, backend='eager')
    for _ in range(3):
        for net in (compiled, twin):
            net.zero_grad()
            net(pictures()).square().sum().backward()
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


@needs_compiler
@pytest.mark.slow
def test_resume_of_a_compiled_run_is_exact(tmp_path):
    from support.commands import SMALL, assert_same_run, run_here  # the harness isn't needed for the rest

    # three batches of 469 of the 1407 images are left to train on: another size would be compiled too
    args = [*SMALL, '--epochs', '2', '--val-per-class', '3', '-b', '469', '--compile', 'blocks', '--output', tmp_path,
            '--resume', 'auto', '--experiment']
    whole = run_here('train.py', *args, 'a')
    assert whole.returncode == 0, whole.stderr
    assert '(compiled blocks)' in whole.stderr
    shutil.copytree(tmp_path / 'a', tmp_path / 'b')
    for name in ('results.json', 'model.safetensors', 'summary.csv', 'checkpoints/checkpoint-0002.pt'):
        (tmp_path / 'b' / name).unlink()
    torch._dynamo.reset()  # compiles anew, as another process does
    resumed = run_here('train.py', *args, 'b')
    assert resumed.returncode == 0, resumed.stderr
    assert 'epoch   1:' not in resumed.stderr
    assert_same_run(tmp_path / 'b', tmp_path / 'a')
