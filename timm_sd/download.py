"""A file of a Hub repository as a local one, asked for with patience and a time limit, and of the right checksum."""
import os
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx, tqdm

from .asking import LOG_IN, Refused, check_token, hide_password, patiently, status_of
from .weight_files import checksum

WEIGHTS_FILE = 'model.safetensors'
TIMEOUT_SECONDS = 1.5  # of the quick question; the client asks twice
SILENCE_SECONDS = 40.  # in a download; a slow one goes on
CHUNK_BYTES = 2 ** 18  # by which its progress bar moves; the client's 10 MB are more than most of our files have

Result = TypeVar('Result')


def _unless_silent(call: Callable[[type], Result], blobs: Path) -> Result:
    """What `call` gives; TimeoutError once nothing has come of it for `SILENCE_SECONDS`.

    A thread that is given up ends when the client does. The chunks of all downloads of this process are made smaller.

    Args:
        call: Takes the class of its progress bar.
        blobs: Where the file grows; where another process downloads it, this one waits.
    """
    done, moved, grown = queue.SimpleQueue[Any](), [0], 0
    constants.DOWNLOAD_CHUNK_SIZE = CHUNK_BYTES

    class Bar(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            moved[0] += 1
            return super().update(n)

    def run() -> None:
        try:
            done.put((call(Bar), None))
        except BaseException as error:
            done.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    seen, since = (0, 0), time.monotonic()
    while True:
        try:
            result, error = done.get(timeout=0.1)
        except queue.Empty:
            with suppress(OSError):  # it was moved meanwhile
                grown = sum(part.stat().st_size for part in blobs.glob('*.incomplete'))
            if (moved[0], grown) != seen:
                seen, since = (moved[0], grown), time.monotonic()
            elif time.monotonic() - since > SILENCE_SECONDS:
                raise TimeoutError(f'nothing came for {SILENCE_SECONDS:.0f} s') from None
        else:
            if error is not None:
                raise error
            return result


def _reason(error: Exception) -> str:
    """What to do about an error of the Hub's client, whose own text has many lines and no file in it."""
    status = status_of(error)
    if isinstance(error, (Refused, HFValidationError)):
        return ' '.join(str(error).split())
    if isinstance(error, GatedRepoError):
        return 'access must be asked for on its page'
    if isinstance(error, RevisionNotFoundError):
        return 'there is no such revision'
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return 'there is no such file; weights other than safetensors are not loaded'
    if isinstance(error, RepositoryNotFoundError):
        return f'there is no such repository, or it is private: {LOG_IN}'
    if isinstance(error, OfflineModeIsEnabled):
        return 'HF_HUB_OFFLINE is set, and the cache has no such file'
    if status in (401, 403):
        return f'the Hub does not accept the token ({status}): {LOG_IN}'
    if isinstance(error, OSError) and error.filename is not None:  # of this machine
        return f'{error.strerror}: {error.filename}'
    how = f'answers {status}' if status else f'does not answer as it should ({type(error).__name__})'
    return f'the Hub {how}; try later'


# --- files


def _check_sum(path: str, etag: str | None) -> None:
    """Raises OSError, and removes the file, if it isn't what the Hub names; the cache alone would give it for good."""
    blob = path
    if os.path.islink(path):  # to a file that has the checksum as its name
        blob = os.path.join(os.path.dirname(path), os.readlink(path))
        etag = os.path.basename(blob)
    if etag is None or len(etag) not in (40, 64) or checksum(path, etag) == etag:
        return
    for damaged in (blob, path):
        Path(damaged).unlink(missing_ok=True)
    raise Refused(f'what came has another checksum than the Hub names, {etag[:12]}...; it was removed; '
                  'load it again when the Hub can be reached')


def download(name: str, hub_id: str, cache_dir: str | None = None, file: str = WEIGHTS_FILE) -> str:
    """The local path of a file of a repository, with the checksum that the Hub names.

    A quick question comes first, so a Hub that can't be reached costs a few seconds; then what the cache holds must do.

    Args:
        name: The model's name, for the error.
        hub_id: 'ORG/NAME', or 'ORG/NAME@revision'.
        cache_dir: In place of the Hub's own cache.
        file: Its name.

    Raises:
        OSError: If the file can't be had, in one line.
    """
    repo, _, given = hub_id.partition('@')
    revision = given or None
    blobs = Path(cache_dir or constants.HF_HUB_CACHE, f'models--{repo.replace("/", "--")}', 'blobs')

    def ask() -> Any:
        return get_hf_file_metadata(hf_hub_url(repo, file, revision=revision), timeout=TIMEOUT_SECONDS)

    def fetch(force: bool) -> str:
        return patiently(lambda: _unless_silent(lambda bar: hf_hub_download(
            repo, file, revision=revision, cache_dir=cache_dir, force_download=force, tqdm_class=bar), blobs))

    try:
        check_token()
        cached = try_to_load_from_cache(repo, file, cache_dir, revision)
        try:
            etag = (ask() if isinstance(cached, str) else patiently(ask)).etag
        except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
            raise
        except (httpx.HTTPError, OSError):
            if not isinstance(cached, str):
                raise
            _check_sum(cached, None)
            return cached
        path = fetch(force=False)
        try:
            _check_sum(path, etag)
        except Refused:  # damaged in the cache, or in what several caches share, which `force` replaces
            path = fetch(force=True)
            _check_sum(path, etag)
        return path
    except (httpx.HTTPError, OSError, ValueError) as error:
        cause = error if hide_password(constants.ENDPOINT) == constants.ENDPOINT else None  # the address is in its text
        raise OSError(f'{name}: no {file} of {hub_id} from the Hub: {_reason(error)}') from cause
