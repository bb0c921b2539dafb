"""Functions that two real processes (gloo) run together.

debug_launcher forks, which a process whose OpenMP threads are running doesn't survive, so they start from one that
computes nothing itself.
"""
import importlib
import os
import subprocess
import sys
import traceback
from pathlib import Path

from accelerate import debug_launcher

TESTS = Path(__file__).parent.parent


def on_two_ranks(*functions, seconds=300):
    """Runs functions of a test module, which hold assertions, one after the other; fails with what failed.

    One process starts them all: it is the start that takes long.
    """
    names = [f'{function.__module__}:{function.__name__}' for function in functions]
    places = [str(TESTS), str(TESTS.parent / 'bench'), *{str(Path(function.__code__.co_filename).parent)
                                                         for function in functions}]
    result = subprocess.run(
        [sys.executable, '-m', 'support.ranks', *names], capture_output=True, text=True, timeout=seconds,
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(places)))
    assert result.returncode == 0, result.stderr


def failures(names):
    """The names, MODULE:FUNCTION, of those that failed."""
    failed = []
    for name in names:
        module, _, function = name.partition(':')
        try:
            debug_launcher(getattr(importlib.import_module(module), function), num_processes=2)
        except Exception:
            traceback.print_exc()
            failed.append(name)
    return failed


if __name__ == '__main__':
    missed = failures(sys.argv[1:])
    sys.exit(f'failed on two ranks: {", ".join(missed)}' if missed else 0)
