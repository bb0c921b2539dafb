"""Folders of pictures, FOLDER/train/CLASS/*.jpg, opened without looking into a file.

The rules are torchvision's ImageFolder's: a class is a folder, and what lies anywhere below it belongs to it.
`datasets` opens such folders too, but takes 20 s for 20,000 files, at each start.
"""
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow as pa
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from harness.errors import UserError

# Other names of splits, as timm and `datasets` have them.
SPLIT_NAMES = dict(training='train', val='validation', valid='validation', dev='validation', eval='validation',
                   testing='test')


class Pictures(NamedTuple):
    """The pictures of one split.

    Attributes:
        paths: Below the data set's folder, class by class.
        labels: Of each.
        class_names: The names of the class folders, sorted.
    """
    paths: list[str]
    labels: list[int]
    class_names: list[str]


def fingerprint(root: Path, paths: Iterable[str]) -> str:
    """A digest of the names and sizes of files.

    Raises:
        UserError: If one can't be looked at, such as a link to nothing, or has a name that is no text.
    """
    digest = hashlib.sha256()
    try:
        for path in sorted(paths):
            size = os.path.getsize(f'{root}/{path}')  # pathlib would take longer than the disk
            digest.update(f'{path}\t{size}\n'.encode())
    except OSError as error:
        raise UserError(f'{error.filename} can not be read ({error.strerror}); remove it, or bring it back') from error
    except UnicodeEncodeError as error:
        raise UserError(f'{root}: the name {error.object!r} is no UTF-8; rename the file or its folder') from error
    return digest.hexdigest()


def split_name(name: str) -> str:
    """The one name of a split: `val` is `validation`."""
    return SPLIT_NAMES.get(name.lower(), name)


def _subfolders(folder: Path) -> list[str]:
    """Their names, sorted; without hidden ones, which no class is."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith('.'))


def _split_folders(root: Path) -> dict[str, Path]:
    """The folder of each split. Where no folder has the name of one, the classes lie in `root`, which is `train`."""
    found: dict[str, Path] = {}
    known = {'train', *SPLIT_NAMES.values()}
    names = _subfolders(root)
    if not any(split_name(name) in known and _subfolders(root / name) for name in names):
        return dict(train=root)
    for name in names:
        if _subfolders(root / name):
            split = split_name(name)
            if split in found:
                raise UserError(f'{root}: both {found[split].name}/ and {name}/ are the split {split!r}; rename one')
            found[split] = root / name
    return found


def find_pictures(root: Path) -> tuple[dict[str, Pictures], str] | None:
    """The pictures of each split and the fingerprint of all; None if these are no class folders of pictures.

    Args:
        root: Of FOLDER/SPLIT/CLASS/*.jpg, or of FOLDER/CLASS/*.jpg.

    Raises:
        UserError: If a class folder is empty, or a picture lies beside the class folders.
    """
    if any(root.glob('*.parquet')) or any(root.glob('*/*.parquet')):  # the picture of a README is no data
        return None
    splits: dict[str, Pictures] = {}
    for split, folder in _split_folders(root).items():
        class_names = _subfolders(folder)
        classes = {name: label for label, name in enumerate(class_names)}
        if not classes:
            continue
        try:
            found = make_dataset(str(folder), classes, extensions=IMG_EXTENSIONS, allow_empty=True)
        except OSError as error:
            raise UserError(f'{error.filename} can not be read ({error.strerror})') from error
        if not found:
            continue
        empty = sorted(set(classes.values()) - {label for _, label in found})
        if empty:
            raise UserError(f'{folder / class_names[empty[0]]} is a class folder without a picture '
                            f'({" ".join(IMG_EXTENSIONS)}); fill it, or remove it')
        stray = next((name for name in sorted(os.listdir(folder)) if name.lower().endswith(IMG_EXTENSIONS)), None)
        if stray is not None:
            raise UserError(f'{folder / stray} lies beside the class folders; move it into one, or away')
        start = len(str(root)) + 1
        splits[split] = Pictures([path[start:] for path, _ in found], [label for _, label in found], class_names)
    if not splits:
        return None
    return splits, fingerprint(root, (path for pictures in splits.values() for path in pictures.paths))


def as_dataset(root: Path, pictures: Pictures) -> datasets.Dataset:
    """The pictures as a data set with the columns `image`, its files unopened, and `label`."""
    paths = pa.array([f'{root}/{path}' for path in pictures.paths])
    images = pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), paths], names=['bytes', 'path'])
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=pictures.class_names))
    return datasets.Dataset(pa.table(dict(image=images, label=pa.array(pictures.labels, pa.int64()))),
                            info=datasets.DatasetInfo(features=features))
