"""The training, validation and test images that the flags name."""
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import datasets
import torch
from accelerate import Accelerator

from harness.data.columns import Split, open_split, rename_classes
from harness.data.in_memory import ImageSet, load_image_set
from harness.data.large_images import ImageRows
from harness.data.settings import ImageSettings, SplitSettings
from harness.data.sources import DataSet, SourceSettings, is_public, open_data
from harness.errors import UserError

# In memory, in files, or a stream.
Images = ImageSet | ImageRows | Split


def check_classes(settings: ImageSettings, classes: int) -> None:
    """Raises UserError unless --num-classes, where it is given, is that of the data."""
    if settings.num_classes not in (None, classes):
        raise UserError(f'--num-classes is {settings.num_classes}, but the data has {classes} classes; leave it out')


def load_images(split: Split, settings: ImageSettings, channels: int, progress: bool) -> Images:
    """One split, decoded where --in-memory says so.

    Args:
        split: The encoded images.
        settings: How they are loaded.
        channels: 3, or 1 for grey.
        progress: Show a bar while images are decoded.

    Raises:
        UserError: If something in it can't be used.
    """
    if settings.in_memory:
        return load_image_set(split, settings.img_size, channels, progress)
    if split.labels is None:
        return split
    return ImageRows(split, torch.arange(len(split.labels)), split.labels)


def concatenate(several: Sequence[Any]) -> Images:
    """Several splits of the same kind, one behind the other."""
    first, *_ = several
    if len(several) == 1:
        return first
    if isinstance(first, Split):
        raise UserError('--train-split joins several, which --streaming can not; leave out one of them')
    labels = torch.cat([images.labels for images in several])
    if isinstance(first, ImageSet):
        return ImageSet(torch.cat([images.images for images in several]), labels, first.class_names)
    starts = [0, *torch.tensor([len(images.split.rows) for images in several]).cumsum(0).tolist()]
    numbers = [images.numbers + start for images, start in zip(several, starts, strict=False)]
    rows = datasets.concatenate_datasets([images.split.rows for images in several])
    return ImageRows(first.split._replace(rows=rows, images=len(rows)), torch.cat(numbers), labels)


def hold_out(images: Any, per_class: int | float) -> tuple[Images, Images]:
    """Divides a split into training and validation images, the same share of each class; always the same ones.

    The seed is fixed, and not the run's, so that runs of several seeds share one validation set.

    Args:
        images: The split.
        per_class: Images of each class, or as a float their share: of two images or more at least one, and never all.

    Raises:
        UserError: If nothing would be left of a class, or nothing is held out.
    """
    if isinstance(images, Split):
        raise UserError('--streaming without --in-memory can not hold out images; name a --val-split')
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held = torch.zeros(len(images), dtype=torch.bool)
    for label, name in enumerate(images.class_names):
        of_class = order[images.labels[order] == label]
        if isinstance(per_class, float):
            count = min(max(1, round(per_class * len(of_class))), max(0, len(of_class) - 1))
        else:
            count = per_class
            if len(of_class) <= count:
                raise UserError(f'--val-per-class {count} leaves nothing of class {name!r} to train; hold out fewer, '
                                'or a share with --val-fraction')
        held[of_class[:count]] = True
    if not held.any():
        raise UserError('no class has two training images, so that none can be held out; name a --val-split')
    return images[~held], images[held]


class LoadedData(NamedTuple):
    """What a training looks at.

    Attributes:
        images: `train`, `val` and `test`.
        class_names: Of the labels.
        selects: Whether the validation images select weights; not where they are the test images.
        record: What results.json says of it: `dataset`, the name; `data`, where it comes from; what was `held_out`; and
            the `test_split`.
    """
    images: dict[str, Images]
    class_names: list[str]
    selects: bool
    record: dict[str, Any]


