"""The fast data path for small images: decoded once into a uint8 tensor on the device, augmented there by the batch.

Shapes: N images, B a batch, C channels, H x W pixels. Order and augmentation of an epoch come from a generator seeded
by (seed, epoch), over the batch of all ranks together, so a sample's crop and flip depend neither on the number of
processes nor on a resume.
"""
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from harness.data.batches import Batches
from harness.data.columns import Split
from harness.data.decoding import decode, name_image
from harness.data.sources import read_batches
from harness.errors import UserError

# On a GPU as many whole batches are made at once as fit: 21 of 128 images of 32 px, in float32. One by one, each costs
# the host the start of many small kernels. On a CPU one batch is made at a time, for it stays in the cache.
GROUP_BYTES = 2**25


@dataclass
class ImageSet:
    """Images (N, C, H, W) uint8 and labels (N,) int64.

    Attributes:
        content: Digest of the whole split they come from: all pictures as they were stored and their classes' names,
            in any order. Two copies of a data set have the same one, whatever their files.
    """
    images: torch.Tensor
    labels: torch.Tensor
    class_names: list[str]
    content: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: torch.Tensor) -> 'ImageSet':
        return replace(self, images=self.images[index], labels=self.labels[index])

    def to(self, device: torch.device) -> 'ImageSet':
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


def load_image_set(split: Split, img_size: int | None = None, channels: int = 3, progress: bool = True) -> ImageSet:
    """Decodes a whole split.

    Args:
        split: The encoded images.
        img_size: Side to resize to, in pixels; without it all images must have one size.
        channels: 3, or 1 for grey.
        progress: Show a bar.

    Raises:
        UserError: If a file in it can't be used.
    """
    pictures: list[np.ndarray] = []
    targets: list[int] = []
    digests: list[bytes] = []
    for batch in tqdm(read_batches(split.rows.iter(1000), split.where), desc=f'decode {split.where}', unit='k',
                      leave=False, disable=not progress):
        targets += batch['label']
        for encoded in batch['image']:
            image = decode(encoded, f'{split.where}: {name_image(encoded, len(pictures))}', channels)
            stored = pixels = np.asarray(image)
            if img_size is not None and image.size != (img_size, img_size):
                pixels = np.asarray(image.resize((img_size, img_size), Image.Resampling.BILINEAR))
            digests.append(hashlib.sha256(f'{stored.shape}'.encode() + stored.data).digest())
            pictures.append(pixels.reshape(*pixels.shape[:2], channels))
            if pictures[-1].shape != pictures[0].shape:
                raise UserError(f'{split.where}: image {len(pictures) - 1} is {image.width}x{image.height}, others are '
                                'not; resize with --img-size')
    if not pictures:
        raise UserError(f'{split.where} holds no images')
    labels = split.labels if split.labels is not None else split.read_labels(targets)
    return ImageSet(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(), labels, split.class_names,
                    _digest(digests, [split.class_names[label] for label in labels.tolist()]))


def _digest(pictures: Sequence[bytes], class_names: Sequence[str]) -> int:
    """A digest of pictures, given by their own digests, and of their classes that doesn't depend on their order."""
    rows = (hashlib.sha256(picture + name.encode()).digest()
            for picture, name in zip(pictures, class_names, strict=True))
    return sum(int.from_bytes(row, 'big') for row in rows) % 2**256


def random_crop_flip(x: torch.Tensor, padding: int, hflip: float, draws: torch.Tensor,
                     vflip: float = 0.) -> torch.Tensor:
    """Shifts each normalised image by up to `padding` pixels with zero fill, and mirrors it.

    Args:
        x: Normalised images, (B, C, H, W).
        padding: Largest shift in pixels.
        hflip: Probability that left and right change places.
        draws: Uniform numbers in [0, 1), (B, 3): vertical and horizontal shift, horizontal flip; with `vflip` (B, 4).
        vflip: Probability that top and bottom change places.

    Returns:
        (B, C, H, W) in channels_last order, which the indexing gives for free.
    """
    height, width = x.shape[-2:]
    shift = (draws[:, :2] * (2 * padding + 1)).long()
    rows = shift[:, :1] + torch.arange(height, device=x.device)
    cols = shift[:, 1:] + torch.arange(width, device=x.device)
    cols = torch.where(draws[:, 2:3] < hflip, cols.flip(1), cols)
    if vflip:
        rows = torch.where(draws[:, 3:] < vflip, rows.flip(1), rows)
    sample = torch.arange(len(x), device=x.device)[:, None, None]
    return F.pad(x, [padding] * 4)[sample, :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


class MemoryBatches(Batches):
    """Batches of images that lie decoded on the device, the last and partial one included.

    Args:
        data: The images, on the device.
        batch_size: Images a rank and step.
        mean: Mean of each channel, of pixels in [0, 1].
        std: Standard deviation of each channel.
        train: Shuffle and augment; otherwise the order of the data.
        crop_padding: See `random_crop_flip`.
        hflip: See `random_crop_flip`.
        vflip: See `random_crop_flip`.
        **kwargs: seed, rank, world_size and pairs, see `Batches`.

    Attributes:
        at_once: Batches that are made at once, see `GROUP_BYTES`. They are slices of one tensor.
    """

    def __init__(
            self,
            data: ImageSet,
            batch_size: int,
            mean: Sequence[float],
            std: Sequence[float],
            train: bool = False,
            crop_padding: int = 0,
            hflip: float = 0.,
            vflip: float = 0.,
            **kwargs: Any,
    ) -> None:
        super().__init__(len(data), batch_size, mean, std, data.images.device, train, **kwargs)
        self.data = data
        self.crop_padding, self.hflip, self.vflip = crop_padding, hflip, vflip
        batch_bytes = 4 * batch_size * data.images.shape[1:].numel()
        self.at_once = 1 if data.images.device.type == 'cpu' else max(1, GROUP_BYTES // batch_bytes)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        generator = self.generator()
        shares, sizes = zip(*self.shares(self.order(generator)), strict=True)
        index, lengths = torch.cat(shares), [len(share) for share in shares]
        draws = torch.rand(self.total, 4 if self.vflip else 3, generator=generator)[index].to(self.device)
        index = index.to(self.device)  # with the draws the only copies of an epoch
        labels = self.data.labels[index].split(lengths)
        for first in range(0, len(shares), self.at_once):
            group = slice(first, first + self.at_once)
            images = slice(self.batch_size * first, self.batch_size * (first + self.at_once))
            x = (self.data.images[index[images]] - self.mean) / self.std
            if self.train:
                x = random_crop_flip(x, self.crop_padding, self.hflip, draws[images], self.vflip)
            yield from zip(x.split(lengths[group]), labels[group], sizes[group], strict=True)
