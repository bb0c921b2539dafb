"""How the Hub is asked: with patience, with a token that can be one, and without showing a password."""
import logging
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

from huggingface_hub import get_token
from huggingface_hub.utils import httpx, parse_ratelimit_headers

RETRIED = (408, 429, 500, 502, 503, 504)  # statuses that pass
WAITS = (1, 2, 4, 8)  # seconds before the Hub is asked again
PATIENCE_SECONDS = 30.  # until it isn't asked any more
LONGEST_WAIT = 310.  # seconds that the Hub may ask for; its limits of rate are for five minutes
LOG_IN = 'log in with hf auth login, or set HF_TOKEN'

Result = TypeVar('Result')
_logger = logging.getLogger(__name__)


class Refused(OSError):
    """What a file or a token was refused for; the text says it all."""


# --- secrets


def hide_password(text: str) -> str:
    """The text without the password of any address in it; $HF_ENDPOINT may have one."""
    return re.sub(r'(://[^/@\s:]*):[^/@\s]*@', r'\1:***@', text)


def _hide_in_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = hide_password(record.getMessage()), ()
    return True


def check_token() -> None:
    """Raises OSError if the token can't be one: the client would fail with a text that holds it."""
    token = get_token() or ''
    if not token.isascii() or not token.isprintable() or ' ' in token:
        raise Refused(f'the token has characters that no token has: {LOG_IN}')


for _handler in logging.getLogger('huggingface_hub').handlers:
    _handler.addFilter(_hide_in_record)


# --- asking the Hub


def _answer_to(error: BaseException) -> Any:
    """The Hub's answer that an error of its client stands for, itself or by its cause; None where none came."""
    seen: BaseException | None = error
    while seen is not None and getattr(seen, 'response', None) is None:
        seen = seen.__cause__
    return getattr(seen, 'response', None)


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error of the Hub's client stands for; None where no answer came."""
    answer = _answer_to(error)
    return None if answer is None else answer.status_code


def _named_seconds(answer: Any) -> int | None:
    """After how many seconds the Hub wants to be asked again; None where it names none."""
    limit = parse_ratelimit_headers(answer.headers)
    if answer.status_code == 429 and limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds
    named = answer.headers.get('Retry-After', '')
    return int(named) if named.isdecimal() else None


def patiently(call: Callable[[], Result], statuses: tuple[int, ...] = RETRIED) -> Result:
    """What `call` gives. While the Hub answers with such a status it is asked again, after the time that it names."""
    begin, waits = time.monotonic(), iter(WAITS)
    while True:
        try:
            return call()
        except (httpx.HTTPError, OSError, RuntimeError) as error:  # RuntimeError: of the client's threads
            answer, wait = _answer_to(error), next(waits, None)
            if wait is None or answer is None or answer.status_code not in statuses:
                raise
            named = _named_seconds(answer)
            seconds = wait if named is None else named
            if seconds > LONGEST_WAIT or named is None and time.monotonic() - begin + seconds > PATIENCE_SECONDS:
                raise
            _logger.warning('the Hub answers %d, and is asked again in %d s', answer.status_code, seconds)
        time.sleep(seconds)
