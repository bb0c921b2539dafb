"""Where images come from: a Hub data set, a local folder of pictures or of files, or scikit-learn's digits."""
import os
import re
import socket
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import datasets
import huggingface_hub
import numpy as np
from accelerate import Accelerator
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import httpx
from PIL import Image

from harness.cli import flag
from harness.data.folders import as_dataset, find_pictures, fingerprint, split_name
from harness.errors import UserError, one_line, user_errors
from harness.ranks import check_same, first_on_each_machine, from_main_process
from timm_sd.asking import LOG_IN, check_token, patiently, status_of

Rows: TypeAlias = datasets.Dataset | datasets.IterableDataset


@dataclass(frozen=True)
class SourceSettings:
    """Data set."""
    dataset: str | None = flag(None, "Hub data set ORG/NAME[@REVISION], local folder, or 'digits', which ships with "
                                     'scikit-learn')
    dataset_config: str | None = flag(None, 'configuration of a Hub data set that has several')
    data_dir: str | None = flag(None, 'local folder to load instead of --dataset: train/CLASS/*.jpg, or parquet files')
    fingerprint: str | None = flag(None, 'of --dataset: a --data-dir that has it counts as that data set (results.json '
                                         'has those of a run, under data)')
    streaming: bool = flag(False, 'read a data set as it comes in, without a copy on the disk')
    input_key: str | None = flag(None, 'column of the images; found by its type if there is only one')
    target_key: str | None = flag(None, 'column of the labels; found by its type if there is only one')

    @property
    def name(self) -> str:
        """The folder or the data set."""
        return self.data_dir or self.dataset or ''


def is_public(dataset: str) -> bool:
    """Whether --dataset can be the name of one on the Hub, not a path of this machine."""
    return re.fullmatch(r'[\w-]+/[\w.-]+(@[\w./-]+)?|digits', dataset) is not None


class DataSet(NamedTuple):
    """A data set, open.

    Attributes:
        splits: Each with all its columns.
        where: Names it in error messages.
        origin: What results.json says of it: `hub` and its `revision` (None where the Hub gave no answer); or `folder`,
            the last part of its name, and the `fingerprint` of its files' names and sizes; or `package`.
    """
    splits: dict[str, Rows]
    where: str
    origin: dict[str, Any]

    def find(self, split: str) -> str:
        """The name here of a split, `validation` for `val`; UserError if there is none."""
        for name in (split, split_name(split)):
            if name in self.splits:
                return name
        raise UserError(f'{self.where} has no split {split!r}; it has {", ".join(self.splits)}')


def _digits() -> datasets.DatasetDict:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels as a data set with a train and a test split."""
    from sklearn.datasets import load_digits
    digits = load_digits()
    pictures = [Image.fromarray((image * 15.9375).astype(np.uint8)).convert('RGB') for image in digits.images]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=[str(n) for n in range(10)]))
    data = datasets.Dataset.from_dict(dict(image=pictures, label=digits.target), features=features)
    return data.train_test_split(test_size=360, seed=0, stratify_by_column='label')


def _ask_hub(name: str, revision: str | None) -> str | None:
    """Asks the Hub one quick question: the commit that a revision of a data set means; None without a quick answer.

    Raises:
        UserError: If the Hub answers that there is no such data set or revision, or the token can be none.
    """
    with user_errors(f'data set {name!r}'):
        check_token()
    try:
        return patiently(lambda: huggingface_hub.HfApi().dataset_info(name, revision=revision, timeout=3)).sha
    except RevisionNotFoundError as error:
        raise UserError(f'data set {name!r} has no revision {revision!r} on the Hub') from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(f'no data set {name!r} on the Hub, or it is private; {LOG_IN}') from error
    except (httpx.HTTPError, OSError) as error:  # unreachable, silent, 5xx, or HF_HUB_OFFLINE
        if status_of(error) in (401, 403):
            raise UserError(
                f'data set {name!r}: the Hub does not accept the token ({status_of(error)}); {LOG_IN}') from error
        return None


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


def _load(path: str, where: str, **kwargs: Any) -> dict[str, Rows]:
    """The splits of a Hub data set or of a folder of files, by `datasets`."""
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are told in one line here
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        return dict(datasets.load_dataset(path, **kwargs))
    except ConnectionError as error:
        raise UserError(f'{where}: the Hub is unreachable and it is not in the cache; '
                        'give a local folder with --data-dir') from error
    except Exception as error:  # readers raise many kinds on a corrupt file
        raise UserError(f'{where} can not be read: {one_line(error.__cause__ or error, 200)}') from error


def _files(root: Path) -> Iterator[str]:
    """The files below a folder that aren't hidden."""
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith('.')]
        yield from (os.path.relpath(os.path.join(folder, name), root) for name in names if not name.startswith('.'))


