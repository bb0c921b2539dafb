"""Two real processes (gloo): the same gates and parameters on both, the update of one process, kill -9 of a rank."""
import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator, debug_launcher
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from tqdm import tqdm

import timm_sd

BENCH = Path(__file__).parent.parent / 'bench'
sys.path.insert(0, str(BENCH))
from engine import autocast, train_epoch  # noqa: E402
from in_memory import ImageSet, MemoryBatches  # noqa: E402

# --- What the two ranks do. Assertions fail there, and debug_launcher passes a failure on.


def stay_equal(compiled=False, steps=50):
    """Ranks see different data; gates and parameters stay bit-equal, and a closed block's gradient is zero."""
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    torch.manual_seed(accelerator.process_index)  # different weights and data on each rank; DDP aligns the weights
    network = timm.create_model('sd_resnet20_cifar').train()
    if compiled:
        timm_sd.compile_blocks(network, backend='aot_eager')
    model, optimizer = accelerator.prepare(network, torch.optim.SGD(network.parameters(), 0.1, 0.9, weight_decay=1e-4))
    closed = 0
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(torch.randn(4, 3, 16, 16)), torch.randint(10, (4,)))
        accelerator.backward(loss)
        gates = timm_sd.depth_gates(model)
        blocks = [*network.layer1, *network.layer2, *network.layer3]
        for block, is_open in zip(blocks, gates.open, strict=True):
            norms = torch.stack([p.grad.abs().max() for p in block.parameters()])
            assert (norms > 0).all() if is_open else (norms == 0).all()
            closed += not is_open
        optimizer.step()
        both = accelerator.gather(torch.tensor([gates.open]))
        assert torch.equal(both[0], both[1])
        flat = accelerator.gather(torch.cat([p.detach().flatten() for p in network.parameters()])[None])
        assert torch.equal(flat[0], flat[1])
    assert closed > steps


def stay_equal_compiled():
    stay_equal(compiled=True, steps=10)


