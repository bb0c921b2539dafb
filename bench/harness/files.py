"""Files that are replaced in one piece."""
import csv
import io
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from harness.errors import UserError, one_line

PART_BYTES = 15 * 2**20


def file_to_replace(path: Path, flag: str = '') -> Path:
    """The file that a write to `path` replaces: the target of a symbolic link, so that the link stays.

    Args:
        path: Where to write. There may be nothing yet.
        flag: That named it, for the error.

    Raises:
        UserError: If it is something else than a file, such as a device, a pipe or a folder, or its folder isn't there.
    """
    what, target = f'{flag} {path}'.lstrip(), Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise UserError(f'{what} can not be written: there is no such folder')
    try:
        is_file = stat.S_ISREG(target.stat().st_mode)
    except FileNotFoundError:
        is_file = True  # it will be one
    except OSError as error:  # a name too long, a link to itself
        raise UserError(f'{what} can not be written ({error.strerror}); choose another name') from error
    if not is_file:
        raise UserError(f'{what} can not be written: it is there, and is no regular file; choose another name')
    return target


def write_atomic(path: Path, content: bytes) -> None:
    """Writes a file in one piece: after a crash or on a full disk the old one is still there, whole.

    Raises:
        UserError: If the file can't be written.
    """
    target = file_to_replace(path)
    temporary = target.with_name(f'.{target.name}.tmp')
    try:
        with open(temporary, 'wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise UserError(f'{path} can not be written ({error.strerror}); what was saved before is good') from error


@contextmanager
def folder_in_one_piece(path: Path) -> Iterator[Path]:
    """Within it a folder is filled that becomes `path` at the end; after an error the old one is there as it was.

    Raises:
        UserError: If the folder can't be written, or the old one has a file that the new one doesn't have.
    """
    new, old = (path.with_name(f'.{path.name}.{name}') for name in ('new', 'old'))
    shutil.rmtree(new, ignore_errors=True)  # of a killed process
    if path.is_symlink() or path.exists() and not path.is_dir():
        raise UserError(f'{path} would be replaced, and is no folder; move it away')
    try:
        make_folder(new)
        yield new
        foreign = {file.name for file in path.glob('*')} - {file.name for file in new.iterdir()}
        if foreign:
            raise UserError(f'{path} would be replaced, and holds {min(foreign)}, which is not of it; move it away')
        try:
            if path.exists():
                path.rename(old)
            new.rename(path)
        except OSError as error:
            raise UserError(f'{path} can not be written ({error.strerror})') from error
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        for folder in (new, old):
            shutil.rmtree(folder, ignore_errors=True)


def make_folder(path: Path, flag: str = '') -> None:
    """Makes a folder; UserError that names its flag if it can't."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        choose = f'; choose another with {flag}' if flag else ''
        raise UserError(f'{path} can not be written ({error.strerror}){choose}') from error


def read_mapping(path: Path, parse: Callable[[str], Any], way_out: str) -> dict[str, Any]:
    """The mapping that a file of YAML or JSON holds.

    Args:
        path: The file.
        parse: Its text to a value.
        way_out: Ends the message of an error.

    Raises:
        UserError: If it can't be read, or is something else than a mapping.
    """
    try:
        if path.exists() and not path.is_file():
            raise ValueError('it is no regular file')  # a pipe would be waited for
        value = parse(path.read_text(encoding='utf-8'))
        if not isinstance(value, dict):
            raise ValueError('it is no mapping of names to values')
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f'{path} can not be read ({one_line(error, 120)}); {way_out}') from error
    return value


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON, in one piece."""
    write_atomic(path, (json.dumps(value, indent=2) + '\n').encode())


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows under the columns that any of them has."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(key for row in rows for key in row)),
                            lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode())


def write_parts(path: Path, content: bytes) -> None:
    """Writes a large file as several, `path` and `path`.1, .2 and so on, none larger than `PART_BYTES`.

    `path` itself comes last: it says that the others are there. A run's state then passes through what limits the size
    of a file, and that of 1202 layers is 155 MB.
    """
    parts = [content[start:start + PART_BYTES] for start in range(0, len(content), PART_BYTES)]
    for number, part in reversed(list(enumerate(parts))):
        write_atomic(path.with_name(f'{path.name}.{number}') if number else path, part)


def read_parts(path: Path) -> bytes:
    """What `write_parts` wrote."""
    others = sorted(path.parent.glob(f'{path.name}.*'), key=lambda part: int(part.suffix[1:]))
    return b''.join(part.read_bytes() for part in (path, *others))