def _open_folder(name: str, source: SourceSettings, where: str, accelerator: Accelerator) -> DataSet:
    """A local folder. The main process looks through its files, and tells the others; each machine has a copy."""
    root = Path(os.path.abspath(name))
    found = from_main_process(accelerator, partial(find_pictures, root))
    pictures, digest = found or ({}, from_main_process(accelerator, lambda: fingerprint(root, _files(root))))
    paths = [path for of_split in pictures.values() for path in of_split.paths]

    def compare() -> None:
        is_copy = accelerator.is_local_main_process and not accelerator.is_main_process
        if is_copy and fingerprint(root, paths or _files(root)) != digest:
            raise UserError(f'{where} on {socket.gethostname()} has other files than that of process 0: copy it anew')
    first_on_each_machine(accelerator, compare)
    origin = dict(folder=root.name, fingerprint=digest)
    if pictures:
        return DataSet({split: as_dataset(root, of_split) for split, of_split in pictures.items()}, where, origin)

    def load() -> dict[str, Rows]:
        config = source.dataset_config
        if config is not None and config not in datasets.get_dataset_config_names(name):
            config = None  # the configuration is the recipe's Hub data set's; this folder holds bare files
        return _load(name, where, name=config, streaming=source.streaming)
    return DataSet(first_on_each_machine(accelerator, load), where, origin)


def open_data(source: SourceSettings, accelerator: Accelerator) -> DataSet:
    """Opens a data set.

    Args:
        source: Which.
        accelerator: One of its processes looks, the others are told.

    Raises:
        UserError: If it can't be found or read.
    """
    where = f'data set {source.name!r}'
    if not source.name:
        raise UserError('neither --dataset nor --data-dir is given')
    is_folder = Path(source.name).is_dir() and (source.data_dir is not None or source.dataset != 'digits')
    check_same(accelerator, {'the data as a local folder': 'found' if is_folder else 'not found'})
    if is_folder:
        return _open_folder(source.name, source, where, accelerator)
    name, _, revision = source.name.partition('@')
    if source.data_dir or name.startswith(('.', '/', '~')) or name.count('/') > 1:
        raise UserError(f'data set folder {name!r} does not exist; give a folder of class folders or of parquet files, '
                        'or a Hub data set')
    if name == 'digits':
        return DataSet(dict(_digits()), where, dict(package='scikit-learn'))
    commit = from_main_process(accelerator, lambda: _ask_hub(name, revision or None))
    load = partial(_load, name, where, name=source.dataset_config, streaming=source.streaming,
                   revision=commit or revision or None)
    with nullcontext() if commit else _cache_alone():
        splits = first_on_each_machine(accelerator, load)
    return DataSet(splits, where, dict(hub=name, revision=commit))


def read_batches(batches: Iterable[Any], where: str) -> Iterator[Any]:
    """The batches. An error of a damaged or unreachable file becomes a UserError."""
    try:
        yield from batches
    except UserError:
        raise
    except Exception as error:
        raise UserError(f'{where} can not be read: {one_line(error.__cause__ or error, 200)}') from error
