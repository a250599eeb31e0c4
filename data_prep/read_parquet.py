"""Parquet as Hugging Face has it: a column `image` of PNG files and a column `label`.

Needs pyarrow, an optional dependency (`parquet` in pyproject.toml).
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.file import File, kind
from data_prep.manifest import SPLITS
from data_prep.picture import MAX_BYTES, decode
from data_prep.samples import SIZE, Found, Samples, bad, check_count, check_labels, find_split
from mnist_fast.errors import InputError

FORM = "Parquet"

_BATCH = 1000  # rows decoded at once
_MAX_GROUP = 1 << 30  # bytes of a row group, which is unpacked as a whole
_COLUMNS = ("image", "label")


def find(files: Sequence[File]) -> list[Found]:
    """Sets of files named `train-00000-of-00001.parquet`, or in folders `train` and `test`."""
    groups: defaultdict[str, dict[str, list[File]]] = defaultdict(lambda: {"train": [], "test": []})
    tables = [file for file in files if file.name.endswith(".parquet")]
    for file in tables:
        split, place = _split_of(file)
        if split:
            groups[place][split].append(file)
    if tables and not groups:
        lacks = f"`train` and `test` in the names of its files ({tables[0].name})"
        return [Found(FORM, "", {"train": (), "test": ()}, lacks, read)]
    return [_found(place, parts) for place, parts in groups.items()]


def _split_of(file: File) -> tuple[str, str]:
    path = PurePosixPath(file.path)
    for part, place in ((file.name, file.folder), (path.parent.name, str(path.parent.parent))):
        if split := find_split(part)[0]:
            return split, "" if place == "." else place
    return "", ""


def _found(place: str, parts: dict[str, list[File]]) -> Found:
    missing = [split for split in SPLITS if not parts[split]]
    lacks = f"the {missing[0]} set ({missing[0]}-00000-of-00001.parquet)" if missing else ""
    lacks = lacks or next(filter(None, map(_missing_file, parts.values())), "")
    return Found(FORM, place, {split: tuple(parts[split]) for split in SPLITS}, lacks, read)


def _missing_file(files: Sequence[File]) -> str:
    """One that the others' names tell of, as 00000-of-00002 does; empty where all are there."""
    names = {file.name for file in files}
    for name in sorted(names):
        if match := re.search(r"(\d+)-of-(\d+)", name):
            digits, count = len(match[1]), int(match[2])
            every = (
                name[: match.start(1)] + f"{n:0{digits}d}" + name[match.end(1) :]
                for n in range(min(count, len(names) + 1))
            )
            return next((other for other in every if other not in names), "")
    return ""


def read(split: str, files: tuple[File, ...]) -> Samples:
    """Reads one split from its files, in the order of their names, a batch of rows at a time.

    Raises:
        InputError: pyarrow is not installed, or a file is not such a table.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            f"{files[0].shown} needs pyarrow, which is not installed: "
            "run `$(scripts/find_uv.sh) pip install pyarrow`"
        ) from None
    images, labels = [], []
    for file in files:
        try:
            with file.open() as raw, pyarrow.parquet.ParquetFile(raw) as table:
                _check_table(file, table)
                for batch in table.iter_batches(_BATCH, columns=list(_COLUMNS)):
                    images += [decode(file, data) for data in _pictures(file, batch)]
                    labels.append(_labels(file, batch.column("label")))
        except (pyarrow.ArrowException, OSError) as error:
            with file.open() as raw:
                what = kind(raw.read(64))
            fault = " ".join(str(error).split())[:120]
            raise bad(file, f"it is {what} and cannot be read ({fault})") from None
    check_count(files[0], len(images))
    return Samples(np.stack(images), check_labels(files[0], np.concatenate(labels)))


def _check_table(file: File, table: Any) -> None:
    names = table.schema_arrow.names
    missing = [name for name in _COLUMNS if name not in names]
    if missing:
        there = ", ".join(names[:8])
        raise bad(
            file,
            f"it has no column {missing[0]} (but {there})",
            "name the columns image and label, as Hugging Face has them",
        )
    check_count(file, table.metadata.num_rows)
    groups = range(table.metadata.num_row_groups)
    if any(table.metadata.row_group(group).total_byte_size > _MAX_GROUP for group in groups):
        raise bad(file, f"a row group has more than {_MAX_GROUP:,} bytes", "write smaller groups")


def _labels(file: File, column: Any) -> NDArray[np.integer]:
    numbers = column.to_numpy(zero_copy_only=False)
    if numbers.dtype.kind not in "iu":  # also where some are missing
        raise bad(
            file, "its column label is not a whole number in every row", "give each its class"
        )
    return numbers


def _pictures(file: File, batch: Any) -> Iterator[bytes]:
    """The bytes of a batch's pictures."""
    for cell in batch.column("image").to_pylist():
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if not isinstance(data, bytes):
            raise bad(file, "its column image holds no bytes", f"store PNG files of {SIZE}x{SIZE}")
        if len(data) > MAX_BYTES:
            raise bad(file, f"a picture has more than {MAX_BYTES:,} bytes", f"use {SIZE}x{SIZE}")
        yield data
