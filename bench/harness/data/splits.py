"""The training, validation and test images that the flags name, and the batches of each, by either data path."""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from timm.data import create_transform

from harness.cli import flag, non_negative, non_negative_int, positive_int, unit_interval
from harness.data.batches import Batches
from harness.data.in_memory import ImageSet, MemoryBatches, load_image_set
from harness.data.large_images import ImageRows, LoaderBatches, load_image_rows
from harness.data.sources import SourceSettings, open_split
from harness.errors import UserError

Images = ImageSet | ImageRows


@dataclass(frozen=True)
class ImageSettings:
    """Images and batches."""
    num_classes: int | None = flag(None, 'checked against the data', type=int)
    img_size: int | None = flag(None, 'side in pixels; images of another size are resized', type=positive_int)
    mean: list[float] | None = flag(None, "mean of each channel (default: the model's)", type=float, nargs='+')
    std: list[float] | None = flag(None, "standard deviation of each channel (default: the model's)", type=float,
                                   nargs='+')
    batch_size: int = flag(128, 'images a process and step', short='-b', type=positive_int)
    in_memory: bool = flag(True, 'decode all images once into memory, for small ones; otherwise --workers read them')
    workers: int = flag(4, 'processes that read where not --in-memory', short='-j', type=positive_int)


@dataclass(frozen=True)
class SplitSettings:
    """Training, validation and test images."""
    train_split: str = flag('train', "'+' joins several")
    val_split: str | None = flag(None, 'split to select by (default: held out of the training split)')
    test_split: str = flag('test', 'looked at once, at the end')
    validation_batch_size: int | None = flag(None, 'images a process and step in validation and testing (default: '
                                                   '--batch-size)', short='-vb', type=positive_int)
    val_per_class: list[int] = flag([500], 'images of each class held out for validation, one number for each joined '
                                    'split', type=positive_int, nargs='+')

    @property
    def tests_while_training(self) -> bool:
        """Whether the validation images are the test images, so that they must select nothing."""
        return self.val_split == self.test_split


@dataclass(frozen=True)
class AugmentationSettings:
    """Augmentation."""
    crop_padding: int = flag(4, 'in memory: zeros around, then a crop', type=non_negative_int)
    hflip: float = flag(0.5, 'probability of a horizontal flip', type=unit_interval)
    scale: list[float] = flag([0.08, 1.], 'not in memory: area of a crop', type=unit_interval, nargs=2)
    color_jitter: float = flag(0.4, 'not in memory: strength', type=non_negative)
    aa: str | None = flag(None, "not in memory: timm's auto-augment policy, such as rand-m9-mstd0.5")


def check_classes(settings: ImageSettings, classes: int) -> None:
    """Raises UserError unless --num-classes, where it is given, is that of the data."""
    if settings.num_classes not in (None, classes):
        raise UserError(f'--num-classes is {settings.num_classes}, but the data has {classes} classes; leave it out')


def _check_image_size(settings: ImageSettings, cfg: dict[str, Any], size: Sequence[int]) -> None:
    """Raises UserError unless images (H, W) are of the network's size, or --img-size says otherwise."""
    expected = cfg['input_size'][1:]
    if settings.img_size is None and tuple(size) != tuple(expected):
        raise UserError(f'images are {size[1]}x{size[0]} px, {cfg.get("architecture", "the network")} wants '
                        f'{expected[1]}x{expected[0]}; resize with --img-size {expected[0]}, or say the size you want')


def _mean_and_std(settings: ImageSettings, cfg: dict[str, Any]) -> tuple[Sequence[float], Sequence[float]]:
    """--mean and --std, or the network's; UserError if they can't be used."""
    mean, std = settings.mean or cfg['mean'], settings.std or cfg['std']
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise UserError(f'--mean {mean} and --std {std} must be three numbers each, --std above 0')
    return mean, std


def load_images(source: SourceSettings, split: str, settings: ImageSettings, progress: bool) -> Images:
    """One split, decoded where --in-memory says so; UserError if something in it can't be used."""
    opened = open_split(source, split)
    return load_image_set(opened, settings.img_size, progress) if settings.in_memory else load_image_rows(opened)


def concatenate(several: Sequence[Any]) -> Images:
    """Several splits, one behind the other."""
    if len(several) == 1:
        return several[0]
    labels = [images.labels for images in several]
    if isinstance(several[0], ImageSet):
        return ImageSet(torch.cat([images.images for images in several]), torch.cat(labels), several[0].class_names)
    if None in labels:
        raise UserError('--train-split joins several, which --streaming can not; leave out one of them')
    rows = datasets.concatenate_datasets([images.split.rows for images in several])
    return ImageRows(several[0].split._replace(rows=rows, images=len(rows)), torch.cat(labels))


