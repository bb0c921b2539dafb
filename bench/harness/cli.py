"""Command lines: flags from dataclasses, and exit status 2 for a user's mistake.

Each part of the harness says in a dataclass which settings it needs. A field made by `flag` is a flag of the same name.
`add_flags` adds the flags of a class to a parser, and `make_settings` makes the class from what was parsed. The names
are timm's where timm has such a flag.
"""
import argparse
import contextlib
import copy
import dataclasses
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import yaml
from tqdm import tqdm

from harness.errors import RankError, UserError, one_line
from harness.hub_client import limit_time
from harness.interrupts import GO_ON, speaks, stopped_by
from timm_sd.asking import hide_password

Settings = TypeVar('Settings')
Number = TypeVar('Number', int, float)

# Of gloo and NCCL, whose errors are RuntimeErrors of many meanings.
GONE = re.compile('Connection (closed|reset) by peer|Broken pipe|Socket closed|Timed out waiting|connectFullMesh '
                  'failed|remote process exited|Watchdog caught collective operation timeout')


def run_script(main: Callable[[], None], go_on: str = GO_ON) -> None:
    """Runs a script's `main`, and tells in one line on stderr why it ended.

    A `UserError` is exit status 2, SIGINT 130 and SIGTERM 143; the loss of another process of the training is 1.

    Args:
        main: The script.
        go_on: What a person does to go on after an interruption.
    """
    came: list[signal.Signals] = []
    main_process, running, first = os.getpid(), True, 0.

    def stop(number: int, frame: Any) -> None:
        nonlocal first
        if os.getpid() != main_process or came and time.monotonic() - first > 1:
            # A worker, which was started with our handler, or a second signal: it ends at once. A launcher passes the
            # signal on that its processes got too, so one that comes with the first is no second.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if came:
            return
        came.append(signal.Signals(number))
        first = time.monotonic()
        if hasattr(signal, 'SIGCHLD'):  # not on Windows
            # torch's would raise at the end of a worker. Python complains of SIG_DFL where one has just ended.
            signal.signal(signal.SIGCHLD, lambda number, frame: None)
        for worker in multiprocessing.active_children():
            worker.kill()  # else it may wait for us, or complain
        if running:
            raise KeyboardInterrupt  # what is open is closed

    def end(text: str, status: int, tells: bool) -> NoReturn:
        for bar in list(getattr(tqdm, '_instances', ())):  # else the line would begin behind one
            bar.close()
        if tells:
            print(f'{Path(sys.argv[0]).name}: {one_line(hide_password(text), 10_000)}', file=sys.stderr, flush=True)
        sys.exit(status)

    limit_time()
    heard = [number for number in (signal.SIGINT, signal.SIGTERM)
             if signal.getsignal(number) != signal.SIG_IGN]  # as in the background of a shell
    before = {number: signal.signal(number, stop) for number in heard}
    try:
        main()
    except BaseException as error:
        running = False
        if came:  # whatever libraries made of the interruption
            end(stopped_by(came[0], go_on), 128 + came[0], speaks())
        if isinstance(error, UserError):
            end(f'error: {error}', 2, isinstance(error, RankError) or os.environ.get('LOCAL_RANK', '0') == '0')
        lost = loss_of_a_process(error)
        if lost:
            end(f'another process of this training is gone ({lost}); the report of what started them says which; '
                f'to go on, {go_on}', 1, speaks() or 'TORCHELASTIC_ERROR_FILE' not in os.environ)
        raise
    finally:
        if not came:  # else the line has been told
            for number, handler in before.items():
                signal.signal(number, handler)


def loss_of_a_process(error: BaseException) -> str | None:
    """What torch.distributed says where a process that it waits for is gone, or silent for --timeout; else None."""
    if not isinstance(error, RuntimeError) or not torch.distributed.is_available() \
            or not torch.distributed.is_initialized():
        return None
    found = GONE.search(str(error))
    of_the_store = isinstance(error, torch.distributed.DistNetworkError | torch.distributed.DistStoreError)
    return one_line(found[0] if found else error, 80) if found or of_the_store else None


# --- types of values


def number(kind: type[Number], low: float = -math.inf, high: float = math.inf) -> Callable[[str], Number]:
    """An argparse type: a finite number in [low, high]."""
    bounds = f'{"(" if low == -math.inf else "["}{low}, {high}{")" if high == math.inf else "]"}'

    def convert(text: str) -> Number:
        value = kind(text)
        if not low <= value <= high or abs(value) == math.inf:  # nothing lies in them that is no number
            raise argparse.ArgumentTypeError(f'{text} must lie in {bounds}')
        return value
    convert.__name__ = kind.__name__  # argparse: 'invalid int value'
    return convert


