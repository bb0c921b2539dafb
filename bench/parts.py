"""The training, validation and test images that the flags name, and the batches of each, by either data path."""
from collections.abc import Sequence
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from timm.data import create_transform

from batches import Batches
from config import UserError
from data import open_split
from in_memory import ImageSet, MemoryBatches, load_image_set
from large_images import ImageRows, LoaderBatches, load_image_rows

Part = ImageSet | ImageRows


def check_classes(args: Any, classes: int) -> None:
    """--num-classes must be that of the data."""
    if args.num_classes not in (None, classes):
        raise UserError(f'--num-classes is {args.num_classes}, but the data has {classes} classes; leave it out')


def check_image_size(args: Any, cfg: dict[str, Any], size: Sequence[int]) -> None:
    """Images (H, W) must be of the model's size, unless --img-size says otherwise."""
    expected = cfg['input_size'][1:]
    if args.img_size is None and tuple(size) != tuple(expected):
        raise UserError(f'images are {size[1]}x{size[0]} px, {args.model} wants {expected[1]}x{expected[0]}; resize '
                        f'with --img-size {expected[0]}, or say the size you want')


def mean_and_std(args: Any, cfg: dict[str, Any]) -> tuple[Sequence[float], Sequence[float]]:
    """--mean and --std, or the model's."""
    mean, std = args.mean or cfg['mean'], args.std or cfg['std']
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise UserError(f'--mean {mean} and --std {std} must be three numbers each, --std above 0')
    return mean, std


def load_part(args: Any, split: str, progress: bool) -> Part:
    """One split, decoded or not as the flags say."""
    opened = open_split(args.data_dir or args.dataset, split, args.dataset_config, args.input_key, args.target_key,
                        args.streaming)
    return load_image_set(opened, args.img_size, progress) if args.in_memory else load_image_rows(opened)


def concatenate(parts: Sequence[Any]) -> Part:
    """Several splits, one behind the other."""
    if len(parts) == 1:
        return parts[0]
    labels = [part.labels for part in parts]
    if isinstance(parts[0], ImageSet):
        return ImageSet(torch.cat([part.images for part in parts]), torch.cat(labels), parts[0].class_names)
    if None in labels:
        raise UserError('--train-split joins several, which --streaming can not; leave out one of them')
    rows = datasets.concatenate_datasets([part.split.rows for part in parts])
    return ImageRows(parts[0].split._replace(rows=rows, images=len(rows)), torch.cat(labels))


def hold_out(part: Any, per_class: int) -> tuple[Part, Part]:
    """Divides a split into training and validation images, `per_class` of each class; always the same ones.

    The seed is fixed, and not the run's, so that runs of several seeds share one validation set.
    """
    if part.labels is None:
        raise UserError('--streaming without --in-memory can not hold out images; name a --val-split')
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(0))
    held = torch.zeros(len(part), dtype=torch.bool)
    for label in range(len(part.class_names)):
        of_class = order[part.labels[order] == label]
        if len(of_class) <= per_class:
            raise UserError(f'--val-per-class {per_class} leaves nothing of class {part.class_names[label]!r} to train')
        held[of_class[:per_class]] = True
    return part[~held], part[held]


def load_parts(args: Any, progress: bool) -> dict[str, Part]:
    """`train`, `val` and `test`. What is held out for validation comes out of the training part, never of the test.

    Raises:
        UserError: If the parts don't have the same classes and the same image size.
    """
    splits = [load_part(args, split, progress) for split in args.train_split.split('+')]
    if args.val_split:
        train, val = concatenate(splits), load_part(args, args.val_split, progress)
    else:
        if len(args.val_per_class) != len(splits):
            raise UserError(f'--val-per-class wants {len(splits)} numbers for --train-split {args.train_split}, '
                            f'not {len(args.val_per_class)}')
        divided = [hold_out(part, per_class) for part, per_class in zip(splits, args.val_per_class, strict=True)]
        train, val = (concatenate(of_splits) for of_splits in zip(*divided, strict=True))
    test = val if args.val_split == args.test_split else load_part(args, args.test_split, progress)
    parts = dict(train=train, val=val, test=test)
    classes = len(train.class_names)
    check_classes(args, classes)
    for name, part in parts.items():
        if len(part.class_names) != classes or image_size(part) != image_size(train):
            raise UserError(f'{name} images are {image_size(part)} in {len(part.class_names)} classes, '
                            f'those of training {image_size(train)} in {classes}; resize with --img-size')
    return parts


def image_size(part: Part) -> tuple[int, ...]:
    """(H, W) in pixels; of large images, which are cropped to the network's size, nothing."""
    return tuple(part.images.shape[2:]) if isinstance(part, ImageSet) else ()


def make_batches(args: Any, part: Part, cfg: dict[str, Any], accelerator: Accelerator, train: bool = False) -> Batches:
    """The batches of one part.

    Args:
        args: The flags.
        part: The images.
        cfg: The network's pretrained_cfg: image size, mean and std, and how large images are cropped.
        accelerator: Says who we are among the processes, and where the images go.
        train: Shuffle and augment as the flags say.
    """
    mean, std = mean_and_std(args, cfg)
    ranks = dict(rank=accelerator.process_index, world_size=accelerator.num_processes)
    order: dict[str, Any] = dict(ranks, train=True, seed=args.seed) if train else ranks
    if isinstance(part, ImageSet):
        check_image_size(args, cfg, image_size(part))
        augmentation = dict(crop_padding=args.crop_padding, hflip=args.hflip) if train else {}
        return MemoryBatches(part.to(accelerator.device), args.batch_size, mean, std, **augmentation, **order)
    size = (3, args.img_size, args.img_size) if args.img_size else cfg['input_size']
    looks: dict[str, Any] = dict(crop_pct=cfg['crop_pct'], crop_mode=cfg['crop_mode'])
    if train:
        looks = dict(scale=args.scale, hflip=args.hflip, color_jitter=args.color_jitter, auto_augment=args.aa)
    transform = create_transform(size, is_training=train, mean=tuple(mean), std=tuple(std),
                                 interpolation=cfg['interpolation'], **looks)
    return LoaderBatches(part, args.batch_size, transform, accelerator.device, args.workers, **order)
