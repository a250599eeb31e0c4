"""Where the images come from: files of any form that has a reader, a download, or the digits."""

import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep import read_csv, read_idx, read_npz, read_parquet, read_pictures
from data_prep.archives import is_archive
from data_prep.digits import read_digits
from data_prep.download import download_mnist
from data_prep.file import UNKNOWN, File, kind
from data_prep.known import KNOWN, identify, parts_of, refuse_damaged
from data_prep.looks import warnings_about
from data_prep.manifest import CUSTOM, SPLITS
from data_prep.read_idx import NAMES
from data_prep.samples import Found, Reader, Samples
from data_prep.tree import open_tree
from data_prep.watched import WorkFailed
from mnist_fast.errors import InputError

DATASETS = ("mnist", "digits", "auto")

_FORMS = "MNIST's four files, a CSV per split, mnist.npz, pictures in train/0 to test/9, or Parquet"

# A new form is a module with FORM, find and read, and one more name here. The first that finds a
# whole data set reads it.
READERS: tuple[Reader, ...] = (read_idx, read_npz, read_pictures, read_parquet, read_csv)

_FOLDERS = ("MNIST/raw", "", "raw", "MNIST")  # of a torchvision root, the likeliest first


@dataclass(frozen=True)
class Source:
    """Images and labels in memory.

    Attributes:
        name: `mnist`, `digits`, another published data set, `custom`, or what the user calls it.
        origin: where they were found, in words.
        published: whether images and labels are exactly the published ones.
        train_images: uint8 (N, 28, 28), 0 is background.
        train_labels: uint8 (N,), 0 to 9.
        test_images: uint8 (M, 28, 28).
        test_labels: uint8 (M,).
        checksums: IDX file name to the MD5 of its content, in whatever form the samples came.
    """

    name: str
    origin: str
    published: bool
    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.uint8]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.uint8]
    checksums: dict[str, str]


def load_source(dataset: str, root: Path | None = None, name: str | None = None) -> Source:
    """Loads MNIST, scikit-learn's digits, or (`auto`) the first of them that is to be had.

    Args:
        dataset: `mnist`, `digits` or `auto`.
        root: folder, archive or file of a data set like MNIST, in any form of `READERS`. Without it
            MNIST's files are looked for in `$MNIST_ROOT`, then in `data/`, then downloaded into
            `data/`.
        name: what to call files that have no published checksums, instead of `custom`.

    Raises:
        InputError: nothing was found, or a file is not what it should be.
    """
    if dataset not in DATASETS:
        raise InputError(f"unknown data set {dataset!r}: choose one of {', '.join(DATASETS)}")
    if dataset == "digits":
        if root is not None or name is not None:
            raise InputError("--source and --name are for MNIST: the digits come with scikit-learn")
        return load_digits()
    if root is not None:
        return load_files(Path(root), name)
    found = find_mnist()
    if found is not None:
        return load_mnist(*found, name)
    raw = Path("data/MNIST/raw")
    try:
        download_mnist(raw, lambda folder: load_mnist(folder, ""))
    except WorkFailed as failure:
        if dataset == "mnist":
            raise InputError(_nothing_found(str(failure).strip(" .\n"))) from None
        _say(
            "WARNING: MNIST was not found and could not be downloaded "
            f"({failure}). Using the 1,797 handwritten digits of scikit-learn, NOT MNIST."
        )
        return load_digits()
    return load_mnist(raw, "torchvision's download", name)


def find_mnist() -> tuple[Path, str] | None:
    """The folder with all four files in `$MNIST_ROOT` or `data/`, and where that is in words."""
    variable = os.environ.get("MNIST_ROOT")
    places = [(Path(variable).expanduser(), "$MNIST_ROOT")] if variable else []
    for root, origin in [*places, (Path("data"), "data/")]:
        for below in _FOLDERS:
            if (root / below).is_dir() and _mnist_in(root / below):
                if variable and origin != "$MNIST_ROOT":
                    _say(f"WARNING: $MNIST_ROOT ({variable}) does not hold MNIST: taking {origin}")
                return root / below, origin
    return None


def _mnist_in(folder: Path) -> Found | None:
    """The whole set of MNIST's own file names in a folder, or in folders of those names."""
    with open_tree(folder, depth=1) as files:
        found = read_idx.find(files)
    return next((one for one in found if not one.lacks and not one.place), None)


def load_mnist(folder: Path, origin: str, name: str | None = None) -> Source:
    """Loads and checks MNIST's four files in `folder`; `origin` says in words where that is."""
    found = _mnist_in(folder)
    if found is None:
        raise InputError(f"{folder} lacks {', '.join(NAMES.values())}: get them again")
    source = _load(found, origin, str(folder), name)
    if origin and name is None and source.name != "mnist":
        _say(f"WARNING: {folder} does not hold the published MNIST: called {source.name}")
    return source


def load_files(root: Path, name: str | None = None) -> Source:
    """Loads the data set in a folder, an archive or a file, whatever its form.

    Raises:
        InputError: there is none, more than one, or one that is not whole or not like MNIST.
    """
    with open_tree(root) as files:
        found = [one for reader in READERS for one in reader.find(files)]
        whole = [one for one in found if not one.lacks]
        if not whole:
            raise InputError(f"--source {root} {_what_is_there(root, files, found)}")
        chosen = _choose(root, whole)
        if chosen.note:
            _say(chosen.note)
        return _load(chosen, f"the files given as --source ({chosen.form})", str(root), name)


