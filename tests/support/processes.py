"""Processes that a launcher starts."""
import socket
from pathlib import Path


def free_port():
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return free.getsockname()[1]


def ranks(launcher):
    """Process ids of the ranks that a launcher started, in their order."""
    children = Path(f'/proc/{launcher.pid}/task/{launcher.pid}/children')
    return [int(pid) for pid in children.read_text().split()]
