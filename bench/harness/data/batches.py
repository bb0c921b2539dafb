"""The order of an epoch and each rank's share of its batches. The order is the same on any number of processes."""
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from harness.errors import UserError


class Batches:
    """Batches of one rank: iterating gives (images (B, C, H, W) float32 normalised, labels (B,), size of all ranks).

    Args:
        total: Images of all ranks; 0 where nobody knows.
        batch_size: Images a rank and step.
        mean: Mean of each channel, of pixels in [0, 1].
        std: Standard deviation of each channel.
        device: Where the batches go.
        train: Shuffle and augment; otherwise the order of the data.
        seed: Seed of order and augmentation.
        rank: This process.
        world_size: Number of processes; each takes its share of every batch, the last and partial one included.
        drop_last: Leave out the last batch if it is partial, unless it is the only one.
        pairs: Deal out pairs of images, see `share`. Of an odd last batch one image is left out.

    Attributes:
        images: Images of all ranks in an epoch. In training a last batch that has fewer than two images for a rank is
            always left out: batch norm has no variance of one.
        mean: Of pixels in [0, 255], (C, 1, 1), on the device.
        std: Likewise.

    Raises:
        UserError: If there are too few images to train on.
    """

    def __init__(self, total: int, batch_size: int, mean: Sequence[float], std: Sequence[float], device: torch.device,
                 train: bool = False, seed: int = 0, rank: int = 0, world_size: int = 1,
                 drop_last: bool = False, pairs: bool = False) -> None:
        self.total = total
        self.batch_size, self.global_batch_size = batch_size, batch_size * world_size
        whole = total - total % self.global_batch_size
        drops = train and (drop_last and whole > 0 or total - whole < 2 * world_size)
        self.images = whole if drops else total - total % 2 if pairs else total
        if train and not self.images:
            raise UserError(f'{total} training images are too few for {world_size} process'
                            f'{"es" if world_size > 1 else ""}: batch norm needs two each')
        self.train, self.pairs = train, pairs
        self.seed, self.epoch = seed, 0
        self.rank, self.world_size = rank, world_size
        self.device = device
        self.mean, self.std = (255 * torch.tensor(values, device=device).view(-1, 1, 1) for values in (mean, std))

    def set_epoch(self, epoch: int) -> None:
        """Chooses order and augmentation."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.images // self.global_batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold beside the number of the epoch: nothing, but for a stream."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was made."""

    def images_of_update(self, step: int, grad_accum_steps: int) -> int:
        """Images, of all ranks and of the batches it accumulates, in the update that batch `step` belongs to."""
        images = self.global_batch_size * grad_accum_steps
        return min(images, self.images - step // grad_accum_steps * images)

    def generator(self) -> torch.Generator:
        """A generator that follows from the seed and the epoch alone."""
        return torch.Generator().manual_seed(random.Random(f'data/{self.seed}/{self.epoch}').getrandbits(63))

    def order(self, generator: torch.Generator) -> torch.Tensor:
        """The images of this epoch in their order, (N,)."""
        order = torch.randperm(self.total, generator=generator) if self.train else torch.arange(self.total)
        return order[:self.images]

    def share(self, size: int) -> torch.Tensor:
        """This rank's places, (B,), in a batch of `size` images of all ranks.

        With `pairs` the first and the last place go to one rank, the second and the last but one to the next, and so
        on. So timm's Mixup, which mixes a batch with its reverse, mixes the same images on any number of ranks.
        """
        if not self.pairs:
            return torch.arange(size)[self.rank::self.world_size]
        first = torch.arange(size // 2)[self.rank::self.world_size]
        return torch.cat([first, size - 1 - first.flip(0)])

    def shares(self, order: torch.Tensor) -> Iterator[tuple[torch.Tensor, int]]:
        """This rank's share of each batch (B,), and the size of that of all ranks."""
        for batch in order.split(self.global_batch_size):
            yield batch[self.share(len(batch))], len(batch)
