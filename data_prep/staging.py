"""A temporary folder inside the folder that is to be written, one process at a time."""

import fcntl
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mnist_fast.errors import InputError

LOCK_SECONDS = 300.0  # how long to wait for another process that writes the same folder

_PREFIX = ".staging-"


@dataclass(frozen=True)
class Staging:
    """A temporary folder on the same file system as the final one, and the lock that guards it."""

    folder: Path
    lock: int


@contextmanager
def staging(
    folder: Path, make_way: Callable[[list[Path]], None] = lambda leftovers: None
) -> Iterator[Staging]:
    """Makes `folder`, locks it, and gives a temporary folder in it that is gone afterwards.

    What an earlier process that was killed left behind is removed first, after `make_way` was
    called with those temporary folders. A `folder` that is new and stays empty is removed again.

    Raises:
        InputError: the folder cannot be written (also: from the `with` block), or another process
            keeps it locked for more than `LOCK_SECONDS`.
    """
    try:
        with _locked(folder) as lock:
            leftovers = list(folder.glob(f"{_PREFIX}*"))
            make_way(leftovers)
            for leftover in leftovers:
                shutil.rmtree(leftover, ignore_errors=True)
            temporary = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder))
            try:
                yield Staging(temporary, lock)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        fault = f"cannot write {folder}: {error.strerror or error}"
        raise InputError(f"{fault}: use another folder, or free this one") from None


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Holds the file `folder/.lock`, which is removed at the end; gives its descriptor."""
    path = folder / ".lock"
    existed = folder.exists()
    deadline = time.monotonic() + LOCK_SECONDS
    told = False
    while (lock := _try_lock(path)) is None:
        if not told:
            print(f"data_prep: waiting for another process in {folder}", file=sys.stderr)
            told = True
        if time.monotonic() > deadline:
            raise InputError(
                f"{folder} has been locked by another process for {LOCK_SECONDS:g} seconds: "
                "wait for it, end it, or use another folder with --out"
            )
        time.sleep(0.1)
    try:
        yield lock
    finally:
        path.unlink(missing_ok=True)  # while still held: nobody can hold a lock on a new file yet
        os.close(lock)
        if not existed:
            with suppress(OSError):  # not empty: the usual case
                folder.rmdir()


def _try_lock(path: Path) -> int | None:
    """The descriptor of the locked file, or None if another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:  # the process that had it has just removed the folder
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), path.stat()):
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        os.close(lock)
        raise
    os.close(lock)  # taken, or removed by the process that had it
    return None
