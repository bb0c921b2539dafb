"""Two real processes (gloo): the same gates and parameters on both, though they see different data."""
import pytest
import torch
import torch.nn.functional as F

import timm_sd
from support.kinds import added
from support.networks import blocks_of, toy

pytestmark = pytest.mark.slow

# --- What the two ranks do; accelerate is imported there, for the package doesn't need it.


def stay_equal(network, blocks, size, steps, lr=0.1):
    """Gates and parameters stay bit-equal, and a closed block's gradient is zero, not None.

    Args:
        network: Makes the network; DistributedDataParallel aligns the weights.
        blocks: The residual blocks of the network.
        size: Of the images.
        steps: How many updates.
        lr: Learning rate.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    network = network()
    torch.manual_seed(accelerator.process_index)  # different data on each rank
    with torch.no_grad():
        for param in network.parameters():  # and different weights
            param.add_(0.01 * torch.randn_like(param))
    model, optimizer = accelerator.prepare(network, torch.optim.SGD(network.parameters(), lr, 0.9, weight_decay=1e-4))
    gates = timm_sd.depth_gates(model)
    closed = 0
    for step in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(torch.randn(4, 3, size, size)), torch.randint(10, (4,)))
        accelerator.backward(loss)
        assert gates.step == step + 1
        for block, is_open in zip(blocks(network), gates.open, strict=True):
            largest = torch.stack([param.grad.abs().max() for param in block.parameters()])
            assert (largest > 0).all() if is_open else (largest == 0).all()
            closed += not is_open
        optimizer.step()
        both = accelerator.gather(torch.tensor([gates.open]))
        assert torch.equal(both[0], both[1])
        flat = accelerator.gather(torch.cat([param.detach().flatten() for param in network.parameters()])[None])
        assert torch.equal(flat[0], flat[1])
        losses = accelerator.gather(loss.detach()[None])
        assert losses[0] != losses[1]
    assert closed > steps


def the_papers_network():
    stay_equal(lambda: toy(3).train(), blocks_of, 8, steps=50)


def its_compiled_blocks():
    def network():
        model = toy(drop_path_schedule='uniform').train()
        timm_sd.compile_blocks(model, backend='aot_eager')
        return model

    stay_equal(network, blocks_of, 8, steps=10)


def subsets():
    """Each rank draws its samples by the same rule, of its own images; no block is closed, so no gradient is zero."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    torch.manual_seed(accelerator.process_index)
    network = toy(drop_path_mode='subset').train()
    model, optimizer = accelerator.prepare(network, torch.optim.SGD(network.parameters(), 0.1))
    for _ in range(5):
        optimizer.zero_grad()
        accelerator.backward(model(torch.randn(4, 3, 8, 8)).logsumexp(1).sum())
        optimizer.step()
        flat = accelerator.gather(torch.cat([param.detach().flatten() for param in network.parameters()])[None])
        assert torch.equal(flat[0], flat[1])


def a_transformer_of_timms():
    stay_equal(lambda: added('test_vit', schedule='uniform').train(), lambda model: model.blocks, 64, steps=10, lr=0.01)


def test_two_ranks_stay_equal():
    from support.ranks import on_two_ranks

    on_two_ranks(the_papers_network, its_compiled_blocks, subsets, a_transformer_of_timms)
