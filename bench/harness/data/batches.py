"""The order of an epoch and each rank's share of its batches. The order is the same on any number of processes."""
import random
from collections.abc import Iterator

import torch


class Batches:
    """Batches of one rank: iterating gives (images (B, C, H, W) float32 normalised, labels (B,), size of all ranks).

    Args:
        total: Images of all ranks.
        batch_size: Images a rank and step.
        train: Shuffle and augment; otherwise the order of the data.
        seed: Seed of order and augmentation.
        rank: This process.
        world_size: Number of processes; each takes its share of every batch, the last and partial one included.
        drop_last: Leave out the last batch if it is partial.

    Attributes:
        images: Images of all ranks in an epoch.
    """

    def __init__(self, total: int, batch_size: int, train: bool = False, seed: int = 0, rank: int = 0,
                 world_size: int = 1, drop_last: bool = False) -> None:
        self.total = total
        self.batch_size, self.global_batch_size = batch_size, batch_size * world_size
        self.images = total - total % self.global_batch_size if drop_last else total
        self.train = train
        self.seed, self.epoch = seed, 0
        self.rank, self.world_size = rank, world_size

    def set_epoch(self, epoch: int) -> None:
        """Chooses order and augmentation."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.images // self.global_batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        raise NotImplementedError

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

    def shares(self, order: torch.Tensor) -> Iterator[tuple[torch.Tensor, int]]:
        """This rank's share of each batch (B,), and the size of that of all ranks."""
        for batch in order.split(self.global_batch_size):
            yield batch[self.rank::self.world_size], len(batch)