def _choose(root: Path, whole: Sequence[Found]) -> Found:
    """The one data set, or MNIST's own files among several.

    Raises:
        InputError: it cannot be told which is meant.
    """
    same_form = [one for one in whole if one.form == whole[0].form]
    if len(same_form) == 1:
        return same_form[0]
    places = ", ".join(one.place or "its own files" for one in same_form[:5])
    several = f"{root} holds {len(same_form)} data sets ({places})"
    preferred = [one for place in _FOLDERS for one in same_form if one.place == place]
    preferred += [one for one in same_form if one.place.endswith("emnist-digits")]
    if not preferred:
        raise InputError(f"--source {several}: name the folder of one")
    _say(f"{several}: taking {preferred[0].place or 'its own files'}")
    return preferred[0]


def _load(found: Found, origin: str, place: str, name: str | None) -> Source:
    splits = {split: found.read(split, found.files[split]) for split in SPLITS}
    files = found.files if found.form == read_idx.FORM else {}
    parts = parts_of(splits, files)
    identity = identify(parts)
    if name is None:
        refuse_damaged(identity, place)
    elif name in KNOWN and identity.name not in (name, None):
        raise InputError(f"--name {name}: {place} holds {identity.name}, by its checksums")
    if any("emnist" in file.name for file in found.files["train"]):
        _say("EMNIST's images are stored transposed: turned upright")
        splits = {split: _upright(samples) for split, samples in splits.items()}
    if not identity.published:
        about = {split: warnings_about(samples) for split, samples in splits.items()}
        for warning in about["train"]:
            _say(f"WARNING: {warning}")
        for warning in about["test"]:
            if warning not in about["train"]:
                _say(f"WARNING: of the test set: {warning}")
        if np.array_equal(splits["train"].images, splits["test"].images):
            _say("WARNING: the test images are the training images")
    return Source(
        name=name or identity.name or CUSTOM,
        origin=origin,
        published=identity.published,
        train_images=splits["train"].images,
        train_labels=splits["train"].labels,
        test_images=splits["test"].images,
        test_labels=splits["test"].labels,
        checksums=dict(zip(NAMES.values(), (part.md5 for part in parts), strict=True)),
    )


def _upright(samples: Samples) -> Samples:
    return Samples(np.ascontiguousarray(samples.images.transpose(0, 2, 1)), samples.labels)


def load_digits() -> Source:
    """scikit-learn's 1,797 digits, which look like MNIST's."""
    splits, md5 = read_digits()
    return Source(
        "digits", "scikit-learn", True, *splits["train"], *splits["test"], {"digits": md5}
    )


# What to say where no data set is whole


def _what_is_there(root: Path, files: Sequence[File], found: Sequence[Found]) -> str:
    """What `root` holds instead of a data set, and what to do, in words that follow its name."""
    if not files:
        return f"is empty: put a data set there ({_FORMS})"
    if found:
        nearest = min(found, key=lambda one: (not any(one.files.values()), len(one.lacks)))
        return f"{_holds(nearest)}lacks {nearest.lacks}: {_remedy(root)}"
    if root.is_file() and len(files) == 1:
        return f"is a file ({_content(files[0])}), not a data set: give its folder, or {_FORMS}"
    if archives := [file.name for file in files[:50] if is_archive(file)]:
        return f"holds no data set, but {archives[0]}: give that as --source"
    kinds = Counter(_content(file) for file in files[:50])
    there = ", ".join(f"{count} x {words}" for words, count in kinds.most_common(3))
    more = f" (of {len(files):,} files)" if len(files) > kinds.total() else ""
    return f"holds no data set, but {there}{more}: give {_FORMS}"


def _content(file: File) -> str:
    words = kind(file.head())
    return f"{file.name}: {words}" if words == UNKNOWN else words


def _holds(found: Found) -> str:
    """Which of its files are there, in words."""
    splits = [split for split in SPLITS if found.files[split]]
    names = [file.name for split in splits for file in found.files[split]]
    if not names:
        return ""
    there = ", ".join(names) if len(names) < len(NAMES) else f"{len(names):,} {found.form} files"
    only = f" (the {splits[0]} set)" if len(splits) == 1 and not _is_half(found) else ""
    return f"holds only {there}{only} and "


def _is_half(found: Found) -> bool:
    """Whether even the one split of MNIST's files is without its images or labels."""
    return found.form == read_idx.FORM and 1 in map(len, found.files.values())


def _remedy(root: Path) -> str:
    if root.is_file() and root.suffix in (".zip", ".tar", ".gz", ".tgz", ".xz", ".bz2"):
        return "put all into one archive, or unpack it and add what is missing"
    return "give the folder that holds all" if root.is_file() else "add what is missing"


def _nothing_found(failure: str) -> str:
    variable = os.environ.get("MNIST_ROOT")
    places = f"$MNIST_ROOT (which is {variable})" if variable else "$MNIST_ROOT (which is not set)"
    return (
        f"MNIST was not found: {places} and data/ do not hold all of {', '.join(NAMES.values())} "
        f"(plain or .gz; in the folder or in MNIST/raw below), and the download "
        f"failed: {failure}. Point MNIST_ROOT=FOLDER or `python -m data_prep --source FOLDER` "
        "at the files, or use `--dataset digits` or `--dataset auto` for the 1,797 digits of "
        "scikit-learn"
    )


def _say(message: str) -> None:
    print(f"data_prep: {message}", file=sys.stderr, flush=True)
