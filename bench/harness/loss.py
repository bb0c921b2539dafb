"""The loss of the training images."""
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy

from harness.cli import flag, unit_interval
from harness.errors import user_errors

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class LossSettings:
    """Loss."""
    smoothing: float = flag(0., 'label smoothing', type=unit_interval)
    bce_loss: bool = flag(False, 'binary cross entropy of each class by itself')
    bce_target_thresh: float | None = flag(None, 'targets above it count as 1, the others as 0', type=unit_interval,
                                           needs='bce_loss')


def make_loss(settings: LossSettings = LossSettings()) -> Loss:
    """The sum over the images of their losses, in fp32, of logits (B, classes) and their targets.

    Targets are labels (B,), or what Mixup makes of them, (B, classes), which are smoothed already.

    Raises:
        UserError: If a setting can't be used.
    """
    smoothing = settings.smoothing
    if settings.bce_loss:
        with user_errors(f'--bce-loss, --smoothing {smoothing}'):
            mean = BinaryCrossEntropy(smoothing, settings.bce_target_thresh)
        return lambda logits, target: mean(logits.float(), target) * len(target)

    def cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.float(), target, reduction='sum',
                               label_smoothing=0. if target.ndim == 2 else smoothing)
    return cross_entropy
