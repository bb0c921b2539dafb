"""Images that come in as a stream, from the Hub or from parquet files, without a copy on the disk.

A stream has shards, its files. They are dealt out to slots, one a worker of each rank, and anew in each pass, so that
in the long run each image counts the same. In training a slot takes the shards of a pass in an order of (seed, pass),
and the rows of a shard in blocks that are shuffled in themselves. So where a slot stands is four numbers. They travel
with each batch, a checkpoint keeps them, and a resumed slot opens its shard there. `datasets`' own shuffling keeps a
buffer instead, which its state doesn't hold.
"""
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from harness.data.batches import Batches
from harness.data.columns import Split
from harness.data.large_images import Normalised, ReadImage, collate, loader_options, read_errors
from harness.errors import UserError

BLOCK = 1000  # encoded images that a worker holds, and shuffles


class Place(NamedTuple):
    """Where a slot stands.

    Attributes:
        number: Of the pass over its shards.
        shard: How many shards of this pass are done.
        row: How many rows of the shard come before the block.
        taken: How many images of the block are taken.
    """
    number: int = 0
    shard: int = 0
    row: int = 0
    taken: int = 0


def _draw(*key: Any) -> random.Random:
    """A generator that follows from the key alone."""
    return random.Random('/'.join(map(str, ('stream', *key))))


@dataclass
class ImageStream(IterableDataset):
    """What a worker reads: batches of images (B, C, H, W) uint8 and labels (B,), its number, and where it then stands.

    Attributes:
        split: The stream.
        read: See `ReadImage`.
        batch_size: Images a batch.
        rank: This process.
        world_size: Number of processes.
        seed: Of order and augmentation; None gives each image once, in order and as it is.
        places: Where the workers go on, by their numbers.
        first: The worker whose batch comes first. A DataLoader takes one batch of each worker in turn.
    """
    split: Split
    read: ReadImage
    batch_size: int
    rank: int = 0
    world_size: int = 1
    seed: int | None = None
    places: dict[int, Place] = field(default_factory=dict)
    first: int = 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, int, Place]]:
        info: Any = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        worker = (worker + self.first) % workers
        rows = self._rows(self.rank * workers + worker, self.world_size * workers,
                          self.places.get(worker, Place()))
        while batch := list(islice(rows, self.batch_size)):
            if self.seed is not None and len(batch) < self.batch_size:
                return
            yield (*collate([(image, label) for image, label, _ in batch]), worker, batch[-1][2])

    def _rows(self, slot: int, slots: int, place: Place) -> Iterator[tuple[Any, int, Place]]:
        """The images of one slot from a place on, their labels, and the place behind each."""
        rows: Any = self.split.rows
        shards = [rows.shard(num_shards=rows.num_shards, index=index) for index in range(rows.num_shards)]
        parts = -(-slots // len(shards))  # with too few shards several slots read one, each every n-th row
        dealt = [(shard, part) for part in range(parts) for shard in range(len(shards))]
        while True:
            order = dealt[(slot + place.number) % slots::slots]
            found = place != Place(place.number)  # a resumed slot may be at the end of its pass
            if self.seed is not None:
                _draw(self.seed, place.number, slot).shuffle(order)
            for shard, part in order[place.shard:]:
                for block in self._blocks(shards[shard], part, parts, place.row):
                    key, turn = (self.seed, place.number, shard, part, place.row), list(range(len(block)))
                    if self.seed is not None:
                        _draw(*key).shuffle(turn)
                    for taken in range(place.taken, len(block)):
                        (encoded, label), found = block[turn[taken]], True
                        seed = None if self.seed is None else _draw(*key, taken).getrandbits(63)
                        line = (place.row + turn[taken]) * parts + part
                        place = place._replace(taken=taken + 1)
                        yield self.read(encoded, line, seed), int(self.split.read_labels([label], line)), place
                    place = place._replace(row=place.row + len(block), taken=0)
                place = Place(place.number, place.shard + 1)
            if self.seed is None:
                return
            if not found:
                raise UserError(f'{self.split.where} has too few images for {slots} readers; lower --workers')
            place = Place(place.number + 1)

    def _blocks(self, shard: Any, part: int, parts: int, row: int) -> Iterator[list[tuple[Any, int]]]:
        """The rows of a shard, or of a part of it, from `row` on, in blocks: encoded images and labels."""
        block: list[tuple[Any, int]] = []
        seen = 0
        # Unlike a plain loop, `iter` doesn't divide the shard among the workers once more.
        for rows in (shard.skip(row * parts) if row else shard).iter(BLOCK):
            own = slice((part - seen) % parts, None, parts)
            block += zip(rows['image'][own], rows['label'][own], strict=True)
            seen += len(rows['image'])
            if len(block) >= BLOCK:
                yield block[:BLOCK]
                del block[:BLOCK]
        if block:
            yield block


class _Ahead:
    """A loader of an `ImageStream`, which notes the worker and the place of each batch that is read ahead."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader
        self.notes: deque[tuple[int, Place]] = deque()

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for x, target, worker, place in self.loader:
            self.notes.append((worker, place))
            yield x, target


class StreamBatches(Batches):
    """Batches of a stream. In training all are full, and an epoch takes up the stream where the one before left it.

    Args:
        split: The stream.
        images: Images an epoch of all ranks, in training; None looks at each image once, whatever their number.
        batch_size: Images a rank and step.
        read: See `ReadImage`.
        mean: Mean of each channel, of pixels in [0, 1].
        std: Standard deviation of each channel.
        device: Where the batches go.
        workers: Processes that read; with 0 this one does.
        train: Shuffle and augment.
        **kwargs: seed, rank, world_size and pairs, see `Batches`.
    """

    def __init__(
            self,
            split: Split,
            images: int | None,
            batch_size: int,
            read: ReadImage,
            mean: Sequence[float],
            std: Sequence[float],
            device: torch.device,
            workers: int,
            train: bool = False,
            **kwargs: Any,
    ) -> None:
        super().__init__(images or 0, batch_size, mean, std, device, train, drop_last=train, **kwargs)
        self.workers = workers
        self.stream = ImageStream(split, read, batch_size, self.rank, self.world_size, self.seed if train else None)
        self.ahead = _Ahead(DataLoader(self.stream, batch_size=None, **loader_options(workers, device)))
        self.loader = Normalised(self.ahead, self.mean, self.std, device)
        self.endless: Iterator[Any] | None = None  # the batches of the whole training

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        where = self.stream.split.where
        if not self.train:
            for x, target in read_errors(self.loader, where):
                yield x, target, len(target)
            self.ahead.notes.clear()
            return
        if self.endless is None:
            self.endless = read_errors(self.loader, where)
        for x, target in islice(self.endless, len(self)):
            worker, place = self.ahead.notes.popleft()
            self.stream.places[worker] = place
            self.stream.first = (worker + 1) % max(1, self.workers)
            yield x, target, self.global_batch_size

    def state_dict(self) -> dict[str, Any]:
        """Where this rank's workers stand."""
        places = {worker: list(place) for worker, place in self.stream.places.items()}
        return dict(workers=self.workers, first=self.stream.first, places=places)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the workers stood.

        Raises:
            UserError: If there were more or fewer of them.
        """
        if state['workers'] != self.workers:
            raise UserError(f'{self.stream.split.where} was read by {state["workers"]} workers a process, and goes on '
                            f'with as many; --workers is {self.workers}')
        self.stream.first = state['first']
        self.stream.places = {worker: Place(*place) for worker, place in state['places'].items()}
