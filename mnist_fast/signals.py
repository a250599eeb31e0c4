"""Requests to stop (SIGTERM, SIGUSR1, Ctrl-C): noted at once, obeyed between two training steps.

As long as nothing is trained there is nothing to save, and a request ends the process where it is.
"""

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from mnist_fast.errors import Stopped

REQUESTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
PR_SET_PDEATHSIG = 1  # prctl(2)
_requested: list[str] = []
_leave_at_once = [False]


def _note(number: int, _frame: FrameType | None) -> None:
    _requested.append(signal.Signals(number).name)
    if _leave_at_once[0]:
        _leave_at_once[0] = False  # a second request must not interrupt the way out
        raise_if_requested()


def install() -> None:
    """Notes requests from now on, in place of ending the process; cheap, call it first."""
    for number in REQUESTS:
        # nohup ignores the end of a terminal; the other signals may be ignored by a batch script
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _note)


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """Within it, requests end the process where it is, also while it waits for others in C++.

    Python's handlers would run when it has met them, or not at all.
    """
    noted = [number for number in REQUESTS if signal.getsignal(number) is _note]
    for number in noted:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number in noted:
            signal.signal(number, _note)


def follow_launcher() -> None:
    """Makes the end of `accelerate launch` a request: it forwards no signal to a single process.

    Only on Linux, and only where the parent is that program: a shell may end before its children.
    """
    parent = os.getppid()
    try:
        command = Path(f"/proc/{parent}/cmdline").read_bytes()
    except OSError:
        return
    if b"accelerate" in command:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        if os.getppid() != parent:  # it has ended in between
            os.kill(os.getpid(), signal.SIGTERM)


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
    """Ignores requests from now on, so that none interrupts the exit."""
    for number in REQUESTS:
        signal.signal(number, signal.SIG_IGN)


def forget() -> None:
    """Forgets earlier requests (for a second run in one process)."""
    _requested.clear()