def load_splits(source: SourceSettings, splits: SplitSettings, settings: ImageSettings, accelerator: Accelerator,
                channels: int = 3, progress: bool = False) -> LoadedData:
    """Opens and loads the data. What is held out for validation comes out of the training images, never of the test.

    Args:
        source: The data set.
        splits: Its splits.
        settings: How they are loaded.
        accelerator: One of its processes looks for the files.
        channels: 3, or 1 for grey.
        progress: Show a bar while images are decoded.

    Raises:
        UserError: If they can't be used, or don't go together.
    """
    data = open_data(source, accelerator)
    if splits.epoch_size is not None and (settings.in_memory or not source.streaming):
        raise UserError(f'--epoch-size {splits.epoch_size} is for --streaming without --in-memory; leave it out')
    loaded: dict[str, Any] = {}

    def load(split: str) -> Any:
        if split not in loaded:
            opened = open_split(data, source, split)
            if not loaded:
                _check_plain(opened)
            else:  # the first one's names count for all
                opened = rename_classes(opened, next(iter(loaded.values())).class_names, 'training')
            loaded[split] = load_images(opened, settings, channels, progress)
        return loaded[split]

    val_split = _find(data, splits.val_split, 'validation')
    test_split = _find(data, splits.test_split, 'test')
    joined = [load(data.find(split)) for split in splits.train_split.split('+')]
    if splits.epoch_size is not None and not isinstance(joined[0], Split):
        raise UserError(f'--epoch-size {splits.epoch_size} is for streams, and {data.where} is none; leave it out')
    classes = len(joined[0].class_names)
    check_classes(settings, classes)
    if classes < 2:
        raise UserError(f'{data.where} has one class, {joined[0].class_names[0]!r}: there is nothing to tell apart; '
                        'give each class a folder of its own, or choose the labels with --target-key')
    if val_split is not None:
        train, val, held_out = concatenate(joined), load(val_split), 'validation split'
    else:
        train, val, held_out = _divide(joined, splits)
    selects = test_split not in (None, val_split)
    test = val if test_split is None else load(test_split)
    if not selects:
        held_out = 'nothing: the last epoch counts' if test_split else f'{held_out}, and tested: the last epoch counts'
    images = dict(train=train, val=val, test=test)
    for name, of_split in images.items():
        if image_size(of_split) != image_size(train):
            raise UserError(f'{name} images are {image_size(of_split)} px, those of training {image_size(train)}; '
                            'resize with --img-size')
    origin = dict(data.origin)
    if settings.in_memory:
        origin['content'] = _digest([f'{split} {loaded[split].content:x}' for split in sorted(loaded)])
    if 'fingerprint' in origin:
        origin['fingerprint'] = _digest([origin['fingerprint'], *train.class_names])
    return LoadedData(images, train.class_names, selects, dict(
        dataset=_claim(source, origin), data=origin, held_out=held_out,
        test_split=test_split or val_split or splits.train_split))


def _check_plain(split: Split) -> None:
    """Raises UserError if a plain column has about as many values as rows, as a caption has."""
    classes = len(split.class_names)
    if split.plain_key is not None and 2 * classes > max(split.images or 0, 4):
        raise UserError(f'{split.where}: column {split.plain_key!r} holds {classes} different values in {split.images} '
                        'rows, which are no classes; choose another with --target-key, or make it a ClassLabel')


def _find(data: DataSet, split: str | None, default: str) -> str | None:
    """The name of a split; 'auto' is `default`, or None where there is no such split."""
    if split == 'auto':
        split = default if default in data.splits else None
    return None if split is None else data.find(split)


def _divide(joined: Sequence[Any], splits: SplitSettings) -> tuple[Images, Images, str]:
    """Training and validation images of the training splits, and what was held out in words."""
    if splits.val_fraction is not None:
        if splits.val_per_class != SplitSettings().val_per_class:
            raise UserError(f'--val-per-class {splits.val_per_class} and --val-fraction {splits.val_fraction} hold out '
                            'twice; give one')
        shares: list[Any] = [splits.val_fraction] * len(joined)
        held_out = f'{100 * splits.val_fraction:g} % of each class'
    else:
        shares, held_out = splits.val_per_class, f'{splits.val_per_class} of each class'
    if len(shares) != len(joined):
        raise UserError(f'--val-per-class wants {len(joined)} numbers for --train-split {splits.train_split}, '
                        f'not {len(shares)}')
    divided = [hold_out(images, share) for images, share in zip(joined, shares, strict=True)]
    train, val = (concatenate(of_splits) for of_splits in zip(*divided, strict=True))
    return train, val, held_out


def _digest(lines: Sequence[str]) -> str:
    return hashlib.sha256('\n'.join(lines).encode()).hexdigest()


def _claim(source: SourceSettings, origin: dict[str, Any]) -> str:
    """The data set's name. A folder has the name of --dataset only if --fingerprint says that it is that data set."""
    if 'folder' not in origin:
        return (source.dataset or '').partition('@')[0]
    is_copy = source.fingerprint is not None and source.fingerprint in (origin['fingerprint'], origin.get('content'))
    return source.dataset if is_copy and source.dataset and is_public(source.dataset) else origin['folder']


def check_same_data(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises UserError if a run would go on with other data than it was begun with, as far as both can be told apart.

    Args:
        before: `data` of `LoadedData.record` when it was begun.
        now: Likewise, now.
    """
    for key in ('content', 'fingerprint', 'revision'):  # a copy elsewhere may have other files and the same content
        if before.get(key) and now.get(key):
            if before[key] != now[key]:
                raise UserError(f'the data is not that of the epochs before: its {key} is {now[key]:.12}, and was '
                                f'{before[key]:.12}; bring it back, or choose another --experiment')
            return
    if before and now and ('hub' in before) != ('hub' in now):
        raise UserError(f'the data was {before.get("hub") or before.get("folder")}, and is now '
                        f'{now.get("hub") or now.get("folder")}; nothing says that they are the same: give what the '
                        'run was begun with, or choose another --experiment')


def image_size(images: Images) -> tuple[int, ...]:
    """(H, W) in pixels; of large images, which are cropped to the network's size, nothing."""
    return tuple(images.images.shape[2:]) if isinstance(images, ImageSet) else ()
