"""One split: its columns, found by their types, and a class for each label."""
from collections.abc import Sequence
from typing import Any, NamedTuple

import datasets
import pyarrow.compute as pc
import pyarrow.types as kinds
import torch

from harness.data.sources import DataSet, Rows, SourceSettings
from harness.errors import UserError


class Split(NamedTuple):
    """One split, its images not yet decoded.

    Attributes:
        rows: The data set, with the columns `image` (dict of bytes and path) and `label`.
        labels: (N,) int64, checked; None for a stream, whose rows are checked as they come.
        class_names: Of the labels.
        where: Names it in error messages.
        images: Their number; None where a stream doesn't tell.
        label_map: Of a stream that counts its classes in another order: the label here of each of its labels.
        plain_key: The column whose values are the classes, where it says no names.
    """
    rows: Rows
    labels: torch.Tensor | None
    class_names: list[str]
    where: str
    images: int | None
    label_map: list[int] | None = None
    plain_key: str | None = None

    def read_labels(self, labels: Sequence[int | None], first_row: int = 0) -> torch.Tensor:
        """The labels (N,) that rows of a stream hold, checked, and counted as `class_names` are."""
        if self.label_map is None:
            return check_labels(labels, len(self.class_names), self.where, first_row)
        return torch.tensor(self.label_map)[check_labels(labels, len(self.label_map), self.where, first_row)]


def _describe(features: datasets.Features) -> str:
    return ', '.join(f'{name} ({feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__})'
                     for name, feature in features.items())


def _is_plain(feature: Any) -> bool:
    """Whether a column holds integers, strings or truth values, which can name classes."""
    if not isinstance(feature, datasets.Value):
        return False
    kind = feature.pa_type
    return kinds.is_integer(kind) or kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_boolean(kind)


def _holds_files(feature: Any) -> bool:
    """Whether a column holds encoded images without saying so, as parquet files of other writers do."""
    if isinstance(feature, dict):
        return feature.keys() == {'bytes', 'path'}
    return isinstance(feature, datasets.Value) and (
        kinds.is_binary(feature.pa_type) or kinds.is_large_binary(feature.pa_type))


def _choose(found: Sequence[str], given: str | None, flag: str, what: str, features: datasets.Features) -> str:
    """The only column of a type, or the one that `flag` names."""
    if given is not None:
        if given not in found:
            raise UserError(f'{flag} {given!r} is no column of {what}; the columns are {_describe(features)}')
        return given
    if len(found) != 1:
        raise UserError(f'{len(found)} columns of {what} ({", ".join(found) or "none"}) among '
                        f'{_describe(features)}; choose with {flag}')
    return found[0]


def _find_columns(features: datasets.Features, source: SourceSettings) -> tuple[str, str]:
    """The columns of the images and of the labels."""
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)] or \
        [name for name, feature in features.items() if _holds_files(feature)]
    image = _choose(images, source.input_key, '--input-key', 'type Image', features)
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    plain = [name for name, feature in features.items() if _is_plain(feature)]
    if source.target_key is not None or not labels:
        labels += plain
    return image, _choose(labels, source.target_key, '--target-key', 'type ClassLabel, integer or string', features)


def check_labels(labels: Sequence[int | None], classes: int, where: str, first_row: int = 0) -> torch.Tensor:
    """The labels as a tensor (N,) int64.

    Args:
        labels: As the data has them.
        classes: Number of classes.
        where: Names the split in errors.
        first_row: The number of the first label's row.

    Raises:
        UserError: If one is missing or beyond the classes.
    """
    for row, label in enumerate(labels, first_row):
        if label is None or not 0 <= label < classes:
            given = 'has no label' if label is None else f'has the label {label}'
            raise UserError(f'{where}: row {row} {given}, where classes go from 0 to {classes - 1}; mend or remove it')
    return torch.tensor(labels, dtype=torch.int64)


def _encode(values: list[Any]) -> tuple[list[int | None], list[str]]:
    """Labels and class names of a plain column; the classes are its values, sorted. -1 and '' mean no label."""
    has_none = [value is None or value == '' or not isinstance(value, str) and value < 0 for value in values]
    found = sorted({value for value, without in zip(values, has_none, strict=True) if not without})
    labels = {value: label for label, value in enumerate(found)}
    return [None if without else labels[value] for value, without in zip(values, has_none, strict=True)], \
        [str(value) for value in found]


def _missing_image(rows: datasets.Dataset) -> int | None:
    """The first row without an image, found without reading any."""
    start = 0
    for chunk in rows.data.column('image').chunks:
        content, path = chunk.flatten()
        missing = pc.indices_nonzero(pc.and_(content.is_null(), path.is_null()))
        if len(missing):
            return start + missing[0].as_py()
        start += len(chunk)
    return None


def open_split(data: DataSet, source: SourceSettings, split: str) -> Split:
    """Finds the columns of one split by their types, and checks its labels.

    Raises:
        UserError: If there is no such split or column, or a row lacks its image or its label.
    """
    name = data.find(split)
    rows, where = data.splits[name], f'{data.where}, split {name!r}'
    if rows.features is None:  # some streams tell them only when they are read
        rows = rows._resolve_features()
    features = rows.features
    image_key, label_key = _find_columns(features, source)
    told = (rows.info.splits or {}).get(name)
    rows = rows.select_columns([image_key, label_key])
    for column, ours in ((image_key, 'image'), (label_key, 'label')):
        if column != ours:  # a stream can't rename a column to its own name
            rows = rows.rename_column(column, ours)
    rows = rows.cast_column('image', datasets.Image(decode=False))
    has_names = isinstance(features[label_key], datasets.ClassLabel)
    if isinstance(rows, datasets.IterableDataset):
        if not has_names:
            raise UserError(f'{where}: column {label_key!r} does not say which classes there are, and a stream can not '
                            'be asked; leave out --streaming, or make it a ClassLabel')
        return Split(rows, None, features[label_key].names, where, told and told.num_examples)
    values = rows['label'][:]
    labels, class_names = (values, features[label_key].names) if has_names else _encode(values)
    if not labels:
        raise UserError(f'{where} holds no images')
    checked = check_labels(labels, len(class_names), where)
    missing = _missing_image(rows)
    if missing is not None:
        raise UserError(f'{where}: row {missing} has no image; remove it')
    return Split(rows, checked, class_names, where, len(checked), plain_key=None if has_names else label_key)


def rename_classes(split: Split, class_names: list[str], whose: str) -> Split:
    """The split with its labels counted as `class_names` are, by name; it may lack some of them.

    Args:
        split: What is renamed.
        class_names: The names in their order.
        whose: Names them in the error.

    Raises:
        UserError: If images have a class that isn't among them.
    """
    if split.class_names == class_names:
        return split
    numbers = {name: number for number, name in enumerate(class_names)}
    label_map = [numbers.get(name, -1) for name in split.class_names]
    labels = None
    if split.labels is not None:
        labels = torch.tensor(label_map)[split.labels]
        unknown = sorted({split.class_names[label] for label in split.labels[labels < 0].tolist()})
    else:
        unknown = sorted(set(split.class_names) - numbers.keys())
    if unknown:
        raise UserError(f'{split.where} has {len(unknown)} classes that {whose} does not know, such as '
                        f'{unknown[0]!r}; it knows {len(class_names)}, such as {class_names[0]!r}: give the classes '
                        'the same names, or choose other data')
    return split._replace(labels=labels, class_names=class_names, label_map=label_map)
