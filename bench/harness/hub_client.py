"""A time limit for each question of a script to the Hub: huggingface_hub asks most of them without one."""
from contextlib import suppress
from typing import Any

from huggingface_hub import set_client_factory
from huggingface_hub.utils import get_session, hf_raise_for_status, httpx
from huggingface_hub.utils.logging import set_verbosity_error

from timm_sd.asking import RETRIED

ANSWER_SECONDS = 20.  # from the last byte that went or came


class LimitedClient(httpx.Client):
    """A client whose questions end in a ConnectionError where no answer comes; what only reads is asked twice.

    A TimeoutException of httpx's would not do: huggingface_hub asks up to five times more on each.
    """

    def send(self, request: httpx.Request, **kwargs: Any) -> httpx.Response:
        given = request.extensions.get('timeout', {})
        request.extensions['timeout'] = {what: min(given.get(what) or ANSWER_SECONDS, ANSWER_SECONDS)
                                         for what in ('connect', 'read', 'write', 'pool')}
        if request.method in ('GET', 'HEAD'):
            with suppress(httpx.TimeoutException):
                return super().send(request, **kwargs)
        try:
            return super().send(request, **kwargs)
        except httpx.TimeoutException as error:
            raise ConnectionError(f'no answer from {request.url.host}') from error


class AskingOnce(LimitedClient):
    """One whose statuses that pass are for `patiently` alone, which says so, and does not wait for hours.

    huggingface_hub asks again by itself in some phases of an upload, for as long as the Hub wishes.
    """

    def send(self, request: httpx.Request, **kwargs: Any) -> httpx.Response:
        answer = super().send(request, **kwargs)
        if answer.status_code in RETRIED:
            answer.read()
            hf_raise_for_status(answer)
        return answer


def limit_time(client: type[httpx.Client] = LimitedClient) -> None:
    """Makes it the client of this process, and leaves what there is to say of it to the one line of an error."""
    hooks = get_session().event_hooks
    set_client_factory(lambda: client(event_hooks=hooks, follow_redirects=True, timeout=None))
    set_verbosity_error()
