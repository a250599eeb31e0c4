"""The files of a source, whether it is a folder, an archive or one file."""

import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.archives import MAX_FILES, is_archive, is_ignored, unpack
from data_prep.file import File, on_disk
from mnist_fast.errors import InputError

MAX_DEPTH = 8  # folders below each other


@contextmanager
def open_tree(root: Path, depth: int = MAX_DEPTH) -> Iterator[list[File]]:
    """Gives the files of a folder or an archive, or the one file, sorted by path.

    Args:
        root: the folder, archive or file.
        depth: how many folders below a folder are looked into.

    Raises:
        InputError: there is nothing at `root`, or it cannot be read.
    """
    root = root.expanduser()
    try:
        mode = root.stat().st_mode
    except OSError as error:
        fault = error.strerror or str(error)
        raise InputError(f"--source {root}: {fault}: check the path") from None
    if stat.S_ISDIR(mode):
        yield sorted(_walk(root, "", depth), key=lambda file: file.path)
        return
    file = on_disk(root, root.name)
    if not is_archive(file):
        yield [file]
        return
    with tempfile.TemporaryFile() as spool:  # without a name: gone even after a kill
        yield sorted(unpack(file, spool), key=lambda file: file.path)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link into a folder that may not be read
        return False


def _walk(
    folder: Path, prefix: str, depth: int, above: frozenset[tuple[int, int]] = frozenset()
) -> list[File]:
    """The files below a folder; one that holds itself by a link is not looked into again."""
    files: list[File] = []
    try:
        status = folder.stat()
        with os.scandir(folder) as scan:
            entries = [entry for entry in scan if not is_ignored(entry.name)]
    except OSError as error:
        fault = f"{folder} cannot be read: {error.strerror}"
        if above:  # another user's folder need not hold the data
            print(f"data_prep: {fault}: passed over", file=sys.stderr, flush=True)
            return []
        raise InputError(f"{fault}: check its permissions") from None
    identity = status.st_dev, status.st_ino
    if identity in above:
        return []
    for entry in entries:
        path = prefix + entry.name
        if not _is_folder(entry):
            files.append(on_disk(Path(entry.path), path))
        elif depth > 0:
            files += _walk(Path(entry.path), f"{path}/", depth - 1, above | {identity})
        if len(files) > MAX_FILES:
            raise InputError(
                f"{folder} holds more than {MAX_FILES:,} files: name the folder of the data itself"
            )
    return files
