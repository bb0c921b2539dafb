"""Folders of pictures, FOLDER/train/CLASS/*.jpg, opened without looking into a file.

The rules are torchvision's ImageFolder's: a class is a folder, and what lies anywhere below it belongs to it.
`datasets` opens such folders too, but takes far longer, and at each start.
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

# Names of splits, as timm and `datasets` have them.
SPLIT_NAMES = dict(train='train', training='train', validation='validation', val='validation', valid='validation',
                   dev='validation', eval='validation', test='test', testing='test')


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


def _first_picture(folder: Path) -> str | None:
    """The name of a picture that lies in a folder, not below it."""
    return next((name for name in sorted(os.listdir(folder)) if _is_picture(name)), None)


def _is_picture(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith('.')


def _split_folders(root: Path) -> dict[str, Path]:
    """The folder of each split. Where no folder is one, the classes lie in `root`, which is `train`."""
    inside = {name: _subfolders(root / name) for name in _subfolders(root)}
    if not any(inside[name] for name in inside if name.lower() in SPLIT_NAMES):
        _check_classes(root, inside)
        return dict(train=root)
    found: dict[str, Path] = {}
    for name, classes in inside.items():
        if classes:
            split = split_name(name)
            if split in found:
                raise UserError(f'{root}: both {found[split].name}/ and {name}/ are the split {split!r}; rename one')
            found[split] = root / name
    return found


def _check_classes(root: Path, inside: dict[str, list[str]]) -> None:
    """Raises UserError if the folders in `root` are splits rather than classes.

    Args:
        root: The data set's folder.
        inside: Its folders, and the folders in each.
    """
    first, *others = inside.values() or [[]]
    if first and others and all(names == first for names in others):
        raise UserError(f'{root}: all of {", ".join(f"{name}/" for name in list(inside)[:3])} hold the folders '
                        f'{", ".join(first[:3])}: if they are splits, call them train/, validation/ and test/')
    if inside and all(name.lower() in SPLIT_NAMES for name in inside):
        folder = root / next(iter(inside))
        if _first_picture(folder) and not any(folder.glob('metadata.*')):  # of which `datasets` takes the labels
            raise UserError(f'{folder} holds pictures without class folders; put each class into a folder')


def find_pictures(root: Path) -> tuple[dict[str, Pictures], str] | None:
    """The pictures of each split and the fingerprint of all; None if these are no class folders of pictures.

    Args:
        root: Of FOLDER/SPLIT/CLASS/*.jpg, or of FOLDER/CLASS/*.jpg.

    Raises:
        UserError: If a folder can't be read, a class folder is empty, or a picture lies beside the class folders.
    """
    if any(root.glob('*.parquet')) or any(root.glob('*/*.parquet')):  # the picture of a README is no data
        return None
    try:
        splits = {split: pictures for split, folder in _split_folders(root).items()
                  if (pictures := _find_split(root, folder)) is not None}
    except OSError as error:
        raise UserError(f'{error.filename} can not be read ({error.strerror}); remove it, or give it back') from error
    if not splits:
        return None
    return splits, fingerprint(root, (path for pictures in splits.values() for path in pictures.paths))


def _find_split(root: Path, folder: Path) -> Pictures | None:
    """The pictures of one split, or None if there are none."""
    class_names = _subfolders(folder)
    if not class_names:
        return None
    classes = {name: label for label, name in enumerate(class_names)}
    found = make_dataset(str(folder), classes, extensions=IMG_EXTENSIONS, allow_empty=True)
    start = len(str(root)) + 1
    # Hidden files and folders are left by tools: previews, copies of what was looked at.
    shown = [(path[start:], label) for path, label in found if '/.' not in path[start:]]
    if not shown:
        return None
    empty = sorted(set(classes.values()) - {label for _, label in shown})
    if empty:
        raise UserError(f'{folder / class_names[empty[0]]} is a class folder without a picture '
                        f'({" ".join(IMG_EXTENSIONS)}); fill it, or remove it')
    stray = _first_picture(folder)
    if stray is not None:
        raise UserError(f'{folder / stray} lies beside the class folders; move it into one, or away')
    return Pictures([path for path, _ in shown], [label for _, label in shown], class_names)


def as_dataset(root: Path, pictures: Pictures) -> datasets.Dataset:
    """The pictures as a data set with the columns `image`, its files unopened, and `label`."""
    paths = pa.array([f'{root}/{path}' for path in pictures.paths])
    images = pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), paths], names=['bytes', 'path'])
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=pictures.class_names))
    return datasets.Dataset(pa.table(dict(image=images, label=pa.array(pictures.labels, pa.int64()))),
                            info=datasets.DatasetInfo(features=features))
