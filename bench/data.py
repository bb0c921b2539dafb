"""The fast data path for small images: decoded once into a uint8 tensor on the device, augmented there by the batch.

Shapes: N images, B a batch, C channels, H x W pixels. Order and augmentation of an epoch come from a generator seeded
by (seed, epoch), over the batch of all ranks together, so a sample's crop and flip depend neither on the number of
processes nor on a resume.
"""
import io
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import httpx
from PIL import Image
from tqdm import tqdm

from config import UserError


@dataclass
class ImageSet:
    """Images (N, C, H, W) uint8 and labels (N,) int64."""
    images: torch.Tensor
    labels: torch.Tensor
    class_names: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: torch.Tensor) -> 'ImageSet':
        return replace(self, images=self.images[index], labels=self.labels[index])

    def to(self, device: torch.device) -> 'ImageSet':
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


def _digits() -> datasets.DatasetDict:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels as a data set with a train and a test split."""
    from sklearn.datasets import load_digits
    digits = load_digits()
    pictures = [Image.fromarray((image * 15.9375).astype(np.uint8)).convert('RGB') for image in digits.images]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=[str(n) for n in range(10)]))
    data = datasets.Dataset.from_dict(dict(image=pictures, label=digits.target), features=features)
    return data.train_test_split(test_size=360, seed=0, stratify_by_column='label')


def _check_hub(name: str, revision: str | None) -> None:
    """One quick question to the Hub. If no answer comes only the cache is looked at; `datasets` alone retries for 30 s.

    Raises:
        UserError: If the Hub answers that there is no such data set or revision.
    """
    try:
        huggingface_hub.HfApi().dataset_info(name, revision=revision, timeout=3)
    except RevisionNotFoundError as error:
        raise UserError(f'data set {name!r} has no revision {revision!r} on the Hub') from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(f'no data set {name!r} on the Hub, or it is private; log in with: hf auth login') from error
    except (httpx.HTTPError, OSError):  # unreachable, silent, 5xx, or HF_HUB_OFFLINE
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def load_split(
        name: str, split: str, config: str | None = None, streaming: bool = False,
) -> datasets.Dataset | datasets.IterableDataset:
    """One split of a Hub data set (a revision may stand behind an @), of a local folder, or of 'digits'."""
    is_folder = Path(name).is_dir()
    name, _, revision = (name, '', '') if is_folder else name.partition('@')
    if not is_folder and (name.startswith(('.', '/', '~')) or name.count('/') > 1):
        raise UserError(f'data set folder {name!r} does not exist; give a folder of parquet files or a Hub data set')
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is said here, in one line
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if not is_folder and name != 'digits':
        _check_hub(name, revision or None)
    try:
        if is_folder and config not in datasets.get_dataset_config_names(name):
            config = None  # a folder of bare files in place of the Hub data set that a recipe names
        splits = _digits() if name == 'digits' else datasets.load_dataset(
            name, config, revision=revision or None, streaming=streaming)
    except ConnectionError as error:
        raise UserError(f'data set {name!r}: the Hub is unreachable and it is not in the cache; '
                        'give a local folder with --data-dir') from error
    except Exception as error:  # whatever a corrupt file makes the readers raise
        reason = ' '.join(str(error.__cause__ or error).split())[:200]
        raise UserError(f'data set {name!r} can not be read: {reason}') from error
    if split not in splits:
        raise UserError(f'data set {name!r} has no split {split!r}; it has {", ".join(splits)}')
    return splits[split]


def _column(features: datasets.Features, kind: type, given: str | None, flag: str) -> str:
    """The column of a feature type, or the one that `flag` names."""
    found = [name for name, feature in features.items() if isinstance(feature, kind)]
    if given is not None:
        if given not in found:
            columns = ', '.join(f'{name} ({type(feature).__name__})' for name, feature in features.items())
            raise UserError(f'{flag} {given!r} is no column of type {kind.__name__}; the columns are {columns}')
        return given
    if len(found) != 1:
        raise UserError(f'{len(found)} columns of type {kind.__name__} ({", ".join(found) or "none"}) '
                        f'among {", ".join(features)}; choose with {flag}')
    return found[0]


def _read(batches: Iterator[dict[str, list]], where: str) -> Iterator[dict[str, list]]:
    """The batches; what a damaged or unreachable file makes the readers raise becomes a UserError."""
    try:
        yield from batches
    except Exception as error:
        reason = ' '.join(str(error.__cause__ or error).split())[:200]
        raise UserError(f'{where} can not be read: {reason}') from error


def _decode(encoded: bytes, img_size: int | None, where: str) -> torch.Tensor:
    """A picture (H, W, C) uint8, resized if asked for."""
    try:
        image = Image.open(io.BytesIO(encoded)).convert('RGB')
    except OSError as error:
        raise UserError(f'{where} is damaged ({error})') from error
    if img_size is not None and image.size != (img_size, img_size):
        image = image.resize((img_size, img_size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image))


def load_image_set(
        name: str,
        split: str,
        config: str | None = None,
        input_key: str | None = None,
        target_key: str | None = None,
        img_size: int | None = None,
        streaming: bool = False,
        progress: bool = True,
) -> ImageSet:
    """Loads one split and decodes it.

    Args:
        name: Hub data set, local folder, or 'digits'.
        split: Its name.
        config: Configuration, of a Hub data set that has several.
        input_key: Column of the images, if there are several.
        target_key: Column of the labels, if there are several.
        img_size: Side to resize to, in pixels; without it all images must have one size.
        streaming: Decode while the files come in; nothing is kept on the disk.
        progress: Show a bar.

    Raises:
        UserError: If the data set, a column or a file in it can't be used.
    """
    data = load_split(name, split, config, streaming)
    if data.features is None:  # of a stream whose files don't tell
        data = data._resolve_features()
    image_key = _column(data.features, datasets.Image, input_key, '--input-key')
    label_key = _column(data.features, datasets.ClassLabel, target_key, '--target-key')
    where, class_names = f'data set {name!r}, split {split!r}', data.features[label_key].names
    rows = data.select_columns([image_key, label_key]).cast_column(image_key, datasets.Image(decode=False))
    pictures: list[torch.Tensor] = []
    targets: list[int] = []
    for batch in tqdm(_read(rows.iter(1000), where), desc=f'decode {split}', unit='k', leave=False,
                      disable=not progress):
        targets += batch[label_key]
        for encoded in batch[image_key]:
            pictures.append(_decode(encoded['bytes'], img_size, f'{where}: image {len(pictures)}'))
            if pictures[-1].shape != pictures[0].shape:
                raise UserError(f'{where}: image {len(pictures) - 1} is {pictures[-1].shape[1]}x'
                                f'{pictures[-1].shape[0]}, others are not; resize with --img-size')
    if not pictures:
        raise UserError(f'{where} holds no images')
    images, labels = torch.stack(pictures).permute(0, 3, 1, 2).contiguous(), torch.tensor(targets)
    if not 0 <= labels.min() <= labels.max() < len(class_names):
        raise UserError(f'{where}: labels go from {labels.min()} to {labels.max()}, classes from 0 to '
                        f'{len(class_names) - 1}')
    return ImageSet(images, labels, class_names)


def concatenate(parts: Sequence[ImageSet]) -> ImageSet:
    """Several splits, one behind the other."""
    images, labels = torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts])
    return ImageSet(images, labels, parts[0].class_names)


def hold_out(part: ImageSet, per_class: int) -> tuple[ImageSet, ImageSet]:
    """Divides a split into training and validation images, `per_class` of each class; always the same ones.

    The seed is fixed, and not the run's, so that runs of several seeds share one validation set.
    """
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(0))
    held = torch.zeros(len(part), dtype=torch.bool)
    for label in range(len(part.class_names)):
        of_class = order[part.labels[order] == label]
        if len(of_class) <= per_class:
            raise UserError(f'--val-per-class {per_class} leaves nothing of class {part.class_names[label]!r} to train')
        held[of_class[:per_class]] = True
    return part[~held], part[held]


def random_crop_flip(x: torch.Tensor, padding: int, hflip: float, draws: torch.Tensor) -> torch.Tensor:
    """Shifts each normalised image by up to `padding` pixels with zero fill, and mirrors it with probability `hflip`.

    Args:
        x: Normalised images, (B, C, H, W).
        padding: Largest shift in pixels.
        hflip: Probability of the mirror image.
        draws: Uniform numbers in [0, 1), (B, 3): vertical and horizontal shift, flip.

    Returns:
        (B, C, H, W) in channels_last order, which the indexing gives for free.
    """
    height, width = x.shape[-2:]
    shift = (draws[:, :2] * (2 * padding + 1)).long()
    rows = shift[:, :1] + torch.arange(height, device=x.device)
    cols = shift[:, 1:] + torch.arange(width, device=x.device)
    cols = torch.where(draws[:, 2:] < hflip, cols.flip(1), cols)
    sample = torch.arange(len(x), device=x.device)[:, None, None]
    return F.pad(x, [padding] * 4)[sample, :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


class Batches:
    """Batches of one rank: iterating gives (images (B, C, H, W) float32 normalised, labels (B,), size of all ranks).

    Args:
        data: The images, on the device.
        batch_size: Images a rank and step.
        mean: Mean of each channel, of pixels in [0, 1].
        std: Standard deviation of each channel.
        train: Shuffle and augment; otherwise the order of the data.
        crop_padding: See `random_crop_flip`.
        hflip: See `random_crop_flip`.
        seed: Seed of order and augmentation.
        rank: This process.
        world_size: Number of processes; each takes its share of every batch, the last and partial one included.
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
            seed: int = 0,
            rank: int = 0,
            world_size: int = 1,
    ) -> None:
        self.data = data
        self.global_batch_size = batch_size * world_size
        self.mean = 255 * torch.tensor(mean, device=data.images.device).view(-1, 1, 1)
        self.std = 255 * torch.tensor(std, device=data.images.device).view(-1, 1, 1)
        self.train = train
        self.crop_padding, self.hflip = crop_padding, hflip
        self.seed, self.epoch = seed, 0
        self.rank, self.world_size = rank, world_size

    def set_epoch(self, epoch: int) -> None:
        """Chooses order and augmentation."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.data) // self.global_batch_size)

    def images_of_update(self, step: int, grad_accum_steps: int) -> int:
        """Images, of all ranks and of the batches it accumulates, in the update that batch `step` belongs to."""
        images = self.global_batch_size * grad_accum_steps
        return min(images, len(self.data) - step // grad_accum_steps * images)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        device, n = self.data.images.device, len(self.data)
        generator = torch.Generator().manual_seed(random.Random(f'data/{self.seed}/{self.epoch}').getrandbits(63))
        order = (torch.randperm(n, generator=generator) if self.train else torch.arange(n)).to(device)
        draws = torch.rand(n, 3, generator=generator).to(device)  # on the device at once: no step waits for a copy
        for start in range(0, n, self.global_batch_size):
            batch = order[start:start + self.global_batch_size]
            index = batch[self.rank::self.world_size]
            x = (self.data.images[index] - self.mean) / self.std
            if self.train:
                x = random_crop_flip(x, self.crop_padding, self.hflip, draws[index])
            yield x, self.data.labels[index], len(batch)
