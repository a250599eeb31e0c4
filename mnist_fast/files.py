"""Safe reads and atomic writes of files, and lines on standard output."""

import contextlib
import errno
import os
import stat
import sys
from pathlib import Path


def read_file(path: Path, most: int, follow: bool = True) -> bytes:
    """A regular file's content.

    Args:
        path: of the file.
        most: largest size in bytes; a larger file is refused.
        follow: whether it may be a symbolic link.

    Raises:
        OSError: it is missing, unreadable, no regular file, or larger; `strerror` says which.
    """
    # non-blocking: a pipe in the file's place would otherwise wait for its writer
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW))
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if status.st_size > most:
            raise OSError(errno.EFBIG, f"more than {most:,} bytes", str(path))
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(most)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces a file in one step: readers see the old or the new content."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def say(message: str) -> None:
    """Prints a line; goes on if that fails (a closed pipe, a full disk)."""
    try:
        print(message, flush=True)
    except OSError as error:
        drop_output()
        with contextlib.suppress(OSError):  # often both go to one place
            print(f"standard output: {error.strerror}: going on without it", file=sys.stderr)


def drop_output() -> None:
    """Sends standard output nowhere: what is left in its buffer would fail again at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
