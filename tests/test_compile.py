"""compile_blocks: the numbers of eager, one build for every pattern of gates, copies and a resume that go on."""
import copy
import shutil

import pytest
import timm
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import timm_sd
from test_train import SMALL, assert_same_run, bench

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ('g++', 'c++', 'clang++'))),
                                    reason='torch.compile on a CPU needs a C++ compiler')


def train(model, batches, amp):
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


@needs_compiler
@pytest.mark.parametrize(('checkpointing', 'amp'), [(False, True), (True, False)])
def test_compiled_blocks_train_as_eager_ones_without_recompilation(checkpointing, amp):
    torch._dynamo.reset()
    counters.clear()
    generator = torch.Generator().manual_seed(0)
    # channels_last, and the last batch of an epoch is a smaller one
    batches = [(torch.randn(size, 3, 16, 16, generator=generator).to(memory_format=torch.channels_last),
                torch.randint(10, (size,), generator=generator)) for size in (8, 8, 5) * 4]
    torch.manual_seed(0)
    eager = timm.create_model('sd_resnet20_cifar').to(memory_format=torch.channels_last).train()
    if checkpointing:
        eager.set_grad_checkpointing()
    model = copy.deepcopy(eager)
    timm_sd.compile_blocks(model)

    warm_up = copy.deepcopy(model)
    timm_sd.depth_gates(warm_up).draw = lambda: None  # all open: each shape is built once for either batch size
    train(warm_up, batches[1:3], amp)
    graphs = counters['stats']['unique_graphs']
    assert graphs == 10 * (2 if checkpointing else 1)  # five shapes of branch x two sizes, and their recomputation

    losses = train(model, batches, amp)
    assert timm_sd.depth_gates(model).step == 12
    assert counters['stats']['unique_graphs'] == graphs
    assert losses == pytest.approx(train(eager, batches, amp), rel=0.02 if amp else 1e-3)
    for ours, theirs in zip(model.buffers(), eager.buffers(), strict=True):
        if ours.dtype == torch.int64:
            assert torch.equal(ours, theirs)  # num_batches_tracked: of open blocks alone, and once where recomputed


def test_a_copy_runs_on_its_own_weights():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = timm.create_model('sd_resnet20_cifar').train()
    timm_sd.depth_gates(model).draw = lambda: None  # all open
    timm_sd.compile_blocks(model, backend='aot_eager')
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.layer3[2].bn2.bias.add_(1.)
    x = torch.randn(4, 3, 16, 16)
    ours, theirs = twin.forward_features(x), model.forward_features(x)
    torch.testing.assert_close(ours[theirs > 0], theirs[theirs > 0] + 2.)  # 1 / p_L of it


@needs_compiler
def test_resume_of_a_compiled_run_is_exact(tmp_path):
    args = [*SMALL, '--epochs', '2', '--compile', 'blocks', '--output', tmp_path, '--resume', 'auto', '--experiment']
    whole = bench('train.py', *args, 'a')
    assert whole.returncode == 0, whole.stderr
    assert '(compiled blocks)' in whole.stderr
    shutil.copytree(tmp_path / 'a', tmp_path / 'b')
    for name in ('results.json', 'model.safetensors', 'summary.csv', 'checkpoints/checkpoint-0002.pt'):
        (tmp_path / 'b' / name).unlink()
    resumed = bench('train.py', *args, 'b')
    assert resumed.returncode == 0, resumed.stderr
    assert 'epoch   1:' not in resumed.stderr
    assert_same_run(tmp_path / 'b', tmp_path / 'a')
