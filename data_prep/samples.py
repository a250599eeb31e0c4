"""What the readers share: images with labels, the sets they find, and their checks."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from data_prep.file import File
from data_prep.manifest import CLASSES, IMAGE_SHAPE
from mnist_fast.errors import InputError

SIZE = IMAGE_SHAPE[-1]  # rows and columns of an image
MAX_SAMPLES = 1_000_000  # per split; keeps a compressed file from filling the memory

GOOD_COPY = "replace it with a good copy"
_EMNIST_LETTERS = 26


class Samples(NamedTuple):
    """One split in memory.

    Attributes:
        images: uint8 (N, 28, 28), 0 is background.
        labels: uint8 (N,), 0 to 9.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]


@dataclass(frozen=True)
class Found:
    """A data set that a reader found among the files of a source, whole or in part.

    Attributes:
        form: of its files, in words, for instance `CSV`.
        place: folder and name that tell it from others of the same source, in words.
        files: those of each split, `train` and `test`.
        lacks: what is missing, in words; empty where it is whole.
        read: reads the split of that name from its files.
        note: what the user should know of it, in words.
    """

    form: str
    place: str
    files: Mapping[str, tuple[File, ...]]
    lacks: str
    read: Callable[[str, tuple[File, ...]], Samples]
    note: str = ""


class Reader(Protocol):
    """A module that knows one form of files."""

    FORM: str

    def find(self, files: Sequence[File]) -> list[Found]:
        """The data sets of this form, without reading more of a file than its first bytes."""


_SPLIT_WORD = re.compile(
    r"(?<![a-z])(?:mnist)?(?P<word>train(?:ing)?|test(?:ing)?|t10k)(?:set|data)?(?![a-z])"
)


def find_split(text: str) -> tuple[str, str]:
    """The split that a name tells, by words as `train` and `testing`, and the rest of the name.

    The split is empty where there is no such word, or several.
    """
    words = {match["word"][:2] for match in _SPLIT_WORD.finditer(text.lower())}
    split = ("train" if words == {"tr"} else "test") if len(words) == 1 else ""
    return split, _SPLIT_WORD.sub("", text.lower()).strip()


def bad(file: File, fault: str, remedy: str = GOOD_COPY) -> InputError:
    """The error for a file that cannot be used: what is wrong with it, and what to do."""
    return InputError(f"{file.shown} is not usable: {fault}: {remedy}")


def check_shape(file: File, rows: int, columns: int) -> None:
    """Raises InputError unless images have 28 rows and 28 columns."""
    if (rows, columns) != (SIZE, SIZE):
        raise bad(
            file,
            f"its images are {rows}x{columns} instead of {SIZE}x{SIZE}",
            f"resize them to {SIZE}x{SIZE}, gray, as MNIST has it",
        )


def check_count(file: File, count: int) -> None:
    """Raises InputError unless a split of so many samples can be read."""
    if not 0 < count <= MAX_SAMPLES:
        raise bad(file, f"it has {count:,} samples instead of 1 to {MAX_SAMPLES:,}", "split it")


def check_labels(file: File, labels: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Labels as uint8 (N,), or InputError where one is not from 0 to 9."""
    outside = (labels < 0) | (labels >= CLASSES)
    if outside.any():
        lowest, highest = int(labels.min()), int(labels.max())
        position = int(np.argmax(outside))
        raise bad(
            file,
            f"its labels are {lowest} to {highest} (label {position} is {int(labels[position])}) "
            f"instead of 0 to {CLASSES - 1}",
            _ten_classes(lowest, highest),
        )
    return labels.astype(np.uint8)


def _ten_classes(lowest: int, highest: int) -> str:
    if (lowest, highest) == (1, _EMNIST_LETTERS):
        return "these are letters, as EMNIST-letters has them; use data of ten classes, 0 to 9"
    return f"use data of ten classes, and number them 0 to {CLASSES - 1}"
