"""The ways a run ends that are not success: bad input (exit 2) and everything else (exit 1)."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn


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
    """Says what is wrong with a command line in one line, as an `InputError`."""

    def error(self, message: str) -> NoReturn:
        """Refuses the command line."""
        raise InputError(f"{message} ({self.prog} --help lists the options)")


def one_line(error: BaseException) -> str:
    """An error's message without line breaks, or its kind where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def report_error(error: _OneLineError | Stopped, program: str) -> int:
    """Prints an error as one line on standard error and returns its exit status."""
    if not (error.shared and int(os.environ.get("RANK", 0))):
        print(f"{program}: error: {one_line(error)}", file=sys.stderr, flush=True)
    return 2 if isinstance(error, InputError) else 1


def run_main(main: Callable[[], int], program: str) -> int:
    """Calls `main` and returns the exit status; the errors above show no traceback."""
    try:
        return main()
    except (InputError, RunError, Stopped) as error:
        return report_error(error, program)
