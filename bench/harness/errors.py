"""A user's mistake, told in one line."""
import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from safetensors import SafetensorError


class UserError(Exception):
    """A mistake that the user can mend: its message names the thing, the value and the way out, in one line."""


class RankError(UserError):
    """A mistake that one process may meet alone, such as a damaged image in its share: every rank prints it."""


def nearest(name: str, names: Iterable[str]) -> str:
    """The names most like `name`, for an error message."""
    names = list(names)
    return ', '.join(difflib.get_close_matches(name, names, n=4, cutoff=0.3) or sorted(names)[:8])


def one_line(error: BaseException | str, length: int = 300) -> str:
    """The text of an error in one line of printable characters, or its type where it has no text."""
    text = ''.join(character if character.isprintable() else ' ' for character in str(error))
    return ' '.join(text.split())[:length] or type(error).__name__


@contextmanager
def user_errors(what: str) -> Iterator[None]:
    """Turns what timm raises on a wrong value into a `UserError` that begins with `what`."""
    try:
        yield
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError, RuntimeError, OSError,
            SafetensorError) as error:
        raise UserError(f'{what}: {one_line(error)}') from error
