"""Errors that end a run: bad input (exit status 2) and everything else (exit status 1)."""

import argparse
import atexit
import contextlib
import io
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

# Seconds for the main process to say why: a launcher ends it when another process has left
MAINS_LEAD = 1.0


class _OneLineError(Exception):
    """Ends a run with one line.

    Args:
        message: the line.
        shared: every process raises the same error, so that the first one alone prints it.
    """

    def __init__(self, message: str, shared: bool = False):
        super().__init__(message)
        self.shared = shared


class InputError(_OneLineError):
    """Bad usage, configuration or data; the message says what, where and what to do."""


class RunError(_OneLineError):
    """The run itself failed (for instance the loss is not finite): one line, exit status 1."""


class Stopped(BaseException):
    """The run ended on request (SIGTERM, SIGUSR1): one line, exit status 1.

    Not an `Exception`: it may rise anywhere, and nobody who guards against faults should keep it.
    """

    def __init__(self, message: str, shared: bool = False):
        super().__init__(message)
        self.shared = shared


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a bad command line as an `InputError`.

    Options cannot be abbreviated, as in train.py.
    """

    def __init__(self, **choices: Any):
        super().__init__(allow_abbrev=False, **choices)

    def error(self, message: str) -> NoReturn:
        """Refuses the command line."""
        raise InputError(f"{message} ({self.prog} --help lists the options)")


def some_text(text: str) -> str:
    """The type of an option that cannot be empty: most often a shell variable is not set."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty: give it a value")
    return text


def some_path(text: str) -> Path:
    """The type of an option that names a file or folder; an empty name would be this folder."""
    return Path(some_text(text))


def one_line(error: BaseException) -> str:
    """An error's message without line breaks, or its kind where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def report_error(error: _OneLineError | Stopped, program: str) -> int:
    """Prints an error as one line on standard error and returns its exit status.

    The main process prints what all processes know. The others leave after it.
    """
    if error.shared and _rank():
        time.sleep(MAINS_LEAD)
    else:
        with contextlib.suppress(OSError):  # a full disk, a closed pipe: the status tells it too
            print(f"{program}: error: {one_line(error)}", file=sys.stderr, flush=True)
    return 2 if isinstance(error, InputError) else 1


def _rank() -> int:
    """This process's rank in its group; 0 without one, whatever variables another job has left."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        return 0
    return distributed.get_rank()


def open_standard_streams() -> None:
    """Opens standard streams that the caller closed, on nothing.

    Otherwise the next file that is opened gets the number of the closed stream, and the messages.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115


def leave(status: int) -> NoReturn:
    """Ends this process, whose exit status is settled, and waits for no thread.

    Exit handlers run, and output is flushed. Python's own end goes further: it takes the
    interpreter down while threads of libraries may still ask for it. gloo's does, after each
    exchange, to give the tensors back. Python ends such a thread, and C++ then aborts the process
    ("terminate called without an active exception").
    """
    with contextlib.suppress(Exception):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def run_main(main: Callable[[], int], program: str) -> int:
    """Calls `main` and returns the exit status; the errors above show no traceback.

    Characters that standard output's encoding lacks, as in a file's name, are printed as escapes.
    """
    open_standard_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):  # standard error does so anyway
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return main()
    except (InputError, RunError, Stopped) as error:
        return report_error(error, program)
