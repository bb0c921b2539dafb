"""Two real processes (gloo): the same gates and parameters on both, though they see different data.

Sharded by FSDP2 or copied by DistributedDataParallel, two ranks train the network that one process trains on the whole
batch.
"""
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

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


# --- Two ranks against one process


def equal_one_process(network, blocks, size, wrap, call=lambda model, x: model(x), steps=8,
                      frozen=True):
    """Two ranks that have half of each batch end with the parameters of one process, which has all of it.

    Three passes come first, so that batch norm's statistics are not those of the start.

    Args:
        network: Makes the network.
        blocks: The residual blocks of the network.
        size: Of the images.
        wrap: Lets a network and its blocks be trained by two ranks.
        call: The forward pass.
        steps: How many updates.
        frozen: Freeze batch norm, for each rank would see the statistics of its own half.
    """
    from accelerate import Accelerator

    rank = Accelerator(cpu=True).process_index
    generator = torch.Generator().manual_seed(0)  # the same numbers on both ranks
    model = network().train()
    for _ in range(3):
        model(torch.randn(8, 3, size, size, generator=generator))
    timm_sd.depth_gates(model).set_epoch(1)
    for module in model.modules():
        if frozen and isinstance(module, nn.BatchNorm2d):
            module.eval()
    twin = copy.deepcopy(model)
    model = wrap(model, blocks(model))
    optimizers = [torch.optim.SGD(net.parameters(), 0.02, 0.9, weight_decay=1e-2) for net in (model, twin)]
    gates, closed = timm_sd.depth_gates(model), []
    for _ in range(steps):
        x, y = torch.randn(8, 3, size, size, generator=generator), torch.randint(10, (8,), generator=generator)
        for net, half, optimizer in zip((model, twin), (slice(4 * rank, 4 * rank + 4), slice(8)), optimizers,
                                        strict=True):
            optimizer.zero_grad()
            F.cross_entropy(call(net, x[half]), y[half]).backward()
            optimizer.step()
        assert gates.open == timm_sd.depth_gates(twin).open
        closed += [index for index, is_open in enumerate(gates.open) if not is_open]
    assert len(set(closed)) == len(gates.open), 'a block was never closed'
    assert len(closed) < steps * len(gates.open) - steps, 'hardly a block was open'
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        ours = ours.full_tensor() if hasattr(ours, 'full_tensor') else ours
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f'{name}: {text}')


def papers_network(scale):
    return lambda: toy(2, drop_path_scale=scale, drop_path_rate=0.6, drop_path_schedule='uniform')


def timms_resnet(scale):
    """Its blocks but for the first have projections."""
    return lambda: added('test_resnet', 0.6, schedule='uniform', scale=scale)


def blocks_of_timms(model):
    return [*model.layer1, *model.layer2, *model.layer3, *model.layer4]


def sharded(model, blocks, **options):
    """FSDP2: each block, then the rest."""
    mesh = torch.distributed.device_mesh.init_device_mesh('cpu', (2,))
    for block in blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def shards_of_the_papers_network():
    for scale in ('train', 'eval'):
        equal_one_process(papers_network(scale), blocks_of, 8, sharded)


def shards_of_a_resnet_of_timms():
    for scale in ('train', 'eval'):
        equal_one_process(timms_resnet(scale), blocks_of_timms, 32, sharded)


def shards_of_the_root_alone():
    for scale in ('train', 'eval'):
        equal_one_process(papers_network(scale), blocks_of, 8, lambda model, _: sharded(model, []))


def shards_that_stay_together():
    equal_one_process(timms_resnet('eval'), blocks_of_timms, 32,
                      lambda model, blocks: sharded(model, blocks, reshard_after_forward=False))


def shards_of_single_layers():
    """A closed block's layers are not called, so their parameters stay sharded."""
    for scale in ('train', 'eval'):
        equal_one_process(papers_network(scale), blocks_of, 8, lambda model, blocks: sharded(
            model, [layer for block in blocks for layer in (block.conv1, block.conv2)]))


def shards_with_recomputed_branches():
    """The networks' own switch."""
    def wrap(model, blocks):
        model.set_grad_checkpointing()
        return sharded(model, blocks)

    for scale in ('train', 'eval'):
        equal_one_process(papers_network(scale), blocks_of, 8, wrap)
        equal_one_process(timms_resnet(scale), blocks_of_timms, 32, wrap)


def shards_recomputed_as_a_whole():
    equal_one_process(papers_network('eval'), blocks_of, 8, sharded,
                      lambda model, x: checkpoint(model, x, use_reentrant=False))


def copies():
    """DistributedDataParallel, without find_unused_parameters, though a closed block runs nothing."""
    for scale in ('train', 'eval'):
        equal_one_process(papers_network(scale), blocks_of, 8, lambda model, _: DistributedDataParallel(model))
        equal_one_process(timms_resnet(scale), blocks_of_timms, 32, lambda model, _: DistributedDataParallel(model))


class SyncOnCpu(nn.SyncBatchNorm):
    """torch's own runs on a GPU alone. The ranks add sums up here too, so a closed block must be closed on both."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        from torch.distributed.nn.functional import all_reduce

        mean, square = all_reduce(torch.stack([x.mean((0, 2, 3)), x.square().mean((0, 2, 3))]) / 2)
        scale = self.weight / (square - mean ** 2 + self.eps).sqrt()
        return x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]


def synchronised_batch_norm():
    """Its layers take the place of the old ones, so both ranks see the statistics of the whole batch."""
    def wrap(model, _):
        # it goes the other way round on a GPU; DistributedDataParallel refuses these layers on the CPU
        model = DistributedDataParallel(model)
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        for module in model.modules():
            if isinstance(module, nn.SyncBatchNorm):
                module.__class__ = SyncOnCpu
        assert isinstance(model.module.layer1[0].bn2, SyncOnCpu)
        return model

    equal_one_process(papers_network('eval'), blocks_of, 8, wrap, frozen=False)


def test_two_ranks_stay_equal():
    from support.ranks import on_two_ranks

    on_two_ranks(the_papers_network, its_compiled_blocks, subsets, a_transformer_of_timms)


def test_two_shards_train_the_network_of_one_process():
    from support.ranks import on_two_ranks

    on_two_ranks(shards_of_the_papers_network, shards_of_a_resnet_of_timms, shards_of_the_root_alone,
                 shards_that_stay_together)


def test_layers_of_a_block_may_be_sharded_alone():
    from support.ranks import on_two_ranks

    on_two_ranks(shards_of_single_layers)


def test_two_shards_recompute_by_the_gates_of_their_pass():
    from support.ranks import on_two_ranks

    on_two_ranks(shards_with_recomputed_branches, shards_recomputed_as_a_whole)


def test_two_copies_train_the_network_of_one_process():
    from support.ranks import on_two_ranks

    on_two_ranks(copies, synchronised_batch_norm)
