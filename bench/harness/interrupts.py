"""SIGINT and SIGTERM end a script in one line while it imports, which takes seconds; then `run_script` does that.

A script imports this module before all others.
"""
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

GO_ON = 'run the same line again'


def stopped_by(number: int, go_on: str = GO_ON) -> str:
    """What a script says that a signal has ended."""
    return f'stopped by {signal.Signals(number).name}; to go on, {go_on}'


def speaks() -> bool:
    """Whether this process is the first that tells why all those end that one launcher has started on this machine."""
    error_file = os.environ.get('TORCHELASTIC_ERROR_FILE')  # in the launcher's folder ATTEMPT/LOCAL_RANK
    if not error_file:
        return os.environ.get('LOCAL_RANK', '0') == '0'
    try:
        os.close(os.open(Path(error_file).parents[1] / 'told', os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    except OSError:
        pass  # told twice is better than not at all
    return True


def _end(number: int, frame: Any) -> None:
    if speaks():
        print(f'{Path(sys.argv[0]).name}: {stopped_by(number)}', file=sys.stderr, flush=True)
    os._exit(128 + number)  # nothing is open yet


_main = getattr(sys.modules['__main__'], '__file__', None)
if _main and Path(_main).resolve().parent == Path(__file__).resolve().parents[1]:  # not in another program
    for _number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(_number) != signal.SIG_IGN:
            signal.signal(_number, _end)
elif multiprocessing.current_process().name != 'MainProcess' and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    # A worker, which imports its script again. Ctrl-C reaches it too, and the script tells that.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
