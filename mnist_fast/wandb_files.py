"""W&B's own files in a run's folder: which lines of the run they hold, and what is to be uploaded.

Every start of a run has a part: a folder with a `.wandb` file, in which W&B's client keeps what it
is given. It writes 32 KiB at a time, so the file of a run that was killed lacks the last lines or
has none. The file is a header and then LevelDB's log format: blocks of 32 KiB, in them pieces of a
checksum (CRC32 over type and data), a length, a type and data. A record is one full piece, or a
first one, any number of middle ones and a last one.
"""

import contextlib
import dataclasses
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

HEADER_SIZE = 7
BLOCK = 32 * 1024
PIECE = struct.Struct("<IHB")  # of a piece: checksum, length, type
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclasses.dataclass
class Part:
    """What one start of a run left.

    Attributes:
        file: the `.wandb` file; its folder is what `wandb sync` takes.
        steps: `_step` of each line of history in the file.
        complete: whether the run's end is in the file.
    """

    file: Path
    steps: set[int]
    complete: bool

    @property
    def folder(self) -> Path:
        """The part's folder."""
        return self.file.parent

    @property
    def online(self) -> bool:
        """Whether the part went to a server while it ran."""
        return not self.folder.name.startswith("offline-")

    @property
    def uploaded(self) -> bool:
        """Whether `wandb sync` or the run itself has uploaded all of it."""
        return _marker(self.file).exists()

    @property
    def reliable(self) -> bool:
        """Whether its lines are on the server or get there by `wandb sync`.

        Of a part that was killed while it was online nobody knows what the server got.
        """
        return self.uploaded or self.complete or not self.online


def tidy_parts(folder: Path, run_id: str, parse: Callable[[bytes], Any]) -> list[Part]:
    """The parts that earlier starts of a run left, the oldest first, fit for `wandb sync`.

    Deletes the folders of those that hold no line, and cuts off an unfinished record at the end of
    a file: `wandb sync` fails at it.

    Args:
        folder: the run's folder.
        run_id: its W&B id.
        parse: makes a `wandb_internal_pb2.Record` of its bytes.
    """
    kept = []
    for file in _files(folder, run_id):
        with contextlib.suppress(OSError):  # what cannot be read is left alone
            part, end = _read(file, parse)
            if not part.steps and not part.uploaded:
                shutil.rmtree(part.folder, ignore_errors=True)
                continue
            kept.append(part)
            if end < file.stat().st_size:
                os.truncate(file, end)
    return kept


def mark_uploaded(files: Iterable[Path]) -> None:
    """Makes `wandb sync` pass `.wandb` files over, as it marks those that it has uploaded."""
    for file in files:
        with contextlib.suppress(OSError):
            _marker(file).touch()


def newest_id(folder: Path) -> str | None:
    """The W&B id of the newest part in a run's folder."""
    files = _files(folder, "*")
    return files[-1].stem.removeprefix("run-") if files else None


def _files(folder: Path, run_id: str) -> list[Path]:
    found = (folder / "wandb").glob(f"*run-*/run-{run_id}.wandb")
    own = [path for path in found if not path.parent.is_symlink()]  # `latest-run` is a link
    return sorted(own, key=lambda path: path.parent.name.removeprefix("offline-"))


def _marker(file: Path) -> Path:
    return file.with_name(file.name + ".synced")


def _read(file: Path, parse: Callable[[bytes], Any]) -> tuple[Part, int]:
    """A part, and the position behind its last whole record."""
    part, end = Part(file, set(), complete=False), HEADER_SIZE
    for data, position in whole_records(file.read_bytes()):
        end, record = position, parse(data)
        if record.HasField("history"):
            part.steps.add(record.history.step.num)
        part.complete |= record.HasField("exit")
    return part, end


def whole_records(content: bytes) -> Iterator[tuple[bytes, int]]:
    """Yields each record of a `.wandb` file and the position of its end.

    Stops without an error at the first record that is damaged or not whole.
    """
    parts: list[bytes] = []
    for kind, data, end in _whole_pieces(content):
        if (kind in (FULL, FIRST)) == bool(parts) or kind not in (FULL, FIRST, MIDDLE, LAST):
            return
        parts.append(data)
        if kind in (FULL, LAST):
            yield b"".join(parts), end
            parts = []


def _whole_pieces(content: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Yields type, data and end of each piece up to the first that is damaged or cut off."""
    position = HEADER_SIZE
    while position + PIECE.size <= len(content):
        left = BLOCK - position % BLOCK
        if left < PIECE.size:  # too short for a piece: zeros
            position += left
            continue
        checksum, length, kind = PIECE.unpack_from(content, position)
        start, end = position + PIECE.size, position + PIECE.size + length
        data = content[start:end]
        if len(data) < length or zlib.crc32(bytes([kind]) + data) != checksum:
            return
        yield kind, data, end
        position = end
