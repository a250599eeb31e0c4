"""MNIST's own files (IDX), under all the names that they are found with, and those of its kin."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.file import UNKNOWN, File, is_broken_download, kind, opened
from data_prep.manifest import SPLITS
from data_prep.samples import MAX_SAMPLES, SIZE, Found, Samples, bad, check_labels, check_shape
from mnist_fast.errors import InputError

FORM = "IDX"

# Canonical names: they name what is missing, and the checksums in the manifest.
NAMES = {
    ("train", "images"): "train-images-idx3-ubyte",
    ("train", "labels"): "train-labels-idx1-ubyte",
    ("test", "images"): "t10k-images-idx3-ubyte",
    ("test", "labels"): "t10k-labels-idx1-ubyte",
}
IMAGE_MAGIC, LABEL_MAGIC = 0x00000803, 0x00000801  # unsigned bytes of three and one dimensions
_QMNIST_MAGIC = 0x00000C02  # 32-bit integers of two dimensions: a row per image, its class first

_SPLIT = {"train": "train", "training": "train", "t10k": "test", "test": "test", "testing": "test"}
_NAME = re.compile(
    r"(?:(?P<prefix>[a-z0-9-]+)-)?(?P<split>train|training|t10k|test|testing)-"
    r"(?P<part>images|labels)(?:-idx[123])?(?:-ubyte|-int)?(?:-gz)?"
)
_COPY = re.compile(r"\s*\(\d+\)")  # what a browser adds to the name of a second download


class Header(NamedTuple):
    """What an IDX file says of itself.

    Attributes:
        magic: type and number of dimensions.
        shape: the dimensions, the number of samples first.
    """

    magic: int
    shape: tuple[int, ...]


class Name(NamedTuple):
    """What a file's name says: `emnist-digits-test-images-idx3-ubyte.gz` and the like."""

    prefix: str  # `emnist-digits`; empty in MNIST's own names
    split: str
    part: str  # `images` or `labels`


def parse_name(name: str) -> Name | None:
    """What the name of an IDX file says; None for other names.

    Upper case, dots or underscores for dashes, `.gz` and a browser's ` (1)` make no difference.
    """
    plain = re.sub(r"[-._\s]+", "-", _COPY.sub("", name.lower()))
    match = _NAME.fullmatch(plain)
    if match is None:
        return None
    return Name(match["prefix"] or "", _SPLIT[match["split"]], match["part"])


def find(files: Sequence[File]) -> list[Found]:
    """The sets of four files, by folder and by what stands in front of their names.

    Where none is whole, the files of all folders are taken for one set, if none of them is there
    twice: which belong together could not be told.
    """
    groups: defaultdict[tuple[str, str], list[tuple[Name, File]]] = defaultdict(list)
    for file in files:
        if name := parse_name(file.name):
            groups[_folder(file, name), name.prefix].append((name, file))
    found = [_found(" ".join(group).strip(), members) for group, members in groups.items()]
    if not all(one.lacks for one in found):
        return found
    by_prefix: defaultdict[str, list[tuple[Name, File]]] = defaultdict(list)
    there: Counter[Name] = Counter()
    for (_, prefix), members in groups.items():
        by_prefix[prefix] += members
        there.update({name for name, _ in members})
    if max(there.values(), default=0) > 1:
        return found
    return [_found(prefix, members) for prefix, members in by_prefix.items()]


def _folder(file: File, name: Name) -> str:
    """Its folder, or the one above where that has the file's own name (Kaggle's mirror)."""
    folder = PurePosixPath(file.path).parent
    if parse_name(folder.name) == name:
        folder = folder.parent
    return "" if str(folder) == "." else str(folder)


def _found(place: str, members: list[tuple[Name, File]]) -> Found:
    parts: dict[tuple[str, str], File] = {}
    for name, file in sorted(members, key=_preference):
        parts.setdefault((name.split, name.part), file)
    prefix = members[0][0].prefix
    missing = [
        f"{prefix}-{NAMES[key]}" if prefix else NAMES[key] for key in NAMES if key not in parts
    ]
    return Found(
        form=FORM,
        place=place,
        files={
            split: tuple(parts[key] for key in NAMES if key[0] == split and key in parts)
            for split in SPLITS
        },
        lacks=", ".join(missing),
        read=read,
    )


def _preference(member: tuple[Name, File]) -> tuple[bool, bool, int, str]:
    """Of two files for one part: not a browser's second copy, not compressed, not further below."""
    path = member[1].path
    copy = _COPY.search(member[1].name) is not None
    return copy, member[1].name.endswith("gz"), path.count("/"), path