def hold_out(images: Any, per_class: int) -> tuple[Images, Images]:
    """Divides a split into training and validation images, `per_class` of each class; always the same ones.

    The seed is fixed, and not the run's, so that runs of several seeds share one validation set.
    """
    if images.labels is None:
        raise UserError('--streaming without --in-memory can not hold out images; name a --val-split')
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held = torch.zeros(len(images), dtype=torch.bool)
    for label in range(len(images.class_names)):
        of_class = order[images.labels[order] == label]
        if len(of_class) <= per_class:
            raise UserError(f'--val-per-class {per_class} leaves nothing of class {images.class_names[label]!r} '
                            'to train')
        held[of_class[:per_class]] = True
    return images[~held], images[held]


def load_splits(source: SourceSettings, splits: SplitSettings, settings: ImageSettings,
                progress: bool) -> dict[str, Images]:
    """`train`, `val` and `test`. What is held out for validation comes out of the training images, never of the test.

    Args:
        source: The data set.
        splits: Its splits.
        settings: How they are loaded.
        progress: Show a bar while images are decoded.

    Raises:
        UserError: If they don't have the same classes and the same image size.
    """
    joined = [load_images(source, split, settings, progress) for split in splits.train_split.split('+')]
    if splits.val_split:
        train, val = concatenate(joined), load_images(source, splits.val_split, settings, progress)
    else:
        if len(splits.val_per_class) != len(joined):
            raise UserError(f'--val-per-class wants {len(joined)} numbers for --train-split {splits.train_split}, '
                            f'not {len(splits.val_per_class)}')
        divided = [hold_out(images, per_class)
                   for images, per_class in zip(joined, splits.val_per_class, strict=True)]
        train, val = (concatenate(of_splits) for of_splits in zip(*divided, strict=True))
    test = val if splits.tests_while_training else load_images(source, splits.test_split, settings, progress)
    loaded = dict(train=train, val=val, test=test)
    classes = len(train.class_names)
    check_classes(settings, classes)
    for name, images in loaded.items():
        if len(images.class_names) != classes or _image_size(images) != _image_size(train):
            raise UserError(f'{name} images are {_image_size(images)} in {len(images.class_names)} classes, '
                            f'those of training {_image_size(train)} in {classes}; resize with --img-size')
    return loaded


def _image_size(images: Images) -> tuple[int, ...]:
    """(H, W) in pixels; of large images, which are cropped to the network's size, nothing."""
    return tuple(images.images.shape[2:]) if isinstance(images, ImageSet) else ()


def make_batches(images: Images, settings: ImageSettings, cfg: dict[str, Any], accelerator: Accelerator,
                 augmentation: AugmentationSettings | None = None, seed: int = 0) -> Batches:
    """The batches of one split.

    Args:
        images: The split.
        settings: How its images are looked at.
        cfg: The network's pretrained_cfg: image size, mean and std, and how large images are cropped.
        accelerator: Says who we are among the processes, and where the images go.
        augmentation: Of training images, which are shuffled too; None evaluates them as they are, in their order.
        seed: Of order and augmentation.

    Raises:
        UserError: If size, mean or std don't suit the images.
    """
    mean, std = _mean_and_std(settings, cfg)
    order: dict[str, Any] = dict(train=augmentation is not None, seed=seed, rank=accelerator.process_index,
                                 world_size=accelerator.num_processes)
    if isinstance(images, ImageSet):
        _check_image_size(settings, cfg, _image_size(images))
        looks: dict[str, Any] = {}
        if augmentation is not None:
            looks = dict(crop_padding=augmentation.crop_padding, hflip=augmentation.hflip)
        return MemoryBatches(images.to(accelerator.device), settings.batch_size, mean, std, **looks, **order)
    if augmentation is None:
        looks = dict(crop_pct=cfg['crop_pct'], crop_mode=cfg['crop_mode'])
    else:
        looks = dict(scale=augmentation.scale, hflip=augmentation.hflip, color_jitter=augmentation.color_jitter,
                     auto_augment=augmentation.aa)
    size = (3, settings.img_size, settings.img_size) if settings.img_size else cfg['input_size']
    transform = create_transform(size, is_training=augmentation is not None, mean=tuple(mean), std=tuple(std),
                                 interpolation=cfg['interpolation'], **looks)
    return LoaderBatches(images, settings.batch_size, transform, accelerator.device, settings.workers, **order)
