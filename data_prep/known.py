"""Published data sets, told by the checksums of their files."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from data_prep.file import File
from data_prep.read_idx import NAMES, content_of
from data_prep.samples import Samples
from mnist_fast.errors import InputError

# The files in the order of `NAMES`. "md5" and "git" (the identifier of a git blob, a SHA-1) are of
# the unpacked content, "gz-md5" and "gz-sha256" of the compressed file, where no other is known.
# Sources: torchvision/datasets/mnist.py; the files in the repositories of Fashion-MNIST and QMNIST
# and in copies of KMNIST and EMNIST on GitHub.
KNOWN = {
    "mnist": (
        "md5:6bbc9ace898e44ae57da46a324031adb",
        "md5:a25bea736e30d166cdddb491f175f624",
        "md5:2646ac647ad5339dbf082846283269ea",
        "md5:27ae3e4e09519cfbb04c329615203637",
    ),
    "fashion-mnist": (
        "md5:f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "md5:9018921c3c673c538a1fc5bad174d6f9",
        "md5:8181f5470baa50b63fa0f6fddb340f0a",
        "md5:15d484375f8d13e6eb1aabb0c3f46965",
    ),
    "kmnist": (
        "git:3cf037df1ccd08cf71c7e9465ca6bc729e79a251",
        "md5:949e75301f8813e0dc5800dcc320fc52",
        "md5:bf305b8cd328700fbc17f5acbc2856d2",
        "md5:9f55f451c0988b028eccdf7d5cc265ab",
    ),
    "qmnist": (  # the labels without the other columns
        "gz-md5:ed72d4157d28c017586c42bc6afe6370",
        "md5:a25bea736e30d166cdddb491f175f624",
        "gz-md5:1394631089c404de565df7b7aeaf9412",
        "md5:15e8c8ed218c37aafd4c6faa40f93566",
    ),
    "emnist-digits": (
        "gz-sha256:f7c95004d14d81af89522e67d8f0c781dfb3bd544181c81bfe1eb6b41c35b726",
        "gz-sha256:6638a6ff5fe2eefd9cca2471995b46c82986b8e4b2a70d2f5ce8e05d7edb319e",
        "gz-sha256:20ebe43509264f7639d37c835a3f0b009e90b29e00a099a03101abe1644a3f63",
        "gz-sha256:bad1834c45d5988e270b99d43b13edc3fd898f658ffbc2caf2846ef27f7b05b0",
    ),
}


@dataclass(frozen=True)
class Part:
    """One of the four files of a data set: what it holds as an IDX file, and what was read."""

    header: bytes
    body: memoryview
    file: File | None  # None where the samples come in another form

    @cached_property
    def md5(self) -> str:
        """MD5 of the IDX content."""
        return self._digest("md5")

    def _digest(self, algorithm: str, first: bytes = b"") -> str:
        digest = hashlib.new(algorithm, first + self.header, usedforsecurity=False)
        digest.update(self.body)
        return digest.hexdigest()

    def is_as(self, checksum: str) -> bool | None:
        """Whether it has a checksum of `KNOWN`; None where the two cannot be compared."""
        method, _, wanted = checksum.partition(":")
        if method == "md5":
            return self.md5 == wanted
        if method == "git":
            size = len(self.header) + len(self.body)
            return self._digest("sha1", b"blob %d\0" % size) == wanted
        return self._file_is_as(method.removeprefix("gz-"), wanted)

    def _file_is_as(self, algorithm: str, wanted: str) -> bool | None:
        if self.file is None:
            return None
        with self.file.open() as raw:
            if raw.read(2) != b"\x1f\x8b":
                return None
            raw.seek(0)
            stream: Any = raw
            return hashlib.file_digest(stream, algorithm).hexdigest() == wanted


class Identity(NamedTuple):
    """What a data set is by its checksums.

    Attributes:
        name: of `KNOWN`; None if it is none of them.
        published: whether all of its files were compared and are as published.
        damaged: position of the one file that differs where three are as published, else None.
    """

    name: str | None
    published: bool
    damaged: int | None = None


def parts_of(splits: Mapping[str, Samples], files: Mapping[str, tuple[File, ...]]) -> list[Part]:
    """The four parts of a data set in the order of `NAMES`.

    Args:
        splits: `train` and `test`, as they were read.
        files: of each split the IDX files of images and labels, or none.
    """
    parts = []
    for split, kind in NAMES:
        header, values = content_of(splits[split])[kind]
        of_split = files.get(split, ())
        file = of_split[("images", "labels").index(kind)] if of_split else None
        parts.append(Part(header, values.reshape(-1).data, file))
    return parts


def identify(parts: list[Part]) -> Identity:
    """Finds the data set among `KNOWN`.

    Both label files have to be as published. Images of which only the compressed file has a known
    checksum are taken for the right ones where they come unpacked; `published` is then false.
    """
    for name, checksums in KNOWN.items():
        same = [part.is_as(checksum) for part, checksum in zip(parts, checksums, strict=True)]
        if False not in same and same[1] and same[3]:
            return Identity(name, published=all(same))
        if same.count(True) == len(same) - 1 and False in same:
            return Identity(name, published=False, damaged=same.index(False))
    return Identity(None, published=False)


def refuse_damaged(identity: Identity, place: str) -> None:
    """Raises InputError where three of four files are as published, and one is not."""
    if identity.damaged is not None:
        name = tuple(NAMES.values())[identity.damaged]
        raise InputError(
            f"{place}: {name} is not the published one of {identity.name}, while the other three "
            "are (its checksum differs): replace it with a good copy, or say with --name what it is"
        )
