"""One file of a source: its name, its first bytes, its content."""

import gzip
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from mnist_fast.errors import InputError

_GZIP_RATIO = 1100  # no gzip stream expands further (deflate's limit is 1032)

_HEAD = 512  # bytes by which a file's kind is told

UNKNOWN = "a file of unknown kind"
ZIP = b"PK\x03\x04"

_EMPTY, _HTML = "an empty file", "an HTML page"
_LFS = b"version https://git-lfs"

# First bytes, and what begins with them.
_KINDS = (
    (b"\x1f\x8b", "a gzip file"),
    (b"PAR1", "a Parquet file"),
    (ZIP, "a zip archive"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"BZh", "a bzip2 file"),
    (b"\xfd7zXZ\x00", "an xz file"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!", "a rar archive"),
    (b"\x93NUMPY", "a NumPy array (.npy)"),
    (b"\x89HDF", "an HDF5 file"),
    (_LFS, "a Git LFS pointer, not the file itself"),
    (b"\x80\x02", "a Python pickle"),
)


@dataclass(frozen=True)
class File:
    """One file of a source.

    Attributes:
        path: where it lies in the source, with slashes.
        shown: its name in messages.
        size: in bytes.
        open: gives its bytes, seekable.
    """

    path: str
    shown: str
    size: int
    open: Callable[[], BinaryIO]

    @property
    def name(self) -> str:
        """The last part of its path, in lower case."""
        return PurePosixPath(self.path).name.lower()

    @property
    def folder(self) -> str:
        """The path of its folder in the source; empty at the top."""
        folder = str(PurePosixPath(self.path).parent)
        return "" if folder == "." else folder

    def head(self) -> bytes:
        """The first bytes, unpacked where they are gzip's; empty where they cannot be read."""
        with suppress(InputError), opened(self) as content:
            return content.stream.read(_HEAD)
        return b""


class Content(NamedTuple):
    """An open file, unpacked where it is gzip's, and the most bytes that it can have."""

    stream: Any  # readable and seekable, of bytes
    most: int


@contextmanager
def opened(file: File) -> Iterator[Content]:
    """Opens a file; whether it is compressed is told by its first bytes, not by its name.

    Raises:
        InputError: it cannot be read, also from the `with` block.
    """
    try:
        with file.open() as raw:
            compressed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            if compressed:
                with gzip.open(raw) as stream:
                    yield Content(stream, file.size * _GZIP_RATIO)
            else:
                yield Content(raw, file.size)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        fault = f"{file.shown} is not usable: it is not a complete gzip file ({error})"
        raise InputError(f"{fault}: replace it with a good copy") from None
    except OSError as error:
        fault = error.strerror or str(error)
        raise InputError(f"{file.shown} cannot be read: {fault}: check its permissions") from None


def kind(head: bytes) -> str:
    """What a file is by its first bytes, in words."""
    if not head:
        return _EMPTY
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        return _HTML
    known = (words for magic, words in _KINDS if head.startswith(magic))
    return next(known, UNKNOWN)


def is_broken_download(head: bytes) -> bool:
    """Whether a file is what a failed download leaves, so that another copy would help."""
    return kind(head) in (_EMPTY, _HTML) or head.startswith(_LFS)


def on_disk(path: Path, below: str) -> File:
    """A file of the disk, which lies at `below` in the source; opening it never waits."""

    def open_it() -> BinaryIO:
        # non-blocking: a pipe in the file's place would otherwise wait for its writer
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise InputError(f"{path} is not a regular file: put the file itself there")
        return os.fdopen(descriptor, "rb")

    try:
        size = path.stat().st_size
    except OSError:  # a link to nowhere, of which opening tells more
        size = 0
    return File(below, str(path), size, open_it)
