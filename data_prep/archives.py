"""The files of a .zip or .tar, copied into one nameless file: their paths touch no disk."""

import bz2
import gzip
import io
import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from contextlib import suppress
from pathlib import PurePosixPath
from typing import IO, Any, BinaryIO

from data_prep.file import ZIP, File
from mnist_fast.errors import InputError

MAX_FILES = 1_000_000
MAX_UNPACKED = 2 << 30  # bytes of an archive's files together; EMNIST as CSV has 0.5 GB
MAX_RATIO = 100  # of them to the archive's own bytes; MNIST's files have 5, as CSV 10
MIN_UNPACKED = 64 << 20  # which no ratio forbids

_CHUNK = 1 << 20
_DAMAGES = (
    EOFError,
    zlib.error,
    lzma.LZMAError,
    gzip.BadGzipFile,
    tarfile.TarError,
    zipfile.BadZipFile,
)
_TAR_MAGIC = slice(257, 262)
_IGNORED = {"thumbs.db", "desktop.ini", "__macosx"}  # what systems leave in folders and archives


class _Slice(io.RawIOBase):
    """A part of the spool, read by position: several can be open at once."""

    def __init__(self, descriptor: int, start: int, size: int) -> None:
        self._descriptor, self._start, self._size, self._at = descriptor, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        wanted = max(0, min(len(buffer), self._size - self._at))
        read = os.preadv(self._descriptor, [buffer[:wanted]], self._start + self._at)
        self._at += read
        return read


class _Spool:
    """Copies an archive's members behind each other into one file; their names touch no disk."""

    def __init__(self, archive: File, spool: IO[bytes]) -> None:
        self.archive, self.spool = archive, spool
        self.files: list[File] = []
        self._end = 0
        self._most = min(MAX_UNPACKED, max(MIN_UNPACKED, MAX_RATIO * archive.size))

    def add(self, path: str, member: IO[bytes]) -> None:
        """Copies one member.

        Raises:
            InputError: the archive has more files or bytes than a data set can have.
        """
        start = self._end
        while chunk := member.read(_CHUNK):
            self._end += len(chunk)
            if self._end > self._most or len(self.files) >= MAX_FILES:
                raise InputError(
                    f"{self.archive.shown} holds more than {MAX_FILES:,} files or "
                    f"{self._most / 1e6:,.0f} MB: unpack what you need and give that folder"
                )
            self.spool.write(chunk)
        size, descriptor = self._end - start, self.spool.fileno()

        def open_it() -> BinaryIO:
            return io.BufferedReader(_Slice(descriptor, start, size))

        path = path.replace("\\", "/")  # as some programs for Windows write it
        shown = "".join(letter if letter.isprintable() else "?" for letter in path)
        self.files.append(File(path, f"{self.archive.shown}: {shown}", size, open_it))


def is_archive(file: File) -> bool:
    """Whether a file is a .zip (but no .npz) or a .tar, compressed or not."""
    if file.name.endswith(".npz"):
        return False
    try:
        with file.open() as raw:
            return raw.read(len(ZIP)) == ZIP or _is_tar(raw)
    except OSError:
        return False


def _is_tar(raw: BinaryIO) -> bool:
    with suppress(OSError, EOFError, zlib.error, lzma.LZMAError), _decompressed(raw) as stream:
        return stream.read(512)[_TAR_MAGIC] == b"ustar"
    return False


def _decompressed(raw: BinaryIO) -> Any:
    raw.seek(0)
    head = raw.read(6)
    raw.seek(0)
    if head.startswith(b"\x1f\x8b"):
        return gzip.open(raw)
    if head.startswith(b"BZh"):
        return bz2.open(raw)
    if head.startswith(b"\xfd7zXZ"):
        return lzma.open(raw)
    return raw


def unpack(archive: File, spool: IO[bytes]) -> list[File]:
    """Copies the files of an archive into `spool`, which has to stay open as long as they are read.

    Raises:
        InputError: it is damaged, encrypted, or holds more than a data set can.
    """
    copied = _Spool(archive, spool)
    try:
        with archive.open() as raw:
            if raw.read(len(ZIP)) == ZIP:
                _copy_zip(raw, copied)
            else:
                with _decompressed(raw) as stream:
                    _copy_tar(stream, copied)
        spool.flush()
    except _DAMAGES as error:
        fault = f"{archive.shown} is not usable: it is not a complete archive ({error})"
        raise InputError(f"{fault}: replace it with a good copy") from None
    except (NotImplementedError, RuntimeError, ValueError) as error:  # encrypted, unknown method
        raise InputError(
            f"{archive.shown} cannot be unpacked: {error}: unpack it yourself"
        ) from None
    except OSError as error:
        fault = error.strerror or str(error)
        raise InputError(
            f"{archive.shown} cannot be unpacked: {fault}: unpack it yourself"
        ) from None
    return copied.files


def _copy_zip(raw: BinaryIO, copied: _Spool) -> None:
    with zipfile.ZipFile(raw) as archive:
        for member in archive.infolist():
            is_link = stat.S_ISLNK(member.external_attr >> 16)
            if not member.is_dir() and not is_link and _is_wanted(member.filename):
                with archive.open(member) as content:
                    copied.add(member.filename, content)


class _Careful:
    """A tar's stream that is never asked for much at once, as a hostile header would have it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.tell, self.seek = stream.tell, stream.seek
        self._last = b""

    def read(self, size: int) -> bytes:
        if not 0 <= size <= 16 * _CHUNK:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        self._last = self._stream.read(size)
        return self._last

    def check_end(self) -> None:
        """Refuses an end that is no tar's: tarfile takes a damaged header for one, too.

        Reads what follows, so that a compressed archive's checksum is compared.
        """
        if not self._last or any(self._last):
            raise tarfile.ReadError("a damaged header, or no end")
        for _ in range(MIN_UNPACKED // _CHUNK):
            if not (rest := self._stream.read(_CHUNK)):
                return
            if any(rest):
                break
        raise tarfile.ReadError("something follows its end")


def _copy_tar(stream: IO[bytes], copied: _Spool) -> None:
    # Forwards only: going back would decompress all of it again.
    careful: Any = _Careful(stream)
    with tarfile.open(fileobj=careful, mode="r:") as opened:
        archive: Any = opened
        while (member := archive.next()) is not None:
            archive.members = []  # else it keeps them all
            if not member.isreg() or member.issparse() or not _is_wanted(member.name):
                continue
            if member.size > MAX_UNPACKED:
                raise tarfile.ReadError(f"a member of {member.size:,} bytes")
            content = archive.extractfile(member)
            if content is not None:
                copied.add(member.name, content)
    careful.check_end()


def _is_wanted(path: str) -> bool:
    return not any(is_ignored(part) for part in PurePosixPath(path.replace("\\", "/")).parts)


def is_ignored(name: str) -> bool:
    """Whether a file or folder of that name is none of the user's, or hidden."""
    return name.startswith(".") or name.lower() in _IGNORED
