"""Two real processes (gloo): the same gates and parameters on both, without find_unused_parameters."""
import subprocess
import sys

import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator, debug_launcher

import timm_sd


def train_ten_steps():
    """Runs on each rank; asserts there, and debug_launcher passes a failure on."""
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    torch.manual_seed(accelerator.process_index)  # different weights and data on each rank; DDP aligns the weights
    network = timm.create_model('sd_resnet20_cifar').train()
    model, optimizer = accelerator.prepare(network, torch.optim.SGD(network.parameters(), 0.1, 0.9, weight_decay=1e-4))
    closed = 0
    for _ in range(10):
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
    assert closed > 10


def test_two_processes_stay_equal():
    # in a process of its own: debug_launcher forks, which a process whose OpenMP threads are running doesn't survive
    result = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


if __name__ == '__main__':
    debug_launcher(train_ten_steps, num_processes=2)
