"""What the processes of one training tell each other. No folder is shared: what one has read, the others are told."""
import socket
from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from harness.errors import UserError

Made = TypeVar('Made')


def from_main_process(accelerator: Accelerator, make: Callable[[], Made]) -> Made:
    """What `make` gives in the main process, in all of them; its UserError is raised in all."""
    found: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            found = [make()]
        except UserError as error:
            found = [error]
    broadcast_object_list(found)
    if isinstance(found[0], UserError):
        raise found[0]
    return found[0]


def first_on_each_machine(accelerator: Accelerator, make: Callable[[], Made]) -> Made:
    """What `make` gives in each process; the first one of each machine goes first, and prepares it for the others.

    A UserError of one process is raised in all.
    With Accelerate's local_main_process_first the others would wait for it.
    """
    made: list[Made] = []
    for is_first in (True, False):
        mistakes: list[UserError] = []
        if accelerator.is_local_main_process == is_first:
            try:
                made.append(make())
            except UserError as mistake:
                mistakes.append(mistake)
        for told in gather_object(mistakes):
            raise told
    return made[0]


def check_same(accelerator: Accelerator, facts: dict[str, Any]) -> None:
    """Raises UserError in all processes if one of them has another value than the main process, such as of a flag."""
    (main, ours), *others = gather_object([(socket.gethostname(), facts)])
    for rank, (host, theirs) in enumerate(others, start=1):
        for key in {**ours, **theirs}:
            if ours.get(key) != theirs.get(key):
                raise UserError(f'{key} is {theirs.get(key)} in process {rank} on {host}, and {ours.get(key)} in '
                                f'process 0 on {main}; they train together only with the same')
