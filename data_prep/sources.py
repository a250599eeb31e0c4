"""Where the images come from: the four MNIST files, or the digits inside scikit-learn."""

import gzip
import hashlib
import os
import queue
import sys
import threading
import time
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.request import Request, urlopen

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data_prep.staging import staging
from data_prep.watched import Limits, Report, WorkFailed, run_watched
from mnist_fast.errors import InputError

DATASETS = ("mnist", "digits", "auto")

# The published files: name -> (number of samples, MD5 of the decompressed content).
PUBLISHED = {
    "train-images-idx3-ubyte": (60_000, "6bbc9ace898e44ae57da46a324031adb"),
    "train-labels-idx1-ubyte": (60_000, "a25bea736e30d166cdddb491f175f624"),
    "t10k-images-idx3-ubyte": (10_000, "2646ac647ad5339dbf082846283269ea"),
    "t10k-labels-idx1-ubyte": (10_000, "27ae3e4e09519cfbb04c329615203637"),
}
FILES = tuple(PUBLISHED)

# torchvision's own mirrors, repeated because importing torchvision takes seconds and most failures
# to download can be told before.
MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/")

CONNECT_SECONDS = 10.0  # to reach a mirror at all
DOWNLOAD_LIMITS = Limits(first=90.0, then=30.0)  # until the first bytes, until more of them

_MAX_SAMPLES = 1_000_000  # per file; keeps a compressed file from filling the memory
_GZIP_RATIO = 1100  # no gzip stream expands further (deflate's limit is 1032)
_IMAGE_MAGIC, _LABEL_MAGIC = 0x00000803, 0x00000801
_SIZE = 28  # rows and columns of an image

_DIGITS_TRAIN = 1_437  # of 1,797, about 80 %


@dataclass(frozen=True)
class Source:
    """Images and labels in memory.

    Attributes:
        name: `mnist` or `digits`.
        origin: where they were found, in words.
        published: whether every file is byte for byte the published one.
        train_images: uint8 (N, 28, 28), 0 is background.
        train_labels: uint8 (N,), 0 to 9.
        test_images: uint8 (M, 28, 28).
        test_labels: uint8 (M,).
        checksums: file name to the MD5 of its (decompressed) content.
    """

    name: str
    origin: str
    published: bool
    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.uint8]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.uint8]
    checksums: dict[str, str]


def load_source(dataset: str, root: Path | None = None) -> Source:
    """Loads MNIST, scikit-learn's digits, or (`auto`) the first of them that is to be had.

    Args:
        dataset: `mnist`, `digits` or `auto`.
        root: where the four MNIST files are, a torchvision root or their own folder. Without it
            they are looked for in `$MNIST_ROOT`, then in `data/`, then downloaded into `data/`.

    Raises:
        InputError: nothing was found, or a file is not what it should be.
    """
    if dataset not in DATASETS:
        raise InputError(f"unknown data set {dataset!r}: choose one of {', '.join(DATASETS)}")
    if dataset == "digits":
        if root is not None:
            raise InputError("--source is for MNIST: the digits come with scikit-learn")
        return load_digits()
    if root is not None:
        return load_mnist(_folder_of(root), "the folder given as --source")
    found = find_mnist()
    if found is not None:
        return load_mnist(*found)
    try:
        return _download_mnist(Path("data"))
    except WorkFailed as failure:
        if dataset == "mnist":
            raise InputError(_nothing_found(str(failure).strip(" .\n"))) from None
        print(
            "data_prep: WARNING: MNIST was not found and could not be downloaded "
            f"({failure}). Using the 1,797 handwritten digits of scikit-learn, NOT MNIST.",
            file=sys.stderr,
            flush=True,
        )
        return load_digits()


def find_mnist() -> tuple[Path, str] | None:
    """The folder with all four files in `$MNIST_ROOT` or `data/`, and where that is in words."""
    variable = os.environ.get("MNIST_ROOT")
    places = [(Path(variable).expanduser(), "$MNIST_ROOT")] if variable else []
    for root, origin in [*places, (Path("data"), "data/")]:
        for folder in (root / "MNIST" / "raw", root):
            if not _missing(folder):
                return folder, origin
    return None


def _folder_of(root: Path) -> Path:
    """The folder below `root` (or `root`) that has the four files."""
    root = Path(root).expanduser()
    folders = (root / "MNIST" / "raw", root)
    folder = min(folders, key=lambda folder: len(_missing(folder)))
    if missing := _missing(folder):
        raise InputError(
            f"--source {root} lacks {', '.join(missing)} "
            "(plain or .gz; in it or in MNIST/raw below)"
        )
    return folder


