"""The data path for large images: read, decoded and augmented one by one in worker processes, by timm's transforms.

They leave the workers as uint8 and are normalised on the device, as by timm's loader. Order and augmentation of an
image follow from (seed, epoch, image) alone, whatever the numbers of workers and processes.
"""
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from timm.data.loader import PrefetchLoader
from torch.utils.data import DataLoader

from harness.data.batches import Batches
from harness.data.columns import Split
from harness.data.decoding import decode, name_image
from harness.data.seeding import seeded
from harness.errors import RankError, UserError

Transform = Callable[[Image.Image], torch.Tensor]


@dataclass
class ReadImage:
    """Decodes and transforms an encoded image.

    Attributes:
        transform: From a picture to (C, H, W) uint8, timm's.
        where: Names the split in errors.
        channels: 3, or 1 for grey.
    """
    transform: Transform
    where: str
    channels: int = 3

    def __call__(self, encoded: dict[str, Any] | None, row: int, seed: int | None) -> torch.Tensor:
        """The image of one row, (C, H, W) uint8; a seed decides its augmentation."""
        picture = decode(encoded, f'{self.where}: {name_image(encoded, row)}', self.channels)
        if seed is None:
            return self.transform(picture)
        with seeded(seed):
            return self.transform(picture)


@dataclass
class ImageRows:
    """Some of a split's rows, whose images stay in their files: their numbers and their labels, both (N,) int64."""
    split: Split
    numbers: torch.Tensor
    labels: torch.Tensor

    @property
    def class_names(self) -> list[str]:
        return self.split.class_names

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: torch.Tensor) -> 'ImageRows':
        return replace(self, numbers=self.numbers[index], labels=self.labels[index])


@dataclass
class _Reader:
    """What a worker does: from the places of images and their seeds to images and labels."""
    rows: datasets.Dataset
    numbers: np.ndarray
    labels: np.ndarray
    read: ReadImage

    def __getitems__(self, places: Sequence[tuple[int, int | None]]) -> list[tuple[torch.Tensor, int]]:
        numbers = [int(self.numbers[place]) for place, _ in places]
        encoded = self.rows[numbers]['image']
        return [(self.read(image, number, seed), int(self.labels[place]))
                for image, number, (place, seed) in zip(encoded, numbers, places, strict=True)]


def collate(rows: Sequence[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (C, H, W) uint8 and labels as a batch (B, C, H, W)."""
    return torch.stack([image for image, _ in rows]), torch.tensor([label for _, label in rows])


class Normalised(PrefetchLoader):
    """timm's loader behind a DataLoader: normalises on the device, on a GPU while the batch before is computed."""

    def __init__(self, loader: Any, mean: torch.Tensor, std: torch.Tensor, device: torch.device) -> None:
        channels = len(mean)
        super().__init__(loader, (0.,) * channels, (1.,) * channels, channels, device)
        self.mean, self.std = mean, std


class LoaderBatches(Batches):
    """Batches of images that workers read; in training a last and partial one is left out, as by timm's loader.

    Args:
        data: The images.
        batch_size: Images a rank and step.
        read: See `ReadImage`.
        mean: Mean of each channel, of pixels in [0, 1].
        std: Standard deviation of each channel.
        device: Where the batches go.
        workers: Processes that read; with 0 this one does.
        train: Shuffle and augment; otherwise the order of the data.
        **kwargs: seed, rank, world_size and pairs, see `Batches`.
    """

    def __init__(
            self,
            data: ImageRows,
            batch_size: int,
            read: ReadImage,
            mean: Sequence[float],
            std: Sequence[float],
            device: torch.device,
            workers: int,
            train: bool = False,
            **kwargs: Any,
    ) -> None:
        super().__init__(len(data), batch_size, mean, std, device, train, drop_last=train, **kwargs)
        self.where = data.split.where
        self.plan: list[list[tuple[int, int | None]]] = []  # of each batch: the places of its images, and their seeds
        reader: Any = _Reader(data.split.rows, data.numbers.numpy(), data.labels.numpy(), read)
        self.loader = Normalised(
            DataLoader(reader, batch_sampler=self.plan, collate_fn=collate, **loader_options(workers, device)),
            self.mean, self.std, device)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        generator = self.generator()
        order = self.order(generator)
        seeds = torch.randint(2**63 - 1, (self.total,), generator=generator).tolist() if self.train else \
            [None] * self.total
        shares = [(share.tolist(), size) for share, size in self.shares(order) if len(share)]
        # The DataLoader, whose workers live on from epoch to epoch, looks at this list when an epoch begins.
        self.plan[:] = [[(place, seeds[place]) for place in share] for share, _ in shares]
        for (x, target), (_, size) in zip(read_errors(self.loader, self.where), shares, strict=True):
            yield x, target, size


def loader_options(workers: int, device: torch.device) -> dict[str, Any]:
    """What every DataLoader here is made with. Its workers live as long as it does."""
    # Seeds come with the images. A generator of its own keeps the DataLoader from drawing from torch's, whose state
    # decides dropout and the tokens of gates.
    return dict(num_workers=workers, persistent_workers=workers > 0, pin_memory=device.type == 'cuda',
                generator=torch.Generator())


def read_errors(batches: Iterable[Any], where: str) -> Iterator[Any]:
    """The batches; an error of a worker, whose text is its whole traceback, becomes one line."""
    try:
        yield from batches
    except Exception as error:
        *_, last = (str(error).strip() or type(error).__name__).splitlines()
        _, ours, said = last.rpartition('UserError: ')
        if not ours and not isinstance(error, UserError):
            said = f'{where} can not be read: {said}'
        raise RankError(said) from error
