"""The run's folder: its lock, and its `status.json`."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mnist_fast.config import Config
from mnist_fast.errors import InputError, RunError, Stopped
from mnist_fast.files import read_file, write_atomically

LOCK, STATUS = ".lock", "status.json"
MAX_STATUS = 100_000  # bytes of a status.json
MAX_SUMMARY = 1_000_000  # and of a summary.json, which has about 2,000
_descriptors: dict[Path, int] = {}  # of the locks that this process holds


def choose(config: Config, dataset: str) -> Path:
    """Creates and locks the run's folder: the configured one, or a new one named for the run."""
    name = f"{config.recipe}-{dataset}-seed{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(config.run_dir or make_new(Path("runs") / name))
    lock(folder)
    return folder


def read_summary(folder: Path, epochs: int) -> dict[str, Any] | None:
    """The summary of a run that has come to its end.

    None where files of its end are missing, or are those of an earlier end with fewer epochs. A
    summary has `seconds` when W&B has got everything.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if (folder / "weights.safetensors").is_file():
            summary = json.loads(read_file(folder / "summary.json", MAX_SUMMARY))
            return summary if summary["epochs"] == epochs and summary["seconds"] else None
    return None


def make_new(wanted: Path) -> Path:
    """Creates a folder; appends a number to its name if that is taken.

    Raises:
        InputError: it cannot be created.
    """
    folder, number = wanted, 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except (FileExistsError, NotADirectoryError) as error:
            if not folder.parent.is_dir():  # a file or a link to nothing: no number helps
                where = f"{folder.parent}: {_what_is_there(folder.parent)}, not a folder"
                raise InputError(f"{where}: move it away, or choose a --run_dir") from error
            number += 1
            folder = wanted.with_name(f"{wanted.name}-{number}")
        except OSError as error:
            raise InputError(f"{folder}: {error.strerror}: choose a --run_dir") from error


def _what_is_there(path: Path) -> str:
    """What stands in a folder's place, in words."""
    return "a link to nothing" if path.is_symlink() and not path.exists() else "a file"


def make_writable(folder: Path, option: str) -> None:
    """Creates a folder if it is missing, and checks that files can be created in it.

    Raises:
        InputError: they cannot; the message names the option that chose the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".trial-"):
            pass
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}: choose another {option}") from error


def lock(folder: Path) -> None:
    """Creates a folder and locks it for this process, until `unlock` or the process's end.

    A POSIX record lock: the kernel (or the file server) drops it when the process dies, however
    that happens, and children that outlive the process do not keep it.

    Raises:
        InputError: another process has it, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        where, reason = error.filename or folder, error.strerror
        if isinstance(error, FileExistsError):
            reason = f"{_what_is_there(Path(where))}, not a folder"
        raise InputError(f"{where}: {reason}: choose another --run_dir") from error
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise InputError(
                f"another process trains in {folder}: wait for it, or choose another --run_dir"
            ) from error
        raise InputError(
            f"{folder}: its file system cannot lock files ({error.strerror}): "
            "choose a --run_dir on another"
        ) from error
    _descriptors[folder] = descriptor


def unlock(folder: Path) -> None:
    """Releases a folder's lock."""
    if folder in _descriptors:
        os.close(_descriptors.pop(folder))


@contextlib.contextmanager
def reporting(folder: Path, active: bool) -> Iterator[None]:
    """Keeps `status.json` up to date during a run, and releases the folder's lock at the end.

    Choices that are refused leave it as an earlier run left it.

    Args:
        folder: the run's.
        active: false on all processes but the main one: there it only names faults of the disk.

    Raises:
        RunError: a file could not be written.
    """
    status, message = "failed", ""
    before = kept = None  # what the file held, and what of that is put back
    try:
        if active:
            with contextlib.suppress(OSError):
                before = read_file(folder / STATUS, MAX_STATUS)
            write_status(folder, "running")
        yield
        status = "finished"
    except Stopped as stopped:
        status, message = "stopped", str(stopped)
        raise
    except InputError as error:
        message, kept = str(error), before
        raise
    except OSError as error:
        where = error.filename2 or error.filename or folder  # the second is what was to be replaced
        message = f"{where}: {error.strerror or error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message += f": free space, then give the same command with --run_dir {folder}"
        raise RunError(message) from error
    except BaseException as error:
        message = str(error) or type(error).__name__
        raise
    finally:
        if active:
            if kept is None:
                write_status(folder, status, message)
            else:
                with contextlib.suppress(OSError):
                    write_atomically(folder / STATUS, kept)
            unlock(folder)


def write_status(folder: Path, status: str, message: str = "") -> None:
    """Replaces `status.json`; a disk that cannot take it does not change how the run ends.

    Args:
        folder: the run's.
        status: running, stopped (the run can go on from a checkpoint), finished or failed.
        message: the line that the run ended with.
    """
    job = os.environ.get("SLURM_JOB_ID")
    content = {
        "status": status,
        "message": message,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        # tells a batch script whether this is about its own start or an earlier one
        "job": job and f"{job}.{os.environ.get('SLURM_RESTART_COUNT', '0')}",
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    text = json.dumps(content, indent=1) + "\n"
    try:
        write_atomically(folder / STATUS, text)
    except OSError:  # a full disk has room in the old one's place
        with contextlib.suppress(OSError):
            (folder / STATUS).write_text(text, encoding="utf-8")
