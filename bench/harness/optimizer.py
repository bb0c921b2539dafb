"""timm's optimiser and learning rate schedule, as the flags say."""
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.models import model_parameters
from timm.optim import create_optimizer_v2, get_optimizer_info
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs
from timm.utils import dispatch_clip_grad
from torch import nn

from harness.cli import KEY_VALUES, flag, non_negative, non_negative_int, positive, positive_int, unit_interval
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
    opt_eps: float | None = flag(None, "epsilon (default: the optimiser's)", type=non_negative)
    opt_betas: list[float] | None = flag(None, "betas (default: the optimiser's)", type=unit_interval, nargs='+')
    opt_kwargs: dict[str, Any] = flag({}, 'more arguments of the optimiser', **KEY_VALUES)
    weight_decay: float = flag(1e-4, 'weight decay', type=non_negative)
    filter_bias_and_bn: bool = flag(False, 'no weight decay on biases and BN (the paper decays all)')
    layer_decay: float | None = flag(None, 'the learning rate of each layer over that of the next', type=positive)
    clip_grad: float | None = flag(None, 'largest norm, value or factor of the gradient', type=positive)
    clip_mode: str = flag('norm', "what --clip-grad means; agc is timm's adaptive clipping",
                          choices=('norm', 'value', 'agc'), needs='clip_grad')
    epochs: int = flag(500, 'epochs to train', type=positive_int)
    sched: str = flag('multistep', "timm's name of the schedule", choices=LR_SCHEDULES)
    sched_on_updates: bool = flag(False, 'step the schedule every update')
    decay_milestones: list[int] = flag([250, 375], 'steps of multistep; the m-th epoch is the first of a new rate',
                                       type=positive_int, nargs='+', metavar='EPOCH')
    decay_rate: float = flag(0.1, 'factor at each step of step and multistep; power of poly', type=non_negative)
    min_lr: float = flag(0., 'lowest learning rate', type=non_negative)
    warmup_epochs: int = flag(0, 'epochs of warm-up', type=non_negative_int)
    warmup_lr: float = flag(1e-5, 'learning rate at its start', type=non_negative, needs='warmup_epochs')
    warmup_constant: bool = flag(False, 'stay at --warmup-lr instead of climbing from it', needs='warmup_epochs')
    warmup_prefix: bool = flag(False, 'train --warmup-epochs before --epochs, not as the first of them',
                               needs='warmup_epochs')
    cooldown_epochs: int = flag(0, 'epochs after --epochs, at the last learning rate', type=non_negative_int)

    def __post_init__(self) -> None:
        steps = self.decay_milestones
        if steps != sorted({*steps}):  # timm searches them as a sorted list, and of two equal ones skips a rate
            raise UserError(f'--decay-milestones {" ".join(map(str, steps))} must rise, each above the one before it')


def build_optimizer(settings: OptimizerSettings, model: nn.Module,
                    updates_per_epoch: int) -> tuple[torch.optim.Optimizer, Any, int]:
    """timm's optimiser and schedule, and the epochs of the whole training, with warm-up and cool-down.

    Raises:
        UserError: If one is unknown, or a setting doesn't suit it.
    """
    given = dict(eps=settings.opt_eps, betas=settings.opt_betas and tuple(settings.opt_betas),
                 layer_decay=settings.layer_decay)
    kwargs: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    twice = kwargs.keys() & settings.opt_kwargs
    if twice:
        raise UserError(f'--opt-kwargs {min(twice)}: a flag says it too; leave out one of them')
    kwargs.update(settings.opt_kwargs)
    if settings.opt in FUSED:  # one kernel updates all 330 tensors of 110 layers, in half the time of one kernel each
        kwargs.setdefault('fused', True)
    with user_errors(f'--opt {settings.opt}, --sched {settings.sched}'):
        info = get_optimizer_info(settings.opt.lower().rpartition('_')[2])  # behind timm's lookahead_
        for key, is_known in (('eps', info.has_eps), ('betas', info.has_betas)):
            if key in kwargs and not is_known:  # timm leaves it out without a word
                raise UserError(f'--opt-{key}: --opt {settings.opt} has none; leave it out')
        if len(kwargs.get('betas', ())) not in (0, info.num_betas):
            raise UserError(f'--opt-betas {kwargs["betas"]}: --opt {settings.opt} has {info.num_betas}')
        optimizer = create_optimizer_v2(
            model, opt=settings.opt, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay,
            filter_bias_and_bn=settings.filter_bias_and_bn, **kwargs)
        scheduler, epochs = create_scheduler_v2(
            optimizer, updates_per_epoch=updates_per_epoch, **scheduler_kwargs(settings))
    if not hasattr(scheduler, 'get_cycle_length'):  # timm counts the cool-down of the others alone
        epochs += settings.cooldown_epochs
    if settings.warmup_constant:  # timm has no such warm-up: its own climbs by warmup_steps
        scheduler.warmup_steps = [0.] * len(optimizer.param_groups)
    return optimizer, scheduler, epochs


def make_clip(settings: OptimizerSettings) -> Callable[[nn.Module], None] | None:
    """What --clip-grad does to the gradients of a network, by timm; agc leaves the classifier alone, as timm does."""
    value, mode = settings.clip_grad, settings.clip_mode
    if value is None:
        return None
    return lambda model: dispatch_clip_grad(model_parameters(model, exclude_head=mode == 'agc'), value, mode)