def freeze_statistics(network):
    """Batch norm in evaluation mode for good: what one process sees is then what two see together."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True, module=module: module


def update_as_one_process(grad_accum_steps):
    """An epoch of 2 x 4 images against a plain loop over batches of 8; 37 images leave an uneven last batch."""
    accelerator = Accelerator(cpu=True)
    generator = torch.Generator().manual_seed(0)
    data = ImageSet(torch.randint(256, (37, 3, 16, 16), dtype=torch.uint8, generator=generator),
                    torch.randint(10, (37,), generator=generator), [str(n) for n in range(10)])
    augmentation = dict(mean=(0.5,) * 3, std=(0.25,) * 3, train=True, crop_padding=2, hflip=0.5, seed=3)
    torch.manual_seed(0)
    network = timm.create_model('sd_resnet20_cifar').train()
    for _ in range(20):
        network(torch.randn(16, 3, 16, 16))
    timm_sd.depth_gates(network).set_epoch(0)
    freeze_statistics(network)
    twin = copy.deepcopy(network).train()
    freeze_statistics(twin)

    model, optimizer = accelerator.prepare(network, torch.optim.SGD(network.parameters(), 0.05, 0.9))
    reductions = []
    model.register_comm_hook(None, lambda _, bucket: reductions.append(bucket.index()) or allreduce_hook(None, bucket))
    batches = MemoryBatches(data, 4, rank=accelerator.process_index, world_size=2, **augmentation)
    scheduler, _ = create_scheduler_v2(optimizer, 'constant', 1, updates_per_epoch=len(batches))
    loss = train_epoch(model, batches, optimizer, scheduler, accelerator, autocast(accelerator.device, False), 0,
                       tqdm(disable=True), grad_accum_steps=grad_accum_steps)
    assert reductions.count(0) == -(-5 // grad_accum_steps)  # no_sync: the ranks speak once an update

    optimizer = torch.optim.SGD(twin.parameters(), 0.05, 0.9)
    losses, expected = [], 0.
    for step, (x, target, _) in enumerate(MemoryBatches(data, 8, **augmentation)):
        losses.append(F.cross_entropy(twin(x), target, reduction='none'))
        if (step + 1) % grad_accum_steps == 0 or step == 4:
            images = torch.cat(losses)
            optimizer.zero_grad()
            images.mean().backward()
            optimizer.step()
            expected += images.sum().item() / 37
            losses.clear()
    assert timm_sd.depth_gates(network).state_dict() == timm_sd.depth_gates(twin).state_dict()
    assert loss == pytest.approx(expected, rel=1e-5)
    for ours, theirs in zip(network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def update_every_batch():
    update_as_one_process(1)


def update_every_second_batch():
    update_as_one_process(2)


@pytest.mark.parametrize('what', [stay_equal, stay_equal_compiled, update_every_batch, update_every_second_batch])
def test_on_two_ranks(what):
    # in a process of its own: debug_launcher forks, which a process whose OpenMP threads are running doesn't survive
    result = subprocess.run([sys.executable, __file__, what.__name__], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


# --- accelerate launch bench/train.py, by the README's lines

TRAIN = ['--model', 'sd_resnet20_cifar', '--img-size', '16', '--epochs', '3', '--no-amp', '--threads', '1']


def free_port():
    import socket
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return free.getsockname()[1]


def launch(processes, output, *launcher_args, batch_size=32, port=None):
    """One launcher; `processes` is what --require-processes asks for."""
    launcher = ['accelerate', 'launch', '--multi_gpu', '--num_processes', str(processes), '--mixed_precision', 'no',
                '--dynamo_backend', 'no', '--main_process_port', str(port or free_port()), *launcher_args]
    if not launcher_args:
        launcher += ['--num_machines', '1']
    if processes == 1:
        launcher = [sys.executable]
    args = [*TRAIN, '-b', str(batch_size), '--require-processes', str(processes), '--output', str(output),
            '--experiment', 'a', '--resume', 'auto']
    return subprocess.Popen(
        [*launcher, str(BENCH / 'train.py'), *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=dict(os.environ, ACCELERATE_USE_CPU='true'))


def done(process):
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    return json.loads(stdout.splitlines()[-1]), stderr


def ranks(launcher):
    """Process ids of the ranks that a launcher started, in their order."""
    children = Path(f'/proc/{launcher.pid}/task/{launcher.pid}/children')
    return [int(pid) for pid in children.read_text().split()]


def test_killed_rank_ends_the_run_and_resume_goes_on_exactly(tmp_path):
    # undisturbed: two "machines" of one process each
    port = free_port()
    machines = [launch(2, tmp_path / 'whole', '--num_machines', '2', '--machine_rank', str(rank),
                       '--main_process_ip', '127.0.0.1', port=port) for rank in range(2)]
    (whole, header), _ = [done(machine) if rank == 0 else machine.communicate(timeout=300)
                          for rank, machine in enumerate(machines)]
    assert '2 processes x batch 32' in header

    # disturbed: one machine of two processes, the second of which is killed after the first epoch
    disturbed = launch(2, tmp_path / 'killed')
    checkpoints = tmp_path / 'killed' / 'a' / 'checkpoints'
    while not list(checkpoints.glob('checkpoint-*.pt')):
        assert disturbed.poll() is None, disturbed.communicate()[1]
        time.sleep(0.05)
    start = time.monotonic()
    os.kill(ranks(disturbed)[1], signal.SIGKILL)
    _, stderr = disturbed.communicate(timeout=60)
    assert disturbed.returncode != 0
    assert 'Signal 9 (SIGKILL)' in stderr
    assert time.monotonic() - start < 60
    assert not (tmp_path / 'killed' / 'a' / 'results.json').exists()

    # go on with one process, on a copy: the same global batch, so the same order and gates
    subprocess.run(['cp', '-r', str(tmp_path / 'killed'), str(tmp_path / 'one')], check=True)
    alone, header = done(launch(1, tmp_path / 'one', batch_size=64))
    assert '1 process x batch 64' in header

    resumed, _ = done(launch(2, tmp_path / 'killed'))
    ours, theirs = (timm.models.load_state_dict(tmp_path / name / 'a' / 'model.safetensors')
                    for name in ('killed', 'whole'))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert resumed['test_last'] == whole['test_last']

    # batch norm sees 64 images there and 32 here, so the rest of the way is alike, not equal
    rows = [[line.split(',') for line in (tmp_path / name / 'a' / 'summary.csv').read_text().splitlines()]
            for name in ('one', 'whole')]
    assert rows[0][1][:5] == rows[1][1][:5]
    assert float(rows[0][-1][1]) == pytest.approx(float(rows[1][-1][1]), rel=0.2)
    assert alone['epochs'] == 3


def test_strangers_are_told_and_refused(tmp_path):
    """torchrun without Accelerate's variables: two processes that know nothing of each other."""
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2', '--master_port',
                str(free_port()), str(BENCH / 'train.py'), *TRAIN, '--output', str(tmp_path)]
    env = {key: value for key, value in os.environ.items() if not key.startswith('ACCELERATE')}
    result = subprocess.run([*torchrun, '--require-processes', '2'], capture_output=True, text=True, timeout=120,
                            env=dict(env, CUDA_VISIBLE_DEVICES=''))
    assert result.returncode != 0
    assert 'train.py: error: --require-processes is 2, but here train 1 process (of 2 started, unrelated' \
        in result.stderr
    assert not list(tmp_path.iterdir())


if __name__ == '__main__':
    debug_launcher(globals()[sys.argv[1]], num_processes=2)
