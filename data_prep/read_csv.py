"""CSV with an image per line, its label first and then 784 pixels, as Kaggle and others have it."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import IO

import numpy as np
from numpy.typing import NDArray

from data_prep.file import UNKNOWN, File, kind, opened
from data_prep.manifest import SPLITS
from data_prep.samples import (
    MAX_SAMPLES,
    SIZE,
    Found,
    Samples,
    bad,
    check_count,
    check_labels,
    find_split,
)

FORM = "CSV"

_PIXELS = SIZE * SIZE
_COLUMNS = 1 + _PIXELS
_MAX_LINE = 1 << 16  # bytes; a line has at most 4 * 785, a header of long names about 12,000
_BLOCK = 1 << 23  # bytes parsed at once
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SEPARATORS = (b",", b";", b"\t")  # spreadsheets write the last two where a comma is for decimals
_LABEL = re.compile(rb"(?i)label|labels|class|y|target|digit")


def find(files: Sequence[File]) -> list[Found]:
    """Pairs of files whose names differ only in `train` and `test`, in one folder or in two.

    Where there is none, the one training and the one test file.
    """
    groups: defaultdict[str, dict[str, File]] = defaultdict(dict)
    tables = [file for file in files if re.search(r"\.csv(\.gz)?( ?\(\d+\))?$", file.name)]
    for file in tables:
        split, rest = _split_of(file)
        groups[rest].setdefault(split, file)
    if len(groups) == 2:
        one, other = groups.values()
        if sorted([*one, *other]) == sorted(SPLITS):
            return [_found("", one | other)]
    found = [_found(rest, parts) for rest, parts in groups.items()]
    whole = [one for one in found if not one.lacks]
    return whole or found[:1]


def _split_of(file: File) -> tuple[str, str]:
    """Which split a file is, and its path without the word that says so."""
    stem = re.sub(r" ?\(\d+\)", "", file.name)
    _, place = find_split(f"{file.folder} {stem}")
    splits = (find_split(text)[0] for text in (stem, file.folder.rpartition("/")[2]))
    return next(filter(None, splits), ""), place


def _found(place: str, parts: dict[str, File]) -> Found:
    missing = next((split for split in SPLITS if split not in parts), "")
    lacks = f"the {missing} set, a CSV with `{missing}` in its name" if missing else ""
    files = {split: (parts[split],) if split in parts else () for split in SPLITS}
    return Found(FORM, place, files, lacks, read)


def read(split: str, files: tuple[File, ...]) -> Samples:
    """Reads one split from its file, strictly.

    Every line has 785 whole numbers from 0 to 255, the label first. A first line of names is left
    out. Semicolons or tabs between the numbers, quotes around them, and a byte order mark make no
    difference.

    Raises:
        InputError: the file is not such a table; the message names the line.
    """
    (file,) = files
    images, labels, count = [], [], 0
    with opened(file) as content:
        named, separator = _skip_header(file, content.stream)
        first_line = 1 + named
        for block in _blocks(file, content.stream, separator):
            values = _parse(file, block, first_line + count)
            count += len(values)
            if count > MAX_SAMPLES:
                raise bad(file, f"it has more than {MAX_SAMPLES:,} lines", "split it")
            images.append(np.ascontiguousarray(values[:, 1:]).reshape(-1, SIZE, SIZE))
            labels.append(values[:, 0].copy())
    check_count(file, count)
    return Samples(np.concatenate(images), check_labels(file, np.concatenate(labels)))


def _skip_header(file: File, stream: IO[bytes]) -> tuple[bool, bytes]:
    """Leaves the stream at the first line of numbers.

    Returns whether there was a line of names, and what separates the columns.
    """
    line = stream.readline(_MAX_LINE)
    if not line.endswith(b"\n") and len(line) == _MAX_LINE:
        raise _long_line(file, 1)
    text = line.removeprefix(_BYTE_ORDER_MARK).strip().replace(b'"', b"")
    separator = max(_SEPARATORS, key=text.count)
    fields = text.split(separator)
    if line and not text:
        raise bad(file, "its first line is empty", "begin with the names or an image")
    if not text or kind(line) != UNKNOWN:
        raise bad(file, f"it is {kind(line)}")
    if b"\0" in line:
        raise bad(file, "it is not plain text, perhaps UTF-16", "save it as UTF-8")
    if len(fields) != _COLUMNS:
        raise _wrong_columns(file, len(fields))
    fields = [field.strip() for field in fields]
    named = bool(_LABEL.fullmatch(fields[0])) or fields == [b"%d" % n for n in range(_COLUMNS)]
    if not named and not all(map(_is_number, fields)):
        first = fields[0].decode(errors="replace")[:30]
        raise bad(file, f"its first column is {first!r}", "put the label into the first column")
    if not named:
        stream.seek(len(_BYTE_ORDER_MARK) if line.startswith(_BYTE_ORDER_MARK) else 0)
    return named, separator


def _is_number(field: bytes) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def _wrong_columns(file: File, columns: int) -> Exception:
    if columns == _PIXELS:
        return bad(
            file,
            f"it has no labels: {_PIXELS} columns, which are the pixels alone",
            "give a CSV with the label in a first column (of Kaggle's digit-recognizer only "
            "train.csv has one)",
        )
    fault = f"its first line has {columns:,} columns instead of {_COLUMNS}"
    if columns == 1 + 32 * 32:
        return bad(file, "its images are 32x32 instead of 28x28", "resize them to 28x28")
    if columns == 1 + _COLUMNS:
        return bad(file, fault, "leave a column of row numbers out (index=False in pandas)")
    return bad(file, fault, f"write the label and then {SIZE} x {SIZE} pixels")


def _long_line(file: File, number: int) -> Exception:
    return bad(
        file, f"line {number:,} has more than {_MAX_LINE:,} bytes", "write an image per line"
    )


def _blocks(file: File, stream: IO[bytes], separator: bytes) -> Iterator[bytes]:
    """The file in blocks of whole lines, with commas, without quotes and carriage returns."""
    commas, rest = bytes.maketrans(separator, b","), b""
    while chunk := stream.read(_BLOCK):
        block, newline, rest = (rest + chunk).rpartition(b"\n")
        if not newline:
            block, rest = b"", rest or block
        if len(rest) > _MAX_LINE:
            raise bad(file, f"it has a line of more than {_MAX_LINE:,} bytes", "an image per line")
        if block:
            yield block.translate(commas, b'\r"') + b"\n"
    if rest.strip():
        yield rest.translate(commas, b'\r"') + b"\n"


def _parse(file: File, block: bytes, first_line: int) -> NDArray[np.uint8]:
    """Numbers (lines, 785) of a block of whole lines, in a few passes over all of its bytes.

    Args:
        file: for messages.
        block: ends with a line break.
        first_line: its number in the file.
    """
    data = np.frombuffer(block.rstrip(b"\n") + b"\n", np.uint8)
    digits = data - np.uint8(ord("0"))  # others wrap around to 10 and more
    ends = np.flatnonzero(digits > 9)
    lengths = np.diff(ends, prepend=-1) - 1
    broken = data[ends] == ord("\n")
    good = (broken | (data[ends] == ord(","))) & (lengths >= 1) & (lengths <= 3)
    good &= broken == (np.arange(1, len(ends) + 1) % _COLUMNS == 0)
    values = digits[ends - 1].astype(np.uint16)
    values += np.where(lengths >= 2, digits[ends - 2], 0) * np.uint16(10)
    values += np.where(lengths >= 3, digits[ends - 3], 0) * np.uint16(100)
    good &= values <= 255
    if not good.all():
        raise _bad_line(file, block, first_line)
    return values.astype(np.uint8).reshape(-1, _COLUMNS)


def _bad_line(file: File, block: bytes, first_line: int) -> Exception:
    """What is wrong with the first bad line of a block, looked for line by line."""
    for number, line in enumerate(block.split(b"\n"), first_line):
        fields = line.split(b",")
        if len(fields) != _COLUMNS:
            fault = f"line {number:,} has {len(fields):,} columns instead of {_COLUMNS}"
            return bad(file, fault)
        for column, field in enumerate(fields, 1):
            if not (field.isdigit() and len(field) <= 3 and int(field) <= 255):
                text = field.decode(errors="replace")[:30]
                fault = f"line {number:,}, column {column}: {text!r} instead of a whole number"
                return bad(file, f"{fault} from 0 to 255", _write_whole(field))
    return bad(file, f"the lines from {first_line:,} on are not a table")


def _write_whole(field: bytes) -> str:
    return "write pixels as whole numbers, 0 to 255" if b"." in field else "mend that line"
