"""Runs one function in a child process that can neither hang its caller nor leave anything behind.

FFCV waits for ever for a worker that died, and a download for a host that does not answer. So both
run in a child with a process group of its own, which has to report progress now and then and is
ended as a whole when it falls silent, fails, or when its caller ends.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection, Pipe, wait
from typing import IO, Any, NamedTuple, NoReturn

Report = Callable[[int], object]

_END_SECONDS = 3.0  # what a process group gets to end after SIGTERM, before SIGKILL


class Limits(NamedTuple):
    """How long a child may be silent, in seconds, before it counts as hung."""

    first: float  # until its first report: it may have to import torch from a slow disk
    then: float  # until the next one


class WorkFailed(Exception):
    """The watched work failed, died or hung; the message is a clause that says how."""


def run_watched(
    target: str,
    arguments: Sequence[str],
    limits: Limits,
    on_report: Report = lambda amount: None,
    held_files: Sequence[int] = (),
) -> Any:
    """Calls `target(report, *arguments)` in a watched child process and returns its result.

    Args:
        target: the function as `module:name`; its result has to be plain data.
        arguments: strings handed to it behind `report`, a function that takes an amount of work.
        limits: how long the child may be silent.
        on_report: called here with every amount that the child reports.
        held_files: file descriptors the child keeps open as long as it lives.

    Raises:
        WorkFailed: the function raised, its process died, or it was silent for too long.
    """
    reports, child_end = Pipe(duplex=False)
    with reports, child_end:
        command = [target, json.dumps(list(arguments)), str(child_end.fileno()), str(os.getpid())]
        process = _start(command, [child_end.fileno(), *held_files])
        child_end.close()
        assert process.stderr is not None
        with process.stderr as stderr, _Tail(stderr) as tail:
            try:
                result = _follow(process, reports, limits, on_report)
            except WorkFailed as failure:
                _end_group(process)
                reason = tail.last_error()
                raise WorkFailed(f"{failure}: {reason}" if reason else str(failure)) from None
            except BaseException:  # for instance Ctrl-C
                _end_group(process)
                raise
            process.kill()  # it has nothing left to do, and must not delay this by a slow exit
            process.wait()
            return result


def _start(arguments: list[str], open_files: list[int]) -> subprocess.Popen[bytes]:
    """Starts `_main` below in a new interpreter: a fork would inherit threads and a GPU's state."""
    environment = {
        "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path),
        "CUDA_VISIBLE_DEVICES": "",  # FFCV's loader would take memory of a GPU that it sees
    }
    return subprocess.Popen(
        [sys.executable, "-m", __name__, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        process_group=0,
        pass_fds=open_files,
        env=os.environ | environment,
    )


def _follow(
    process: subprocess.Popen[bytes], reports: Connection, limits: Limits, on_report: Report
) -> Any:
    """Receives reports until the result, a failure, the child's death, or too long a silence."""
    limit = limits.first
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        ended = process.poll() is not None  # asked first: what it sent before it ended is there
        if wait([reports], timeout=0.0 if ended else 0.2):
            try:
                kind, value = reports.recv()
            except EOFError:
                break
            if kind == "result":
                return value
            if kind == "failure":
                raise WorkFailed(value)
            on_report(value)
            limit = limits.then
            deadline = time.monotonic() + limit
        elif ended:
            break
    else:
        raise WorkFailed(f"no progress for {limit:g} seconds")
    with suppress(subprocess.TimeoutExpired):
        process.wait(_END_SECONDS)
    raise WorkFailed(f"its process ended with status {process.returncode}")


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends the child and everything it started.

    SIGTERM comes first because Python's resource tracker, which survives it, then frees the shared
    memory of the others; SIGCONT wakes a stopped process to receive it.
    """
    for signals in ((signal.SIGTERM, signal.SIGCONT), (signal.SIGKILL,)):
        for signal_number in signals:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal_number)
        deadline = time.monotonic() + _END_SECONDS
        while time.monotonic() < deadline:
            process.poll()  # reaps the child, whose own entry would keep the group alive
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.01)


class _Tail:
    """Drains a child's standard error, so that it never blocks, and keeps the end of it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._text = b""
        self._thread = threading.Thread(target=self._drain, daemon=True)

    def __enter__(self) -> "_Tail":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(_END_SECONDS)

    def _drain(self) -> None:
        with suppress(OSError, ValueError):  # the stream is closed under a thread that came late
            while chunk := os.read(self._stream.fileno(), 65536):
                self._text = (self._text + chunk)[-65536:]

    def last_error(self) -> str:
        """The last line that ends a traceback, for instance `OSError: [Errno 28] No space ...`."""
        self._thread.join(_END_SECONDS)
        lines = self._text.decode(errors="replace").splitlines()
        errors = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception"))]
        return errors[-1] if errors else ""


# What follows runs in the child.


def _main() -> NoReturn:
    target, arguments, descriptor, parent = sys.argv[1:]
    reports = Connection(int(descriptor), readable=False)

    sending = threading.Lock()

    def send(kind: str, value: object) -> None:
        with sending:
            reports.send((kind, value))

    def fail(error: BaseException) -> NoReturn:
        try:
            send("failure", str(error) or type(error).__name__)
        except OSError:  # the parent has ended
            os.killpg(os.getpgrp(), signal.SIGTERM)
        os._exit(1)

    # A thread that raises (FFCV's loader does its work in one) would leave its reader waiting.
    threading.excepthook = lambda hook: fail(hook.exc_value or hook.exc_type())
    _end_with(int(parent))
    module, _, name = target.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
        send("result", function(partial(send, "report"), *json.loads(arguments)))
    except BaseException as error:
        fail(error)
    os._exit(0)  # at once: the slow part of an orderly exit is unloading numba and torch


def _end_with(parent: int) -> None:
    """Ends this process group within a second of the parent's end, even one by SIGKILL."""

    def look(_signal: int, _frame: object) -> None:
        if os.getppid() != parent:
            os.killpg(os.getpgrp(), signal.SIGTERM)

    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, 1.0, 1.0)


if __name__ == "__main__":
    _main()
