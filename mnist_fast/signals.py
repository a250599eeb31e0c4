"""Requests to stop (SIGTERM, SIGUSR1): noted at once, obeyed by the loop between two steps."""

import signal
from types import FrameType

_requested: list[str] = []


def _note(number: int, _frame: FrameType | None) -> None:
    _requested.append(signal.Signals(number).name)


def install() -> None:
    """Notes SIGTERM and SIGUSR1 from now on instead of dying of them; cheap, call it first."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _note)


def requested() -> str | None:
    """Name of the first signal that asked this process to stop, or None."""
    return _requested[0] if _requested else None


def forget() -> None:
    """Forgets earlier requests (for a second run in one process)."""
    _requested.clear()
