"""One epoch of training, one pass of evaluation. Loss and accuracy stay on the device between logs."""
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn
from tqdm import tqdm

from batches import Batches

Autocast = Callable[[], AbstractContextManager]


def autocast(device: torch.device, enabled: bool) -> Autocast:
    """What to run the forward pass in: bf16 autocast, or nothing."""
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def default_amp(device_type: str) -> bool:
    """Whether bf16 autocast is faster than fp32 there: on GPUs, and on CPUs with bf16 instructions."""
    if device_type != 'cpu':
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def train_epoch(
        model: nn.Module,
        batches: Batches,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        accelerator: Accelerator,
        amp: Autocast,
        epoch: int,
        bar: tqdm,
        smoothing: float = 0.,
        grad_accum_steps: int = 1,
        log_interval: int = 20,
        before_update: Callable[[int], None] | None = None,
) -> float:
    """Trains one epoch.

    Args:
        model: The network, prepared by `accelerator` as is `optimizer`.
        batches: Training batches, already set to this epoch.
        optimizer: Its optimiser.
        scheduler: timm's scheduler; stepped by update here, by epoch in the caller.
        accelerator: Says who we are among the processes.
        amp: See `autocast`.
        epoch: From 0, for the scheduler.
        bar: The progress bar of the run, which counts images.
        smoothing: Label smoothing.
        grad_accum_steps: Batches an update; each has gates of its own, and the ranks speak once an update.
        log_interval: Steps between updates of the progress bar, each of which waits for the device once.
        before_update: Called with the step, from 0, when the gradients of an update are there.

    Returns:
        The mean training loss of this epoch over all processes.
    """
    model.train()
    loss_sum, images = torch.zeros((), device=accelerator.device), 0
    for step, (x, target, size) in enumerate(batches):
        is_update = (step + 1) % grad_accum_steps == 0 or step + 1 == len(batches)
        with nullcontext() if is_update else accelerator.no_sync(model):
            with amp():
                logits = model(x)
            loss = F.cross_entropy(logits.float(), target, reduction='sum', label_smoothing=smoothing)
            # DDP averages over the ranks, whose shares of the last batch may differ: divide by all images here.
            accelerator.backward(loss * (accelerator.num_processes / batches.images_of_update(step, grad_accum_steps)))
        if is_update:
            if before_update is not None:
                before_update(step)
            optimizer.step()
            optimizer.zero_grad()
        scheduler.step_update(epoch * len(batches) + step + 1)
        loss_sum += loss.detach()
        images += len(target)
        if (step + 1) % log_interval == 0:
            bar.set_postfix(loss=f'{loss_sum.item() / images:.4f}', refresh=False)
        bar.update(size)
    return accelerator.reduce(loss_sum).item() / batches.images


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches, accelerator: Accelerator, amp: Autocast) -> dict[str, float]:
    """Evaluates on all images, each process on its share.

    Returns:
        `loss`, and `top1` and `top5` in percent.
    """
    if accelerator.num_processes > 1:  # in training each rank has batch norm statistics of its own
        broadcast(list(model.buffers()))
    model.eval()
    total = torch.zeros(3, device=accelerator.device)  # sum of losses, top-1 hits, top-5 hits
    for x, target, _ in batches:
        with amp():
            logits = model(x)
        logits = logits.float()
        hits = logits.topk(min(5, logits.shape[1])).indices == target[:, None]
        loss = F.cross_entropy(logits, target, reduction='sum')
        total += torch.stack([loss, hits[:, 0].sum(), hits.sum()])
    loss_sum, top1, top5 = accelerator.reduce(total).tolist()
    images = batches.images
    return dict(loss=loss_sum / images, top1=100 * top1 / images, top5=100 * top5 / images)
