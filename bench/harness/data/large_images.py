"""The data path for large images: read, decoded and augmented one by one in worker processes, by timm's transforms.

Order and augmentation of an epoch follow from (seed, epoch). The augmentation, and the order of a stream, depend on the
numbers of workers and processes too.
"""
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import datasets
import torch
from datasets.distributed import split_dataset_by_node
from PIL import Image
from torch.utils.data import DataLoader

from harness.data.batches import Batches
from harness.data.sources import Split, check_labels, decode
from harness.errors import RankError, UserError

SHUFFLE_BUFFER = 1000  # encoded images from which each worker of a stream draws the next one


@dataclass
class ImageRows:
    """A split whose images stay in their files, and its labels (N,) int64, which are None for a stream."""
    split: Split
    labels: torch.Tensor | None

    @property
    def class_names(self) -> list[str]:
        return self.split.class_names

    def __len__(self) -> int:
        return self.split.images or 0

    def __getitem__(self, mask: torch.Tensor) -> 'ImageRows':
        assert self.labels is not None
        rows = self.split.rows.select(mask.nonzero()[:, 0].numpy())
        return replace(self, split=self.split._replace(rows=rows, images=len(rows)), labels=self.labels[mask])


def load_image_rows(split: Split) -> ImageRows:
    """Reads the labels of a split, if it isn't a stream.

    Raises:
        UserError: If the number of its images is unknown.
    """
    if split.images is None:
        raise UserError(f'{split.where} does not tell how many images it holds; leave out --streaming')
    is_stream = isinstance(split.rows, datasets.IterableDataset)
    labels = None if is_stream else torch.tensor(split.rows['label'][:])
    if labels is not None:
        check_labels(labels, split)
    return ImageRows(split, labels)


@dataclass
class _Collate:
    """Rows of a `Split` to images (B, C, H, W) and labels (B,), in the worker."""
    transform: Callable[[Image.Image], torch.Tensor]
    where: str

    def __call__(self, rows: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
        images = [self.transform(decode(row['image'], f'{self.where}: {row["image"]["path"]}')) for row in rows]
        return torch.stack(images), torch.tensor([row['label'] for row in rows])


class LoaderBatches(Batches):
    """Batches of images that workers read; in training the last and partial one is left out, as by timm's loader.

    Args:
        data: The images.
        batch_size: Images a rank and step.
        transform: From a picture to a normalised image (C, H, W), timm's.
        device: Where the batches go.
        workers: Processes that read.
        train: Shuffle; otherwise the order of the data.
        **kwargs: seed, rank and world_size, see `Batches`.
    """

    def __init__(
            self,
            data: ImageRows,
            batch_size: int,
            transform: Callable[[Image.Image], torch.Tensor],
            device: torch.device,
            workers: int,
            train: bool = False,
            **kwargs: Any,
    ) -> None:
        super().__init__(len(data), batch_size, train, drop_last=train, **kwargs)
        if not self.images:
            raise UserError(f'{data.split.where} holds {self.total} images, less than a batch of '
                            f'{self.global_batch_size}; lower --batch-size')
        self.data, self.device = data, device
        self.options: dict[str, Any] = dict(
            num_workers=workers, collate_fn=_Collate(transform, data.split.where))

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        batches = self._stream() if self.data.labels is None else self._chosen()
        try:
            for x, target in batches:
                yield x.to(self.device), target.to(self.device), len(target) * self.world_size
        except Exception as error:  # a worker's error has its whole traceback as message
            *_, last = (str(error).strip() or type(error).__name__).splitlines()
            _, ours, said = last.rpartition('UserError: ')
            if not ours and not isinstance(error, UserError):
                said = f'{self.data.split.where} can not be read: {said}'
            raise RankError(said) from error

    def _draws(self) -> torch.Generator:
        """The generator of this rank's augmentation; every rank has its own."""
        return torch.Generator().manual_seed(self.generator().initial_seed() + 1 + self.rank)

    def _chosen(self) -> DataLoader:
        """Each batch by the numbers of its images."""
        shares = [share.tolist() for share, _ in self.shares(self.order(self.generator())) if len(share)]
        return DataLoader(self.data.split.rows, batch_sampler=shares, generator=self._draws(), **self.options)

    def _stream(self) -> Iterator[Any]:
        """The images as they come. All ranks take as many steps: one whose files hold fewer images starts over."""
        rows = self.data.split.rows
        if self.train:
            rows = rows.shuffle(seed=self.seed, buffer_size=SHUFFLE_BUFFER)
            rows.set_epoch(self.epoch)
        loader = DataLoader(split_dataset_by_node(rows, self.rank, self.world_size), batch_size=self.batch_size,
                            drop_last=self.train, generator=self._draws(), **self.options)
        return islice(self._endless(loader), len(self)) if self.train else iter(loader)

    def _endless(self, loader: DataLoader) -> Iterator[Any]:
        while True:
            found = False
            for batch in loader:
                found = True
                yield batch
            if not found:
                raise UserError(f'no worker finds {self.batch_size} images for a batch in {self.data.split.where}; '
                                'lower --batch-size or --workers')
