"""timm's optimiser and learning rate schedule, as the flags say."""
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs
from torch import nn

from harness.cli import flag, non_negative, non_negative_int, positive_int, unit_interval
from harness.errors import UserError, user_errors

# timm's schedules that follow from the epoch alone, so that a resume needs nothing else.
LR_SCHEDULES = ('multistep', 'step', 'cosine', 'tanh', 'poly', 'wsd', 'constant')
# timm's names of torch's own optimisers, which take fused=True.
FUSED = ('sgd', 'momentum', 'adam', 'adamw')


@dataclass(frozen=True)
class OptimizerSettings:
    """Optimiser and learning rate."""
    opt: str = flag('sgd', "timm's name; its sgd is Nesterov")
    lr: float = flag(0.1, 'learning rate', type=non_negative)
    momentum: float = flag(0.9, 'of the optimiser', type=unit_interval)
    weight_decay: float = flag(1e-4, 'weight decay', type=non_negative)
    filter_bias_and_bn: bool = flag(False, 'no weight decay on biases and BN (the paper decays all)')
    epochs: int = flag(500, 'epochs to train', type=positive_int)
    sched: str = flag('multistep', "timm's name of the schedule", choices=LR_SCHEDULES)
    sched_on_updates: bool = flag(False, 'step the schedule every update')
    decay_milestones: list[int] = flag([250, 375], 'steps of multistep; the m-th epoch is the first of a new rate',
                                       type=positive_int, nargs='+', metavar='EPOCH')
    decay_rate: float = flag(0.1, 'factor at each step of step and multistep; power of poly', type=non_negative)
    min_lr: float = flag(0., 'lowest learning rate', type=non_negative)
    warmup_epochs: int = flag(0, 'epochs of warm-up', type=non_negative_int)
    warmup_lr: float = flag(1e-5, 'learning rate at its start', type=non_negative)
    warmup_constant: bool = flag(False, 'stay at --warmup-lr instead of climbing from it')

    def __post_init__(self) -> None:
        steps = self.decay_milestones
        if steps != sorted({*steps}):  # timm searches them as a sorted list, and of two equal ones skips a rate
            raise UserError(f'--decay-milestones {" ".join(map(str, steps))} must rise, each above the one before it')


def build_optimizer(
        settings: OptimizerSettings, model: nn.Module, updates_per_epoch: int) -> tuple[torch.optim.Optimizer, Any]:
    """timm's optimiser and schedule.

    Raises:
        UserError: If one is unknown, or a setting doesn't suit it.
    """
    # One kernel updates all 330 tensors of 110 layers, in half the time of one kernel each.
    fused: dict[str, Any] = dict(fused=True) if settings.opt in FUSED else {}
    with user_errors(f'--opt {settings.opt}, --sched {settings.sched}'):
        optimizer = create_optimizer_v2(
            model, opt=settings.opt, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay,
            filter_bias_and_bn=settings.filter_bias_and_bn, **fused)
        scheduler, _ = create_scheduler_v2(
            optimizer, updates_per_epoch=updates_per_epoch, **scheduler_kwargs(settings))
    if settings.warmup_constant:  # timm has no such warm-up: its own climbs by warmup_steps
        scheduler.warmup_steps = [0.] * len(optimizer.param_groups)
    return optimizer, scheduler
