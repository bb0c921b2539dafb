"""Where images come from: one split of a Hub data set, of a local folder, or of scikit-learn's digits."""
import io
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import huggingface_hub
import numpy as np
import torch
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import httpx
from PIL import Image

from harness.cli import flag
from harness.errors import UserError, one_line


@dataclass(frozen=True)
class SourceSettings:
    """Data set."""
    dataset: str | None = flag(None, "Hub data set ORG/NAME[@REVISION], folder of parquet files, or 'digits', which "
                                     'ships with scikit-learn')
    dataset_config: str | None = flag(None, 'configuration of a Hub data set that has several')
    data_dir: str | None = flag(None, 'local folder to load instead of --dataset')
    streaming: bool = flag(False, 'read a data set as it comes in, without a copy on the disk')
    input_key: str | None = flag(None, 'column of the images; found by its type if there is only one')
    target_key: str | None = flag(None, 'column of the labels; found by its type if there is only one')

    @property
    def name(self) -> str:
        """The folder or the data set."""
        return self.data_dir or self.dataset or ''


class Split(NamedTuple):
    """One split, its images not yet decoded.

    Attributes:
        rows: The data set, with the columns `image` (dict of bytes and path) and `label` (int).
        class_names: Of the labels.
        where: Names it in error messages.
        images: Their number; None where a stream doesn't tell.
    """
    rows: datasets.Dataset | datasets.IterableDataset
    class_names: list[str]
    where: str
    images: int | None


def _digits() -> datasets.DatasetDict:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels as a data set with a train and a test split."""
    from sklearn.datasets import load_digits
    digits = load_digits()
    pictures = [Image.fromarray((image * 15.9375).astype(np.uint8)).convert('RGB') for image in digits.images]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=[str(n) for n in range(10)]))
    data = datasets.Dataset.from_dict(dict(image=pictures, label=digits.target), features=features)
    return data.train_test_split(test_size=360, seed=0, stratify_by_column='label')


def _hub_answers(name: str, revision: str | None) -> bool:
    """Asks the Hub one quick question about a data set; False if no answer comes within seconds.

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
        return False
    return True


@contextmanager
def _cache_alone() -> Iterator[None]:
    """Within it `datasets`, in all threads of this process, reads its cache alone.

    It would ask a Hub that gives no answer for 30 seconds, and has no argument against that.
    """
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def load_split(source: SourceSettings, split: str) -> datasets.Dataset | datasets.IterableDataset:
    """One split of a Hub data set, of a local folder, or of 'digits', with all its columns.

    Raises:
        UserError: If it can't be found or read.
    """
    if not source.name:
        raise UserError('neither --dataset nor --data-dir is given')
    is_folder = Path(source.name).is_dir()
    name, _, revision = (source.name, '', '') if is_folder else source.name.partition('@')
    if not is_folder and (name.startswith(('.', '/', '~')) or name.count('/') > 1):
        raise UserError(f'data set folder {name!r} does not exist; give a folder of parquet files or a Hub data set')
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # load_split tells errors in one line
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    is_silent = not is_folder and name != 'digits' and not _hub_answers(name, revision or None)
    config = source.dataset_config
    try:
        if is_folder and config is not None and config not in datasets.get_dataset_config_names(name):
            config = None  # the configuration is the recipe's Hub data set's; this folder holds bare files
        with _cache_alone() if is_silent else nullcontext():
            splits = _digits() if name == 'digits' else datasets.load_dataset(
                name, config, revision=revision or None, streaming=source.streaming)
    except ConnectionError as error:
        raise UserError(f'data set {name!r}: the Hub is unreachable and it is not in the cache; '
                        'give a local folder with --data-dir') from error
    except Exception as error:  # readers raise many kinds on a corrupt file
        raise UserError(f'data set {name!r} can not be read: {one_line(error.__cause__ or error, 200)}') from error
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


def read_batches(batches: Iterable[Any], where: str) -> Iterator[Any]:
    """The batches. An error of a damaged or unreachable file becomes a UserError."""
    try:
        yield from batches
    except UserError:
        raise
    except Exception as error:
        raise UserError(f'{where} can not be read: {one_line(error.__cause__ or error, 200)}') from error


def check_labels(labels: torch.Tensor, split: Split) -> None:
    """Raises UserError unless there are labels (N,), each of them that of a class."""
    if not len(labels):
        raise UserError(f'{split.where} holds no images')
    if not 0 <= labels.min() <= labels.max() < len(split.class_names):
        raise UserError(f'{split.where}: labels go from {labels.min()} to {labels.max()}, classes from 0 to '
                        f'{len(split.class_names) - 1}')


def decode(encoded: dict[str, Any], where: str) -> Image.Image:
    """The RGB picture of an `image` of `Split`; UserError if it is damaged."""
    try:
        return Image.open(io.BytesIO(encoded['bytes']) if encoded['bytes'] else encoded['path']).convert('RGB')
    except OSError as error:
        raise UserError(f'{where} is damaged ({error})') from error


def open_split(source: SourceSettings, split: str) -> Split:
    """Opens one split and finds its columns by their types.

    Raises:
        UserError: If the data set or a column can't be found.
    """
    data = load_split(source, split)
    if data.features is None:  # some streams tell them only when they are read
        data = data._resolve_features()
    image_key = _column(data.features, datasets.Image, source.input_key, '--input-key')
    label_key = _column(data.features, datasets.ClassLabel, source.target_key, '--target-key')
    told = (data.info.splits or {}).get(split)
    images = len(data) if isinstance(data, datasets.Dataset) else told and told.num_examples
    rows = data.select_columns([image_key, label_key])
    for column, ours in ((image_key, 'image'), (label_key, 'label')):
        if column != ours:  # a stream can't rename a column to its own name
            rows = rows.rename_column(column, ours)
    return Split(rows.cast_column('image', datasets.Image(decode=False)), data.features[label_key].names,
                 f'data set {source.name!r}, split {split!r}', images)
