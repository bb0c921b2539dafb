"""A repository folder as one commit on the Hub, of one publisher, on what he saw there."""
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import httpx

from harness.card import Comparison
from harness.cli import flag
from harness.errors import UserError, one_line, user_errors
from harness.hub_client import AskingOnce, limit_time
from harness.repository import write_repository
from timm_sd.asking import LOG_IN, RETRIED, WAITS, check_token, patiently, status_of
from timm_sd.download import download
from timm_sd.weight_files import checksum

TITLE = 'Weights, card and results'  # of our commits, by which a file that a person wrote is told from ours
OTHER_WEIGHTS = ('.bin', '.ckpt', '.gguf', '.h5', '.msgpack', '.npz', '.onnx', '.pkl', '.pt', '.pth', '.safetensors')


@dataclass(frozen=True)
class UploadSettings:
    """Upload."""
    private: bool = flag(False, 'create the repository as a private one')
    revision: str | None = flag(None, 'branch to commit to')
    create_pr: bool = flag(False, 'open a pull request')
    overwrite: bool = flag(False, 'replace a better run and a README.md that a person wrote, remove other weights')


@contextmanager
def _told(repo: str) -> Iterator[None]:
    """Whatever huggingface_hub raises becomes one line, with advice that fits."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of the client, of its threads, of the network, of a server's odd answer
        raise UserError(f'--repo {repo} can not be published: {_why(error)}') from error


def _why(error: BaseException) -> str:
    """What went wrong, and what to do."""
    cause, status = error, status_of(error)
    while isinstance(cause, RuntimeError) and cause.__cause__ is not None:  # a thread's, which names no reason
        cause = cause.__cause__
    if status is None:
        later = '; try again later' if isinstance(cause, (httpx.HTTPError, ConnectionError)) else ''
        return f'{one_line(cause)}{later}'
    said = getattr(cause, 'server_message', None)  # the client's own text has three lines, of which this is one
    advice = f'; {LOG_IN} to a token that may write there' if status in (401, 403) \
        else '; try again later' if status in RETRIED else ''
    return f'the Hub answers {status}{f" {one_line(said, 200)}" if said else ""}{advice}'


def _open(api: HfApi, repo: str, settings: UploadSettings) -> str:
    """The commit on which ours will stand; makes the repository and the branch if they aren't there.

    Raises:
        UserError: If the repository is public, and --private is given.
    """
    if settings.create_pr and settings.revision not in (None, 'main'):
        raise UserError(f'--create-pr opens a pull request to main, and --revision is {settings.revision}; give one')
    try:
        # This question ends after 3 s, so a Hub that does not answer is told soon.
        info = patiently(lambda: api.repo_info(repo, timeout=3))
    except RepositoryNotFoundError:
        patiently(lambda: api.create_repo(repo, private=settings.private, exist_ok=True))
        info = patiently(lambda: api.repo_info(repo))  # another publisher may have made it
    if settings.private and not info.private:
        raise UserError(f'--private is given, and {repo} is public: make it private in its settings, or choose '
                        'another --repo')
    if settings.revision and not settings.create_pr:
        branch = settings.revision
        patiently(lambda: api.create_branch(repo, branch=branch, exist_ok=True))
        info = patiently(lambda: api.repo_info(repo, revision=branch))
    return str(info.sha)


def _files(api: HfApi, repo: str, revision: str) -> dict[str, Any]:
    """The files of a commit by their paths, with `checksum` and the `title` of the last commit of each."""
    entries: list[Any] = patiently(lambda: [*api.list_repo_tree(repo, revision=revision, recursive=True, expand=True)])
    return {entry.path: dict(checksum=entry.lfs.sha256 if entry.lfs else entry.blob_id,
                             title=entry.last_commit.title if entry.last_commit else '')
            for entry in entries if hasattr(entry, 'blob_id')}


def _is_there(file: Path, there: dict[str, Any]) -> bool:
    """Whether a commit holds this file with this content."""
    known = there.get(file.name)
    return known is not None and checksum(str(file), known['checksum']) == known['checksum']


def _run_there(repo: str, revision: str) -> dict[str, Any]:
    """The results of the run that is there; empty where they tell none."""
    try:
        text = Path(download(repo, f'{repo}@{revision}', file='results.json')).read_text(encoding='utf-8')
        results = json.loads(text)
        return dict(model=str(results['model']), dataset=str(results['dataset']),
                    val_top1_err=float(results['val_top1_err']))
    except (ValueError, LookupError, TypeError, RecursionError):
        return {}


def _compare_runs(there: dict[str, Any], ours: dict[str, Any], may_replace: bool) -> str:
    """What is said of the run that ours replaces.

    Raises:
        UserError: If it is better by its validation error, of another network or data set, or unknown, and may not be
            replaced.
    """
    if not there and not may_replace:
        raise UserError('weights of an unknown run are there: give --overwrite to replace them, or --create-pr')
    if not there:
        return 'replaces the weights of an unknown run'
    theirs = f'{there["model"]} on {there["dataset"]}, validation error {there["val_top1_err"]} %'
    this_one = f'this one has {ours["val_top1_err"]} %'
    same = all(there[key].partition(mark)[0] == ours[key].partition(mark)[0] for key, mark in
               (('model', '.'), ('dataset', '@')))
    if not may_replace and (not same or there['val_top1_err'] < ours['val_top1_err']):
        raise UserError(f'{"a better run" if same else "another run"} is there, {theirs}; {this_one}: give --overwrite '
                        'to replace it, or --create-pr')
    return f'replaces {theirs}; {this_one}'


def _plan(folder: Path, there: dict[str, Any], run_there: dict[str, Any], results: dict[str, Any],
          settings: UploadSettings) -> tuple[list[Path], list[str], list[str]]:
    """What a commit does.

    Args:
        folder: What would be published.
        there: The files that are there.
        run_there: See `_run_there`.
        results: Of our run.
        settings: Flags.

    Returns:
        The files that are sent, those that are deleted, and what is said of them.

    Raises:
        UserError: See `_compare_runs`.
    """
    files = sorted(folder.iterdir())
    replaced = [file.name for file in files if file.name in there and not _is_there(file, there)]
    foreign = there.keys() - {file.name for file in files} - {'.gitattributes'}
    weights = sorted(name for name in foreign if name.endswith(OTHER_WEIGHTS))
    others = sorted(foreign - set(weights))
    deleted = weights if settings.overwrite else []
    may_replace, said = settings.overwrite or settings.create_pr, []
    if 'model.safetensors' in replaced:
        said.append(_compare_runs(run_there, results, may_replace))
    if 'README.md' in replaced and not there['README.md']['title'].startswith(TITLE) and not may_replace:
        replaced.remove('README.md')
        files = [file for file in files if file.name != 'README.md']
        said.append('keeps README.md, which a person wrote: --overwrite replaces it, --create-pr proposes to')
    if replaced:
        said.append(f'replaces {", ".join(replaced)}')
    if deleted:
        said.append(f'removes {", ".join(deleted)}')
    elif weights:
        said.append(f'keeps {", ".join(weights)}, which this run did not make: --overwrite removes such weights')
    if others:
        said.append(f'keeps {", ".join(others[:5])}{" ..." if len(others) > 5 else ""}')
    return files, deleted, said


def _commit(api: HfApi, repo: str, parent: str, files: list[Path], deleted: list[str], settings: UploadSettings) -> str:
    """One commit on `parent`; its id. Where no answer comes it looks whether the commit is there.

    Raises:
        UserError: If another commit came first, or nobody knows.
    """
    added = [CommitOperationAdd(file.name, str(file)) for file in files]
    patiently(lambda: api.preupload_lfs_files(repo, added, revision=settings.revision, create_pr=settings.create_pr,
                                              free_memory=False))

    def commit() -> str:
        return str(api.create_commit(
            repo, [*added, *map(CommitOperationDelete, deleted)], commit_message=TITLE, revision=settings.revision,
            parent_commit=parent, create_pr=settings.create_pr).oid)
    try:
        # After 5xx it may be there: a second commit would change nothing, but be a second pull request.
        return patiently(commit, (429,) if settings.create_pr else RETRIED)
    except Exception as error:
        status = status_of(error)
        if status is not None and status < 500 and status != 412:
            raise  # the Hub has refused it
        place = f'{constants.ENDPOINT}/{repo}'
        unknown = f'--repo {repo}: the commit had no good answer ({_why(error)}), and may still come: look at {place}'
        if settings.create_pr:
            raise UserError(f'{unknown}/discussions') from error
        try:
            now = _head_after(api, repo, parent, settings.revision)
            there = _files(api, repo, now)
        except Exception:
            now = parent
        if now == parent:
            raise UserError(f'{unknown}, or run this again, which changes nothing where it is') from error
        if all(_is_there(file, there) for file in files) and not there.keys() & set(deleted):
            return now
        raise UserError(f'--repo {repo}: another commit came meanwhile; look whether yours is under it, and run this '
                        'again if not') from error


def _head_after(api: HfApi, repo: str, parent: str, revision: str | None) -> str:
    """The newest commit; where it still is `parent`, after a while, in which ours may come."""
    for seconds in (*WAITS, None):
        now = str(api.repo_info(repo, revision=revision).sha)
        if now != parent or seconds is None:
            break
        time.sleep(seconds)
    return now


def upload(run_folder: Path, results: dict[str, Any], comparison: Comparison, repo: str,
           settings: UploadSettings) -> str:
    """Publishes a run as one commit, whole or not at all; says on stderr what it replaces and what it keeps.

    Files that are there already, unchanged, make no commit.

    Args:
        run_folder: Of the run.
        results: What `read_run` gave of it.
        comparison: What the card holds it against.
        repo: The Hub repository.
        settings: See `UploadSettings`.

    Returns:
        How to load it, and its hf_hub_id, a line each.

    Raises:
        UserError: If the Hub can't be reached, or refuses; if a better run is there, or one of another kind; if another
            publisher came first; if the repository is public, and --private is given.
    """
    api = HfApi()
    limit_time(AskingOnce)
    constants.HF_HUB_DISABLE_XET = True  # the client's other way to upload has no time limit
    with _told(repo), tempfile.TemporaryDirectory() as scratch:
        with user_errors(f'{run_folder} can not be published'):
            write_repository(run_folder, results, comparison, Path(scratch), repo)
        check_token()
        parent = _open(api, repo, settings)
        there = _files(api, repo, parent)
        run_there = _run_there(repo, parent) if 'results.json' in there else {}
        files, deleted, said = _plan(Path(scratch), there, run_there, results, settings)
        for line in said:
            print(one_line(f'{repo}: {line}', 500), file=sys.stderr, flush=True)
        oid = _commit(api, repo, parent, files, deleted, settings)
        if oid == parent:
            print(f'{repo}: holds all of it already, so there is no new commit', file=sys.stderr, flush=True)
    revision = f'@{oid}' if settings.create_pr else f'@{settings.revision}' if settings.revision else ''
    return (f"load it: timm.create_model('hf-hub:{repo}{revision}', pretrained=True)\n"
            f'hf_hub_id: {repo}@{oid}')
