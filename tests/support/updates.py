"""An epoch of training by the harness against a plain loop, on any number of processes."""
import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from tqdm import tqdm

import timm_sd
from harness.data.in_memory import ImageSet, MemoryBatches
from harness.engine import TrainStep, autocast, train_epoch

GLOBAL_BATCH, IMAGES, BATCHES = 8, 37, 5


def freeze_statistics(network):
    """Batch norm in evaluation mode for good: what one process sees is then what several see together."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True, module=module: module


def check_updates(accelerator, grad_accum_steps):
    """An epoch of batches of 8 on all ranks together, the last of them uneven, against a loop of one process."""
    generator = torch.Generator().manual_seed(0)
    data = ImageSet(torch.randint(256, (IMAGES, 3, 16, 16), dtype=torch.uint8, generator=generator),
                    torch.randint(10, (IMAGES,), generator=generator), [str(n) for n in range(10)])
    augmentation = dict(mean=(0.5,) * 3, std=(0.25,) * 3, train=True, crop_padding=2, hflip=0.5, seed=3)
    torch.manual_seed(0)
    network = timm.create_model('sd_resnet20_cifar').train()
    for _ in range(20):
        network(torch.randn(16, 3, 16, 16))
    timm_sd.depth_gates(network).set_epoch(0)
    freeze_statistics(network)
    twin = copy.deepcopy(network).train()
    freeze_statistics(twin)

    ranks, reductions = accelerator.num_processes, []
    model, optimizer = accelerator.prepare(network, torch.optim.SGD(network.parameters(), 0.05, 0.9))
    if ranks > 1:
        model.register_comm_hook(
            None, lambda _, bucket: reductions.append(bucket.index()) or allreduce_hook(None, bucket))
    batches = MemoryBatches(data, GLOBAL_BATCH // ranks, rank=accelerator.process_index, world_size=ranks,
                            **augmentation)
    scheduler, _ = create_scheduler_v2(optimizer, 'constant', 1, updates_per_epoch=len(batches))
    step = TrainStep(model, optimizer, accelerator, autocast(accelerator.device, False),
                     grad_accum_steps=grad_accum_steps)
    loss = train_epoch(step, batches, scheduler, 0, tqdm(disable=True), log_interval=20)
    if ranks > 1:
        assert reductions.count(0) == -(-BATCHES // grad_accum_steps)  # no_sync: the ranks speak once an update

    optimizer = torch.optim.SGD(twin.parameters(), 0.05, 0.9)
    losses, expected = [], 0.
    for number, (x, target, _) in enumerate(MemoryBatches(data, GLOBAL_BATCH, **augmentation), start=1):
        losses.append(F.cross_entropy(twin(x), target, reduction='none'))
        if number % grad_accum_steps == 0 or number == BATCHES:
            images = torch.cat(losses)
            optimizer.zero_grad()
            images.mean().backward()
            optimizer.step()
            expected += images.sum().item() / IMAGES
            losses.clear()
    assert timm_sd.depth_gates(network).state_dict() == timm_sd.depth_gates(twin).state_dict()
    assert loss == pytest.approx(expected, rel=1e-5)
    for ours, theirs in zip(network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
