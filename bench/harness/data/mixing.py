"""What is done to a whole training batch on its device: timm's mixup and CutMix, then timm's random erasing.

The draws follow from (seed, epoch, batch) and the place of an image in the batch of all ranks. So they are the same on
any number of ranks and after a resume. The order is that of timm's own loader.
"""
import random
from collections.abc import Callable

import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing

from harness.data.batches import Batches
from harness.data.seeding import seeded
from harness.data.settings import AugmentationSettings

# From images (B, C, H, W), labels (B,), the number of the batch and its size on all ranks, to images and targets.
Mix = Callable[[torch.Tensor, torch.Tensor, int, int], tuple[torch.Tensor, torch.Tensor]]


class BatchAugmentation:
    """Mixes and erases the images of a batch. With mixing, targets are (B, classes) in all epochs.

    Args:
        settings: What is done.
        batches: Whose epoch and seed, and which share of each batch is this rank's.
        classes: How many.
        smoothing: Label smoothing, which Mixup does.
    """

    def __init__(self, settings: AugmentationSettings, batches: Batches, classes: int, smoothing: float) -> None:
        self.batches, self.off_epoch = batches, settings.mixup_off_epoch
        self.mixup = Mixup(settings.mixup, settings.cutmix, prob=settings.mixup_prob,
                           switch_prob=settings.mixup_switch_prob, label_smoothing=smoothing,
                           num_classes=classes) if settings.mixes else None
        self.on_cuda = batches.device.type == 'cuda'  # there the noise is drawn, else on the CPU
        self.erasing = RandomErasing(settings.reprob, mode=settings.remode, max_count=settings.recount,
                                     device=batches.device if self.on_cuda else 'cpu') if settings.reprob else None

    def __call__(self, x: torch.Tensor, target: torch.Tensor, number: int,
                 size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Changes images (B, C, H, W) in place.

        Args:
            x: Normalised images of this rank.
            target: Their labels, (B,).
            number: Of the batch in the epoch.
            size: Images of all ranks in it.

        Returns:
            The images, and labels (B,), or with mixing targets (B, classes).
        """
        epoch, draw = self.batches.epoch, random.Random(f'mix/{self.batches.seed}/{self.batches.epoch}/{number}')
        if self.mixup is not None:
            self.mixup.mixup_enabled = not self.off_epoch or epoch < self.off_epoch
            with seeded(draw.getrandbits(63)):
                x, target = self.mixup(x, target)
        if self.erasing is not None:
            seeds = [draw.getrandbits(63) for _ in range(size)]
            seed_noise = torch.cuda.manual_seed if self.on_cuda else torch.default_generator.manual_seed
            with seeded(0), torch.random.fork_rng([x.device] if self.on_cuda else []):
                for image, place in zip(x, self.batches.share(size).tolist(), strict=True):
                    random.seed(seeds[place])
                    seed_noise(seeds[place])
                    self.erasing(image)
        return x, target


def make_mix(settings: AugmentationSettings, batches: Batches, classes: int, smoothing: float) -> Mix | None:
    """What is done to each batch; None where nothing is. See `BatchAugmentation`."""
    if not settings.mixes and not settings.reprob:
        return None
    return BatchAugmentation(settings, batches, classes, smoothing)
