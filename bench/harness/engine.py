"""One step, one epoch of training, one pass of evaluation. Loss and accuracy stay on the device between logs."""
import timeit
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn
from tqdm import tqdm

from harness.data.batches import Batches
from harness.data.mixing import Mix
from harness.errors import UserError
from harness.loss import Loss, make_loss

Autocast = Callable[[], AbstractContextManager]
SeeBatch = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


def autocast(device: torch.device, enabled: bool, cache: bool = True, dtype: str = 'bfloat16') -> Autocast:
    """What to run the forward pass in: autocast, or nothing. `cache` keeps the cast weights during a pass."""
    return lambda: torch.autocast(device.type, getattr(torch, dtype), enabled=enabled, cache_enabled=cache)


@torch.no_grad()
def convolution_seconds(amp: bool) -> float:
    """Seconds of one convolution on the CPU, of a size as in the paper's networks; the fastest of ten."""
    convolution = nn.Conv2d(32, 32, 3, padding=1).to(memory_format=torch.channels_last)
    x = torch.zeros(32, 32, 16, 16).to(memory_format=torch.channels_last)
    with autocast(x.device, amp)():
        return min(timeit.repeat(lambda: convolution(x), number=1, repeat=10))


@cache
def default_amp(device_type: str) -> bool:
    """Whether bf16 autocast is faster than fp32 there: on GPUs, and on CPUs where a convolution is.

    A CPU is timed, because its instructions don't say it: with AVX-512 bf16 convolutions are faster on some CPUs and
    slower on others.
    """
    return device_type != 'cpu' or convolution_seconds(amp=True) < convolution_seconds(amp=False)


@dataclass
class TrainStep:
    """The computation of a training step.

    Attributes:
        model: The network, prepared by `accelerator`.
        optimizer: Its optimiser, likewise.
        accelerator: Says who we are among the processes.
        amp: See `autocast`.
        loss: See `make_loss`.
        grad_accum_steps: Batches an update. Each has gates of its own; gradients are exchanged once an update.
        clip: Clips the gradient that an update moves the parameters by, unscaled.
        scaler: Of the loss, where autocast is float16's, whose small gradients would be zero.
    """
    model: nn.Module
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator
    amp: Autocast
    loss: Loss = field(default_factory=make_loss)
    grad_accum_steps: int = 1
    clip: Callable[[nn.Module], None] | None = None
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler(enabled=False))

    def backward(self, x: torch.Tensor, target: torch.Tensor, images: int, is_update: bool) -> torch.Tensor:
        """Adds the gradient of one batch to that of its update. After the update's last batch it is unscaled.

        Args:
            x: This process's images, (B, C, H, W).
            target: Their labels, (B,), or targets, (B, classes).
            images: Images in the update, of all processes and of the batches it accumulates.
            is_update: Whether this is the update's last batch, after which the processes exchange gradients.

        Returns:
            The sum of the losses of this process's images.
        """
        with nullcontext() if is_update else self.accelerator.no_sync(self.model):
            with self.amp():
                logits = self.model(x)
            loss = self.loss(logits, target)
            # DDP averages over processes, whose shares of the last batch may differ: divide by all images here.
            self.accelerator.backward(self.scaler.scale(loss * (self.accelerator.num_processes / images)))
        if is_update:
            self.scaler.unscale_(self.optimizer)
        return loss.detach()

    def update(self) -> None:
        """Moves the parameters by the gradient, and clears it."""
        if self.clip is not None:
            self.clip(self.model)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.clear()

    def clear(self) -> None:
        """Clears the gradient."""
        self.optimizer.zero_grad()


def train_epoch(
        step: TrainStep,
        batches: Batches,
        scheduler: Any,
        epoch: int,
        bar: tqdm,
        log_interval: int,
        mix: Mix | None = None,
        before_update: Callable[[int], None] | None = None,
        after_update: Callable[[int], None] | None = None,
        see_first_batch: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
) -> float:
    """Trains one epoch.

    Args:
        step: What a step computes.
        batches: Training batches, already set to this epoch.
        scheduler: timm's scheduler; stepped by update here, by epoch in the caller.
        epoch: From 0, for the scheduler.
        bar: The progress bar of the run, which counts images.
        log_interval: Steps between updates of the progress bar, each of which waits for the device once.
        mix: What is done to each batch on the device.
        before_update: Called with the number of the update in this epoch, from 0, when its gradient is there.
        after_update: Likewise, when the parameters are moved.
        see_first_batch: Called with this process's first images (B, C, H, W) and their labels (B,) or targets (B,
            classes), before their step.

    Returns:
        The mean training loss of this epoch over all processes.
    """
    step.model.train()
    loss_sum, images = torch.zeros((), device=step.accelerator.device), 0
    for number, (x, target, size) in enumerate(batches):
        update, place = divmod(number, step.grad_accum_steps)
        is_update = place + 1 == step.grad_accum_steps or number + 1 == len(batches)
        if mix is not None:
            x, target = mix(x, target, number, size)
        if number == 0 and see_first_batch is not None:
            see_first_batch(x, target)
        loss_sum += step.backward(x, target, batches.images_of_update(number, step.grad_accum_steps), is_update)
        if is_update:
            if before_update is not None:
                before_update(update)
            step.update()
            if after_update is not None:
                after_update(update)
        scheduler.step_update(epoch * len(batches) + number + 1)
        images += len(target)
        if (number + 1) % log_interval == 0:
            bar.set_postfix(loss=f'{loss_sum.item() / images:.4f}', refresh=False)
        bar.update(size)
    return step.accelerator.reduce(loss_sum).item() / batches.images


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches, accelerator: Accelerator, amp: Autocast,
             see_batch: SeeBatch | None = None) -> dict[str, float]:
    """Evaluates on all images, each process on its share.

    Args:
        model: The network, on its device.
        batches: What it is evaluated on.
        accelerator: Says who we are among the processes.
        amp: See `autocast`.
        see_batch: Called with images (B, C, H, W), labels (B,) and logits (B, classes) in fp32 of each batch.

    Raises:
        UserError: If a stream held none.

    Returns:
        `loss`, `top1` and `top5` in percent, and the number of `images`.
    """
    if accelerator.num_processes > 1:  # in training each process has batch norm statistics of its own
        broadcast(list(model.buffers()))
    model.eval()
    total = torch.zeros(4, device=accelerator.device)  # sum of losses, top-1 hits, top-5 hits, images
    for x, target, _ in batches:
        with amp():
            logits = model(x)
        logits = logits.float()
        if see_batch is not None:
            see_batch(x, target, logits)
        hits = logits.topk(min(5, logits.shape[1])).indices == target[:, None]
        loss = F.cross_entropy(logits, target, reduction='sum')
        total += torch.stack([loss, hits[:, 0].sum(), hits.sum(), torch.full_like(loss, len(target))])
    loss_sum, top1, top5, images = accelerator.reduce(total).tolist()
    if not images:
        raise UserError('there are no images to evaluate; look at --val-split and --test-split')
    batches.images = int(images)  # a stream may not have told their number
    return dict(loss=loss_sum / images, top1=100 * top1 / images, top5=100 * top5 / images, images=int(images))