def read(split: str, files: tuple[File, ...]) -> Samples:
    """Reads one split from its two files, strictly.

    Raises:
        InputError: a file cannot be read, is not exactly such a file, or the two do not fit.
    """
    images, labels = read_images(files[0]), read_labels(files[1])
    if len(images) != len(labels):
        raise InputError(
            f"{files[0].shown} has {len(images):,} images but {files[1].shown} {len(labels):,} "
            "labels: get both from the same place"
        )
    return Samples(images, labels)


def read_images(file: File) -> NDArray[np.uint8]:
    """Images, uint8 (N, 28, 28), of an IDX file.

    The format: a magic number that tells type and dimensions, and the dimensions, as big-endian
    32-bit integers; then the values, one byte each.
    """
    with opened(file) as content:
        header = _read_header(file, content.stream, {IMAGE_MAGIC: 3})
        check_shape(file, *header.shape[1:])
        body = _read_body(file, content.stream, header, 1, content.most)
    return np.frombuffer(body, np.uint8).reshape(header.shape)


def read_labels(file: File) -> NDArray[np.uint8]:
    """Labels, uint8 (N,), of an IDX file of MNIST, or of QMNIST's with eight numbers per image."""
    with opened(file) as content:
        header = _read_header(file, content.stream, {LABEL_MAGIC: 1, _QMNIST_MAGIC: 2})
        width = 1 if header.magic == LABEL_MAGIC else 4
        if len(header.shape) == 2 and not 0 < header.shape[1] <= 64:
            raise bad(file, f"it has {header.shape[1]:,} numbers per image instead of QMNIST's 8")
        body = _read_body(file, content.stream, header, width, content.most)
    if width == 1:
        return check_labels(file, np.frombuffer(body, np.uint8))
    return check_labels(file, np.frombuffer(body, ">i4").reshape(header.shape)[:, 0])


def _read_header(file: File, stream: IO[bytes], dimensions: dict[int, int]) -> Header:
    """Reads a header whose magic number is among `dimensions`, which tells how many follow."""
    start = stream.read(4)
    if len(start) == 4 and (magic := int.from_bytes(start)) in dimensions:
        rest = stream.read(4 * dimensions[magic])
        if len(rest) == 4 * dimensions[magic]:
            header = Header(magic, tuple(np.frombuffer(rest, ">u4").tolist()))
            if not 0 < header.shape[0] <= MAX_SAMPLES:
                fault = f"its header says {header.shape[0]:,} samples instead of 1 to"
                raise bad(file, f"{fault} {MAX_SAMPLES:,}")
            return header
        start += rest
    raise _not_idx(file, start, stream, list(dimensions))


def _not_idx(file: File, start: bytes, stream: IO[bytes], magics: list[int]) -> InputError:
    head = start + stream.read(256)
    if is_broken_download(head):
        return bad(file, f"it is {kind(head)}")
    if kind(head) != UNKNOWN:
        return bad(file, f"it is {kind(head)}", "name it after its content")
    if len(head) < 8:
        return bad(file, f"it is truncated: {len(head)} bytes, not even a whole header")
    magic = int.from_bytes(head[:4])
    if magic in (IMAGE_MAGIC, LABEL_MAGIC) and magic not in magics:
        swapped = "images" if magic == IMAGE_MAGIC else "labels"
        return bad(
            file, f"it holds {swapped} (0x{magic:08x})", "name the files after their content"
        )
    if magic in magics:
        return bad(file, f"it is truncated: {len(head)} bytes, not even a whole header")
    return bad(file, f"its magic number is 0x{magic:08x} instead of 0x{magics[0]:08x}")


def _read_body(file: File, stream: IO[bytes], header: Header, width: int, most: int) -> bytes:
    size = width * int(np.prod(header.shape, dtype=np.int64))
    count = header.shape[0]
    # Compared before reading, so that a header cannot ask for more memory than the file is worth.
    body = stream.read(size + 1) if size <= most else b""
    if len(body) < size:
        raise bad(file, f"it is truncated: it lacks some of the {count:,} samples of its header")
    if len(body) > size:
        raise bad(file, f"it is too long: there is more than the {count:,} samples of its header")
    return body


def content_of(samples: Samples) -> dict[str, tuple[bytes, NDArray[np.uint8]]]:
    """Header and body of the two IDX files that hold the samples: `images` and `labels`."""
    count = len(samples.labels)
    return {
        "images": (_header(IMAGE_MAGIC, count, SIZE, SIZE), samples.images),
        "labels": (_header(LABEL_MAGIC, count), samples.labels),
    }


def _header(*numbers: int) -> bytes:
    return np.array(numbers, ">u4").tobytes()
