"""The batches of a split, by the data path that suits it: in memory, from files, or a stream."""
from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from timm.data import create_transform

from harness.data.batches import Batches
from harness.data.columns import Split
from harness.data.in_memory import ImageSet, MemoryBatches
from harness.data.large_images import ImageRows, LoaderBatches, ReadImage
from harness.data.settings import AugmentationSettings, ImageSettings
from harness.data.splits import Images, image_size
from harness.data.streams import StreamBatches
from harness.errors import UserError


def _check_image_size(settings: ImageSettings, cfg: dict[str, Any], size: Sequence[int]) -> None:
    """Raises UserError unless images (H, W) are of the network's size, or --img-size says otherwise."""
    expected = cfg['input_size'][1:]
    if settings.img_size is None and tuple(size) != tuple(expected):
        raise UserError(f'images are {size[1]}x{size[0]} px, {cfg.get("architecture", "the network")} wants '
                        f'{expected[1]}x{expected[0]}; resize with --img-size {expected[0]}, or say the size you want')


def _mean_and_std(settings: ImageSettings, cfg: dict[str, Any],
                  channels: int) -> tuple[Sequence[float], Sequence[float]]:
    """--mean and --std, or the network's; UserError if they can't be used."""
    mean, std = settings.mean or cfg['mean'], settings.std or cfg['std']
    if channels == 1:  # grey: the mean over the colours, as timm does
        mean, std = ([sum(values) / len(values)] for values in (mean, std))
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise UserError(f'--mean {mean} and --std {std} must be {channels} numbers each, --std above 0')
    return mean, std


def make_batches(images: Images, settings: ImageSettings, cfg: dict[str, Any], accelerator: Accelerator,
                 augmentation: AugmentationSettings | None = None, seed: int = 0, channels: int = 3,
                 epoch_size: int | None = None) -> Batches:
    """The batches of one split.

    Args:
        images: The split.
        settings: How its images are looked at.
        cfg: The network's pretrained_cfg: image size, mean and std, and how large images are cropped.
        accelerator: Says who we are among the processes, and where the images go.
        augmentation: Of training images, which are shuffled too; None evaluates them as they are, in their order.
        seed: Of order and augmentation.
        channels: 3, or 1 for grey.
        epoch_size: Training images an epoch of a stream, if not all.

    Raises:
        UserError: If size, mean or std don't suit the images, or a stream doesn't tell how many it holds.
    """
    mean, std = _mean_and_std(settings, cfg, channels)
    train, device = augmentation is not None, accelerator.device
    pairs = augmentation is not None and augmentation.mixes
    order: dict[str, Any] = dict(train=train, seed=seed, rank=accelerator.process_index,
                                 world_size=accelerator.num_processes, pairs=pairs)
    if pairs and settings.batch_size % 2:
        raise UserError(f'--batch-size {settings.batch_size} is odd, and --mixup and --cutmix mix pairs; give an even '
                        'one')
    if isinstance(images, ImageSet):
        _check_image_size(settings, cfg, image_size(images))
        looks: dict[str, Any] = {}
        if augmentation is not None and augmentation.aug:
            looks = dict(crop_padding=augmentation.crop_padding, hflip=augmentation.hflip, vflip=augmentation.vflip)
        return MemoryBatches(images.to(device), settings.batch_size, mean, std, **looks, **order)
    if augmentation is None:
        looks = dict(crop_pct=cfg['crop_pct'], crop_mode=cfg['crop_mode'])
    else:
        looks = dict(no_aug=not augmentation.aug, scale=augmentation.scale, ratio=augmentation.ratio,
                     hflip=augmentation.hflip, vflip=augmentation.vflip, color_jitter=augmentation.color_jitter,
                     auto_augment=augmentation.aa)
    if channels == 1 and augmentation is not None and augmentation.aa:
        raise UserError(f"--aa {augmentation.aa}: timm's policies are of colours, and in_chans is 1; leave it out")
    if augmentation is not None and augmentation.aa and 'inc1' in augmentation.aa and 'mmax' not in augmentation.aa:
        raise UserError(f'--aa {augmentation.aa}: at its strongest timm asks Pillow for pictures of 0 bits, which it '
                        f'refuses since version 13; write {augmentation.aa}-mmax9')
    size = (settings.img_size,) * 2 if settings.img_size else cfg['input_size'][1:]
    interpolation = augmentation and augmentation.train_interpolation or cfg['interpolation']
    transform = create_transform((channels, *size), is_training=train, use_prefetcher=True,  # uint8, not normalised
                                 interpolation=interpolation, **looks)
    split = images if isinstance(images, Split) else images.split
    read, reads = ReadImage(transform, split.where, channels), (mean, std, device, settings.workers)
    if isinstance(images, ImageRows):
        return LoaderBatches(images, settings.batch_size, read, *reads, **order)
    length = epoch_size or images.images if train else images.images
    if train and (length is None or length < settings.batch_size * accelerator.num_processes):
        raise UserError(f'{split.where} is a stream that tells of {length or "no number of"} images; say with '
                        '--epoch-size how many make an epoch, at least a batch of all processes')
    return StreamBatches(images, length, settings.batch_size, read, *reads, **order)
