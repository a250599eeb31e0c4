"""Requests to stop (SIGTERM, SIGUSR1): noted at once, obeyed between two training steps.

As long as nothing is trained there is nothing to save, and a request ends the process where it is.
"""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from mnist_fast.errors import Stopped

_requested: list[str] = []
_leave_at_once = [False]


def _note(number: int, _frame: FrameType | None) -> None:
    _requested.append(signal.Signals(number).name)
    if _leave_at_once[0]:
        _leave_at_once[0] = False  # a second request must not interrupt the way out
        raise_if_requested()


def install() -> None:
    """Notes SIGTERM and SIGUSR1 from now on instead of dying of them; cheap, call it first."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _note)


def requested() -> str | None:
    """Name of the first signal that asked this process to stop, or None."""
    return _requested[0] if _requested else None


def raise_if_requested() -> None:
    """Raises `Stopped` if this process was asked to stop before it trained anything."""
    if _requested:
        raise Stopped(f"stopped by {_requested[0]} before the first step: nothing to save")


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """Within it, requests raise `Stopped` in the main thread as soon as Python gets to run."""
    _leave_at_once[0] = True
    try:
        raise_if_requested()
        yield
    finally:
        _leave_at_once[0] = False


def ignore() -> None:
    """Ignores them from now on: Python's own end would otherwise be open to them again."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def forget() -> None:
    """Forgets earlier requests (for a second run in one process)."""
    _requested.clear()