positive_int, non_negative_int = number(int, 1), number(int, 0)
finite, non_negative, unit_interval = number(float), number(float, 0), number(float, 0, 1)


def positive(text: str) -> float:
    """An argparse type: a number above 0."""
    if finite(text) <= 0:
        raise argparse.ArgumentTypeError(f'{text} must be above 0')
    return finite(text)



def drop_rate(text: str) -> float:
    """An argparse type: a drop path rate, in [0, 1)."""
    value = float(text)
    if not 0. <= value < 1.:
        raise argparse.ArgumentTypeError(f'{text} must lie in [0, 1)')
    return value


def key_value(text: str) -> tuple[str, Any]:
    """An argparse type: KEY=VALUE, the value as YAML reads it."""
    key, equals, value = text.partition('=')
    if not equals:
        raise argparse.ArgumentTypeError(f'{text!r} is not of the form key=value')
    with contextlib.suppress(ValueError):  # YAML would take 1e-8 for a word
        return key, json.loads(value)
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f'{text!r}: the value is no YAML') from error


class KeyValues(argparse.Action):
    """Makes a dict of any number of KEY=VALUE, as timm's `--model-kwargs`."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, dict(values))


KEY_VALUES: dict[str, Any] = dict(nargs='*', type=key_value, action=KeyValues, metavar='KEY=VALUE')


# --- flags from dataclasses


def flag(default: Any, help: str, short: str | None = None, needs: str = '', **options: Any) -> Any:
    """A field of a settings dataclass that is a flag too.

    Args:
        default: Of the field and the flag. A bool makes the pair --flag and --no-flag.
        help: What the field means.
        short: Another name of the flag, such as '-b'.
        needs: Other flags, without which this one would do nothing: 'in_memory aug' is both, 'mixup|cutmix' one of
            them, 'no_in_memory' that it is off. See `unmet`.
        **options: Of argparse's `add_argument`.
    """
    if isinstance(default, bool):
        options['action'] = argparse.BooleanOptionalAction
    if needs:
        help = f'{help}; with {" ".join(map(_in_words, needs.split()))}'
    return dataclasses.field(default_factory=lambda: copy.copy(default),
                             metadata=dict(options, help=help, short=short, needs=needs, default=default))


def _in_words(need: str) -> str:
    """'mixup|cutmix' as --mixup or --cutmix."""
    return ' or '.join(f'--{name.replace("_", "-")}' for name in need.split('|'))


def unmet(flags: dict[str, Any], *classes: type) -> dict[str, str]:
    """The flags that would do nothing, and each time the flag that they lack.

    Args:
        flags: All flags, by name.
        *classes: Their settings dataclasses.
    """
    needs = {field.name: field.metadata['needs'].split() for cls in classes for field in dataclasses.fields(cls)}
    found: dict[str, str] = {}

    def is_on(name: str) -> bool:
        positive = name.removeprefix('no_')
        return (bool(flags[positive]) and positive not in found) == (name == positive)

    for _ in needs:  # what needs a flag that does nothing does nothing too
        before = len(found)
        found.update({name: _in_words(need) for name, of_name in needs.items() for need in of_name
                      if not any(map(is_on, need.split('|')))})
        if len(found) == before:
            break
    return found


def add_flags(parser: argparse.ArgumentParser, *classes: type) -> None:
    """Adds the flags of settings dataclasses, each class as a group named by its docstring's first line."""
    for cls in classes:
        group = parser.add_argument_group((cls.__doc__ or '').splitlines()[0].rstrip('.'))
        for field in dataclasses.fields(cls):
            options = dict(field.metadata)
            short, _ = options.pop('short'), options.pop('needs')
            names = [short] if short else []
            group.add_argument(*names, f'--{field.name.replace("_", "-")}', **options)


def make_settings(cls: type[Settings], args: argparse.Namespace) -> Settings:
    """The settings of one part, from the parsed flags."""
    return cls(**{field.name: getattr(args, field.name) for field in dataclasses.fields(cls)})  # type: ignore[arg-type]


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong flag is one line too, without the usage of fifty flags in front of it."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise UserError(f'{message}; --help lists the flags')