def _missing(folder: Path) -> list[str]:
    return [
        name for name in FILES if not any(os.path.exists(path) for path in _paths(folder, name))
    ]


def _paths(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / name, folder / f"{name}.gz"


def _nothing_found(failure: str) -> str:
    variable = os.environ.get("MNIST_ROOT")
    places = f"$MNIST_ROOT (which is {variable})" if variable else "$MNIST_ROOT (which is not set)"
    return (
        f"MNIST was not found: {places} and data/ do not hold all of {', '.join(FILES)} "
        f"(plain or .gz; in the folder or in MNIST/raw below), and the download "
        f"failed: {failure}. Point MNIST_ROOT=FOLDER or `python -m data_prep --source FOLDER` "
        "at the files, or use `--dataset digits` or `--dataset auto` for the 1,797 digits of "
        "scikit-learn"
    )


# The IDX files


def load_mnist(folder: Path, origin: str) -> Source:
    """Loads and checks the four files in `folder`; `origin` says in words where that is."""
    arrays, checksums = {}, {}
    for name in FILES:
        plain, compressed = _paths(folder, name)
        path = plain if os.path.exists(plain) else compressed
        arrays[name], checksums[name] = read_idx(path, images="images" in name)
        samples, md5 = PUBLISHED[name]
        if len(arrays[name]) == samples and checksums[name] != md5:
            raise _bad(path, f"its checksum (MD5 {checksums[name]}) is not the published {md5}")
    for split in ("train", "t10k"):
        images, labels = arrays[f"{split}-images-idx3-ubyte"], arrays[f"{split}-labels-idx1-ubyte"]
        if len(images) != len(labels):
            raise InputError(
                f"{folder}: {split}-images-idx3-ubyte has {len(images):,} images but "
                f"{split}-labels-idx1-ubyte {len(labels):,} labels: get both from the same place"
            )
    return Source(
        name="mnist",
        origin=origin,
        published=all(checksums[name] == md5 for name, (_, md5) in PUBLISHED.items()),
        train_images=arrays["train-images-idx3-ubyte"],
        train_labels=arrays["train-labels-idx1-ubyte"],
        test_images=arrays["t10k-images-idx3-ubyte"],
        test_labels=arrays["t10k-labels-idx1-ubyte"],
        checksums=checksums,
    )


def read_idx(path: Path, images: bool) -> tuple[NDArray[np.uint8], str]:
    """Reads one IDX file, plain or .gz, strictly.

    The format: a magic number (0x00000803 for images, 0x00000801 for labels), the count and, for
    images, rows and columns, as big-endian 32-bit integers; then one byte per pixel or label.

    Returns:
        uint8 (N, 28, 28) or (N,), and the MD5 of the decompressed content.

    Raises:
        InputError: the file cannot be read or is not exactly such a file.
    """
    if not path.is_file():  # a pipe would be waited for
        raise _bad(path, "it is not a regular file")
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if path.suffix == ".gz":
                with gzip.open(file) as stream:
                    return _parse_idx(path, stream, images, size * _GZIP_RATIO)
            return _parse_idx(path, file, images, size)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _bad(path, f"it is not a complete gzip file ({error})") from None
    except OSError as error:
        fault = error.strerror or error
        raise InputError(f"{path} cannot be read: {fault}: check its permissions") from None


def _parse_idx(
    path: Path, stream: BinaryIO | gzip.GzipFile, images: bool, most: int
) -> tuple[NDArray[np.uint8], str]:
    """Parses a stream of at most `most` bytes."""
    header_bytes = 16 if images else 8
    header = stream.read(header_bytes)
    if len(header) < header_bytes:
        raise _bad(path, f"it is truncated: {len(header)} bytes, not even a whole header")
    magic, count, *shape = np.frombuffer(header, ">u4").tolist()
    expected_magic = _IMAGE_MAGIC if images else _LABEL_MAGIC
    if magic != expected_magic:
        raise _bad(path, f"its magic number is 0x{magic:08x} instead of 0x{expected_magic:08x}")
    if images and shape != [_SIZE, _SIZE]:
        raise _bad(path, f"its images are {shape[0]}x{shape[1]} instead of {_SIZE}x{_SIZE}")
    if not 0 < count <= _MAX_SAMPLES:
        raise _bad(path, f"its header says {count:,} samples instead of 1 to {_MAX_SAMPLES:,}")
    body_bytes = count * (_SIZE * _SIZE if images else 1)
    # Compared before reading, so that a header cannot ask for more memory than the file is worth.
    body = stream.read(body_bytes + 1) if header_bytes + body_bytes <= most else b""
    if len(body) < body_bytes:
        raise _bad(path, f"it is truncated: it lacks some of the {count:,} samples of its header")
    if len(body) > body_bytes:
        raise _bad(path, f"it is too long: there is more than the {count:,} samples of its header")
    array = np.frombuffer(body, np.uint8)
    if images:
        array = array.reshape(count, _SIZE, _SIZE)
    elif array.max() > 9:
        position = int(np.argmax(array > 9))
        raise _bad(path, f"label {position} is {array[position]}, out of the range 0 to 9")
    return array, _md5(header, body)


def _md5(*parts: bytes) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _bad(path: Path, fault: str) -> InputError:
    return InputError(f"{path} is not usable: {fault}: replace it with a good copy")


# The download


def _download_mnist(root: Path) -> Source:
    """Downloads into `root/MNIST/raw` with torchvision, or raises WorkFailed."""
    run_watched("data_prep.sources:reach_mirror", [], Limits(CONNECT_SECONDS, CONNECT_SECONDS))
    raw = root / "MNIST" / "raw"
    with staging(root) as stage:
        if _missing(raw):  # else another process has downloaded them in the meantime
            target, arguments = "data_prep.sources:download", [str(stage.folder)]
            with tqdm(desc="downloading MNIST", unit="B", unit_scale=True, disable=None) as bar:
                run_watched(target, arguments, DOWNLOAD_LIMITS, bar.update)
            downloaded = stage.folder / "MNIST" / "raw"
            load_mnist(downloaded, "")  # raises if anything is wrong with them
            raw.mkdir(parents=True, exist_ok=True)
            for name in FILES:
                os.replace(downloaded / name, raw / name)
    return load_mnist(raw, "torchvision's download")


def reach_mirror(report: Report) -> None:
    """Raises WorkFailed if no mirror answers; runs watched, for a host name can take minutes."""
    answers: queue.Queue[str] = queue.Queue()

    def ask(mirror: str) -> None:
        try:
            request = Request(f"{mirror}{FILES[1]}.gz", method="HEAD")
            with urlopen(request, timeout=CONNECT_SECONDS - 2):
                answers.put("")
        except Exception as error:
            answers.put(str(error) or type(error).__name__)

    for mirror in MIRRORS:
        threading.Thread(target=ask, args=(mirror,), daemon=True).start()
    errors = [answers.get()]
    while errors[-1] and len(errors) < len(MIRRORS):
        errors.append(answers.get())
    if errors[-1]:
        raise WorkFailed(f"no mirror could be reached ({errors[-1]})")


def download(report: Report, folder: str) -> None:
    """Downloads with torchvision, reporting the bytes that arrive; runs watched."""

    def watch() -> None:
        before = 0
        while True:
            with suppress(FileNotFoundError):  # a file renamed between listing and asking
                size = sum(path.stat().st_size for path in Path(folder).rglob("*"))
                if size != before:
                    report(size - before)
                before = size
            time.sleep(0.5)

    threading.Thread(target=watch, daemon=True).start()
    from torchvision.datasets import MNIST

    MNIST(folder, download=True)


# The digits


def load_digits() -> Source:
    """scikit-learn's 1,797 digits, made to look like MNIST: 20x20 in the middle of 28x28.

    They come as 8x8 pixels of 0 to 16 and are enlarged bilinearly. The first 1,437 are for
    training and the last 360 for testing: neighbours tend to have the same writer, so a shuffled
    split would have most writers on both sides.
    """
    from PIL import Image
    from sklearn import datasets

    digits = datasets.load_digits()
    small = np.round(digits.images * (255 / 16)).astype(np.uint8)
    images = np.zeros((len(small), _SIZE, _SIZE), np.uint8)
    for image, pixels in zip(images, small, strict=True):
        enlarged = Image.fromarray(pixels).resize((20, 20), Image.Resampling.BILINEAR)
        image[4:24, 4:24] = np.asarray(enlarged)
    labels = digits.target.astype(np.uint8)
    return Source(
        name="digits",
        origin="scikit-learn",
        published=True,
        train_images=images[:_DIGITS_TRAIN],
        train_labels=labels[:_DIGITS_TRAIN],
        test_images=images[_DIGITS_TRAIN:],
        test_labels=labels[_DIGITS_TRAIN:],
        checksums={"digits": _md5(small.tobytes(), labels.tobytes())},
    )
