"""Folders of PNG or JPEG files: `train/0/...`, `test/9/...`, one folder per class."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np
from tqdm import tqdm

from data_prep.file import File, opened
from data_prep.manifest import CLASSES, SPLITS
from data_prep.picture import MAX_BYTES, decode
from data_prep.samples import SIZE, Found, Samples, bad, check_count
from mnist_fast.errors import InputError

FORM = "pictures"

_SUFFIXES = (".png", ".jpg", ".jpeg")
_OTHERS = (".bmp", ".gif", ".tif", ".tiff", ".webp")
_SPLIT = {"train": "train", "training": "train", "test": "test", "testing": "test"}
_WANTED = "folders train/0 to train/9 and test/0 to test/9"


def find(files: Sequence[File]) -> list[Found]:
    """The set whose pictures lie in a folder of their class, below one of their split."""
    groups: defaultdict[str, dict[str, list[File]]] = defaultdict(lambda: {"train": [], "test": []})
    pictures = [file for file in files if file.name.endswith(_SUFFIXES)]
    left_out = []
    for file in pictures:
        split, place = _split_of(file)
        if split:
            groups[place][split].append(file)
        else:
            left_out.append(file)
    if not groups and pictures:
        lacks = f"{_WANTED} (its pictures lie in {_folders(pictures)})"
        return [Found(FORM, "", {"train": (), "test": ()}, lacks, read)]
    left_out += [file for file in files if file.name.endswith(_OTHERS)]
    note = ""
    if left_out:
        note = f"{len(left_out):,} pictures are left out, such as {left_out[0].path}"
    return [_found(place, parts, note) for place, parts in groups.items()]


def _split_of(file: File) -> tuple[str, str]:
    """The split whose folder lies two above the picture, and the folder above that."""
    parts = PurePosixPath(file.path).parts
    split = _SPLIT.get(parts[-3].lower(), "") if len(parts) >= 3 else ""
    return split, "/".join(parts[:-3])


def _folders(pictures: Sequence[File]) -> str:
    counts = Counter(file.folder or "the folder itself" for file in pictures)
    return ", ".join(sorted(counts)[:3]) + (", ..." if len(counts) > 3 else "")


def _found(place: str, parts: dict[str, list[File]], note: str) -> Found:
    missing = [split for split in SPLITS if not parts[split]]
    lacks = f"the folders {missing[0]}/0 to {missing[0]}/9" if missing else ""
    files = {split: tuple(sorted(parts[split], key=_order)) for split in SPLITS}
    return Found(FORM, place, files, lacks, read, note)


def _order(file: File) -> tuple[list[tuple[int, str]], str]:
    """Pictures in the order of their names, numbers by value, and then of their classes.

    So pictures that are numbered through all classes come in the order of the set they were made
    from, and those numbered within each class one of each class in turn.
    """
    parts = re.split(r"(\d+)", file.name)  # text and digits in turn
    digits = (part.lstrip("0") for part in parts[1::2])
    numbers = [(len(number), number) for number in digits]
    texts = [(0, part) for part in parts[::2]]
    key = [item for pair in zip(texts, numbers, strict=False) for item in pair] + texts[-1:]
    return key, file.path


def read(split: str, files: tuple[File, ...]) -> Samples:
    """Reads the pictures of one split in the order of `files`.

    Raises:
        InputError: a folder is not a class, or a picture is not 28 x 28, gray and whole.
    """
    check_count(files[0], len(files))
    images = np.empty((len(files), SIZE, SIZE), np.uint8)
    labels = np.empty(len(files), np.uint8)
    bar = tqdm(files, f"reading {split} pictures", unit="", disable=None, leave=False)
    for index, file in enumerate(bar):
        labels[index] = _class_of(file)
        with opened(file) as content:
            data = content.stream.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise bad(file, f"it has more than {MAX_BYTES:,} bytes", f"save it as {SIZE}x{SIZE}")
        images[index] = decode(file, data)
    return Samples(images, labels)


def _class_of(file: File) -> int:
    name = PurePosixPath(file.path).parts[-2]
    if not re.fullmatch("[0-9]", name):
        raise InputError(
            f"{file.shown} lies in the folder {name!r}, which is no class: name the folders of the "
            f"classes 0 to {CLASSES - 1}"
        )
    return int(name)
