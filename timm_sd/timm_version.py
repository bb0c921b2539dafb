"""Refuses a timm that is too old, such as a clone in the working folder, where `python -m timm_sd` looks first."""
import importlib.util
import re
import sys
from pathlib import Path

OLDEST = 1, 0, 31  # as in pyproject.toml


def check_timm() -> None:
    """Looks at the timm that would be imported, without an import, at which an old one may fail.

    Raises:
        ImportError: If it is too old. `python -m timm_sd` prints the line instead, and exits with status 2.
    """
    spec = importlib.util.find_spec('timm')
    if spec is None or spec.origin is None:
        return
    file = Path(spec.origin).parent / 'version.py'
    version = re.search(r'\d+(\.\d+)*', file.read_text()) if file.exists() else None
    if version is None or tuple(map(int, version[0].split('.'))) >= OLDEST:
        return
    message = (f'timm_sd needs timm {".".join(map(str, OLDEST))} or newer, and timm {version[0]} in {file.parent} is '
               'what Python finds; update it, or run from another folder')
    if sys.argv[0] == '-m':  # what Python has there while it looks for timm_sd/__main__.py
        print(message, file=sys.stderr)
        sys.exit(2)
    raise ImportError(message)
