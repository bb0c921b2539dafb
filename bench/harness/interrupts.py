"""SIGINT and SIGTERM end a script in one line while it imports, which takes seconds; then `run_script` does that.

A script imports this module before all others.
"""
import os
import signal
import sys
from pathlib import Path
from typing import Any


def _end(number: int, frame: Any) -> None:
    if os.environ.get('LOCAL_RANK', '0') == '0':
        print(f'{Path(sys.argv[0]).name}: stopped by {signal.Signals(number).name}', file=sys.stderr, flush=True)
    os._exit(128 + number)  # nothing is open yet


if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parents[1]:  # not where another program imports it
    for _number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(_number) != signal.SIG_IGN:
            signal.signal(_number, _end)
