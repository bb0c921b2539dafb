"""Waiting for a condition, with a deadline."""
import signal
import time


def wait_until(condition, seconds=120, process=None):
    """Returns as soon as `condition()` is true.

    Args:
        condition: What to wait for.
        seconds: How long, at most.
        process: Fail at once if this one ends before.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, f'{process.args} ended with status {process.returncode}'
        assert time.monotonic() < deadline, f'nothing came of it within {seconds} s'
        time.sleep(0.02)


def hear_sigint():
    """In a new process: SIGINT is not ignored, as a shell has it for what it runs in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
