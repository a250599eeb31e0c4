"""Files as others may have left them: read without waiting, replaced in one step."""

import errno
import os
import stat
import sys
from pathlib import Path


def read_file(path: Path, most: int) -> bytes:
    """A regular file's content.

    Args:
        path: of the file.
        most: bytes that it may have.

    Raises:
        OSError: it is missing, unreadable, no regular file, or larger; `strerror` says which.
    """
    # non-blocking: a pipe in the file's place would otherwise wait for its writer
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(most + 1)
    finally:
        os.close(descriptor)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"more than {most:,} bytes", str(path))
    return content


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file in one step: readers see the old or the new content."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def say(message: str) -> None:
    """Prints a line; training goes on where nobody reads it (a closed pipe, a full disk)."""
    try:
        print(message, flush=True)
    except OSError as error:
        drop_output()
        print(f"standard output: {error.strerror}: going on without it", file=sys.stderr)


def drop_output() -> None:
    """Sends standard output nowhere: what is left in its buffer would fail again at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
