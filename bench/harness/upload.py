"""A repository folder as one commit on the Hub, of one publisher, on what he saw there."""
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError

from harness.card import Comparison
from harness.cli import flag
from harness.errors import UserError, one_line
from harness.repository import write_repository
from timm_sd.download import RETRIED, check_token, download, patiently, status_of
from timm_sd.weight_files import checksum

TITLE = 'Weights, card and results'  # of our commits, by which a file that a person wrote is told from ours
OTHER_WEIGHTS = ('.bin', '.ckpt', '.h5', '.msgpack', '.onnx', '.pt', '.pth', '.safetensors')


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
        cause: BaseException = error
        while isinstance(cause, RuntimeError) and cause.__cause__ is not None:  # a thread's, which names no reason
            cause = cause.__cause__
        status = status_of(error)
        # the client's text of a status has three lines, of which the server's words are one
        why = f'the Hub answers {status} {getattr(cause, "server_message", None) or ""}'.rstrip() if status \
            else one_line(cause)
        if status in (401, 403):
            why += '; log in with hf auth login, or set HF_TOKEN to a token that may write there'
        elif status is None and not isinstance(error, ValueError) or status in RETRIED:
            why += '; try again later'
        raise UserError(f'--repo {repo} can not be published: {why}') from error


def _open(api: HfApi, repo: str, settings: UploadSettings) -> str:
    """The commit on which ours will stand; makes the repository and the branch if they aren't there.

    Raises:
        UserError: If the repository is public, and --private is given.
    """
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


def _validation_error(repo: str, revision: str) -> float | None:
    """That of the run whose results are there; None where they tell none."""
    try:
        results = json.loads(Path(download(repo, f'{repo}@{revision}', file='results.json')).read_text())
        return float(results['val_top1_err'])
    except (ValueError, LookupError, TypeError):
        return None


def _plan(folder: Path, there: dict[str, Any], error_there: float | None, error: float,
          settings: UploadSettings) -> tuple[list[Path], list[str], list[str]]:
    """What a commit does.

    Args:
        folder: What would be published.
        there: The files that are there.
        error_there: The validation error of the run that is there.
        error: That of ours.
        settings: Flags.

    Returns:
        The files that are sent, those that are deleted, and what is said of them.

    Raises:
        UserError: If a better run would be replaced.
    """
    files = sorted(folder.iterdir())
    replaced = [file.name for file in files if file.name in there and not _is_there(file, there)]
    foreign = there.keys() - {file.name for file in files} - {'.gitattributes'}
    weights = sorted(name for name in foreign if name.endswith(OTHER_WEIGHTS))
    asked, deleted, said = settings.overwrite or settings.create_pr, [], []
    if 'model.safetensors' in replaced and error_there is not None:
        errors = f'a run with validation error {error_there:.2f} %; this one has {error:.2f} %'
        if error_there < error and not asked:
            raise UserError(f'a better run is there, {errors}: give --overwrite to replace it, or --create-pr')
        said.append(f'replaces {errors}')
    if 'README.md' in replaced and not there['README.md']['title'].startswith(TITLE) and not asked:
        replaced.remove('README.md')
        files = [file for file in files if file.name != 'README.md']
        said.append('keeps README.md, which a person wrote: --overwrite replaces it, --create-pr proposes to')
    if replaced:
        said.append(f'replaces {", ".join(replaced)}')
    if weights and settings.overwrite:
        deleted = weights
        said.append(f'removes {", ".join(weights)}')
    elif weights:
        said.append(f'keeps {", ".join(weights)}, which this run did not make: --overwrite removes such weights')
    others = sorted(foreign - set(weights))
    if others:
        said.append(f'keeps {", ".join(others[:5])}{" ..." if len(others) > 5 else ""}')
    return files, deleted, said


def _commit(api: HfApi, repo: str, parent: str, files: list[Path], deleted: list[str], settings: UploadSettings) -> str:
    """One commit on `parent`; its id. Where no answer comes it looks whether the commit is there.

    Raises:
        UserError: If another commit came first, or nobody knows.
    """
    def commit() -> str:
        return str(api.create_commit(
            repo, [*(CommitOperationAdd(file.name, str(file)) for file in files), *map(CommitOperationDelete, deleted)],
            commit_message=TITLE, revision=settings.revision, parent_commit=parent, create_pr=settings.create_pr).oid)
    try:
        return patiently(commit)
    except Exception as error:
        unknown = (f'--repo {repo}: no answer came to the commit ({one_line(error, 100)}), and nobody knows whether it '
                   f'is there: look at {constants.ENDPOINT}/{repo}')
        if status_of(error) not in (None, 412) and (status_of(error) or 0) < 500:
            raise  # the Hub has refused it
        if settings.create_pr:
            raise UserError(f'{unknown}/discussions') from error
        try:
            now = str(api.repo_info(repo, revision=settings.revision).sha)
            there = _files(api, repo, now)
        except Exception:
            raise UserError(f'{unknown}, or run this again, which changes nothing where it is') from error
        if now == parent:
            raise
        if all(_is_there(file, there) for file in files) and not there.keys() & set(deleted):
            return now
        raise UserError(f'--repo {repo}: another commit came meanwhile, and nothing was published; look at it, and run '
                        'this again') from error


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
        UserError: If the Hub can't be reached, or refuses; if a better run is there; if another publisher came first.
    """
    api = HfApi()
    with tempfile.TemporaryDirectory() as scratch:
        write_repository(run_folder, results, comparison, Path(scratch), repo)
        with _told(repo):
            check_token()
            parent = _open(api, repo, settings)
            there = _files(api, repo, parent)
            error_there = _validation_error(repo, parent) if 'results.json' in there else None
            files, deleted, said = _plan(Path(scratch), there, error_there, results['val_top1_err'], settings)
            for line in said:
                print(f'{repo}: {line}', file=sys.stderr, flush=True)
            oid = _commit(api, repo, parent, files, deleted, settings)
    revision = f'@{oid}' if settings.create_pr else f'@{settings.revision}' if settings.revision else ''
    return (f"load it: timm.create_model('hf-hub:{repo}{revision}', pretrained=True)\n"
            f'hf_hub_id: {repo}@{oid}')
