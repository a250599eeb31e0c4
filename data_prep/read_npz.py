"""NumPy's `.npz` with training and test arrays, as Keras has it (`mnist.npz`)."""

import zipfile
import zlib
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from data_prep.file import File, kind
from data_prep.samples import (
    SIZE,
    Found,
    Samples,
    bad,
    check_count,
    check_labels,
    check_shape,
)

FORM = "npz"

# The names of an array, in lower case: Keras's first.
_KEYS = {
    ("train", "images"): ("x_train", "train_images", "train_x"),
    ("train", "labels"): ("y_train", "train_labels", "train_y"),
    ("test", "images"): ("x_test", "test_images", "test_x"),
    ("test", "labels"): ("y_test", "test_labels", "test_y"),
}
_CHUNK = 1 << 20  # numbers read at once


def find(files: Sequence[File]) -> list[Found]:
    """Each .npz file with arrays of those names, or else the first one, to tell what it lacks."""
    archives = [file for file in files if file.name.endswith(".npz")]
    wanted = [file for file in archives if _names(file) & set(_KEYS["train", "images"])]
    return [
        Found(FORM, file.path, {"train": (file,), "test": (file,)}, "", read)
        for file in wanted or archives[:1]
    ]


def _names(file: File) -> set[str]:
    try:
        with file.open() as raw, zipfile.ZipFile(raw) as archive:
            return {name.lower().removesuffix(".npy") for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return set()


def read(split: str, files: tuple[File, ...]) -> Samples:
    """Reads one split; never a pickle, and no more than a data set can have.

    Raises:
        InputError: the file is no such archive, or its arrays are not images and labels.
    """
    (file,) = files
    try:
        with file.open() as raw, zipfile.ZipFile(raw) as archive:
            images = _array(file, archive, split, "images").reshape(-1, SIZE, SIZE)
            labels = _array(file, archive, split, "labels").reshape(-1)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        with file.open() as raw:
            head = raw.read(64)
        raise bad(file, f"it is {kind(head)}, and no complete npz archive ({error})") from None
    except (NotImplementedError, RuntimeError) as error:  # encrypted, unknown compression
        raise bad(file, str(error), "write it anew with numpy.savez") from None
    if len(images) != len(labels):
        raise bad(file, f"it has {len(images):,} {split} images but {len(labels):,} labels")
    return Samples(images, check_labels(file, labels))


def _array(file: File, archive: zipfile.ZipFile, split: str, part: str) -> NDArray[np.uint8]:
    names = {name.lower().removesuffix(".npy"): name for name in archive.namelist()}
    key = next((key for key in _KEYS[split, part] if key in names), None)
    if key is None:
        there = ", ".join(sorted(names)[:8]) or "none"
        wanted = f"{', '.join(keys[0] for keys in _KEYS.values())}, as Keras has them"
        raise bad(
            file, f"it has no array {_KEYS[split, part][0]} (but {there})", f"name them {wanted}"
        )
    with archive.open(names[key]) as member:
        return _read_array(file, key, member, part)


def _read_array(file: File, key: str, member: IO[bytes], part: str) -> NDArray[np.uint8]:
    """Reads one array; its header is checked before anything of that size is allocated."""
    shape, fortran, dtype = _read_header(file, key, member)
    if dtype.kind not in "uif":
        what = "pickled objects, which are never opened" if dtype.hasobject else f"{dtype} values"
        raise bad(file, f"{key} holds {what}", "write numbers (uint8) with numpy.savez")
    if not shape:
        raise bad(file, f"{key} is a single number", "name the arrays as Keras has them")
    check_count(file, shape[0])
    if part == "images":
        _check_image_shape(file, key, shape)
    elif shape not in ((shape[0],), (shape[0], 1)):
        raise bad(file, f"{key} has shape {shape} instead of (N,)", "write one class per image")
    values = np.empty(int(np.prod(shape)), np.uint8)
    filled = 0
    while filled < len(values):
        body = member.read(min(_CHUNK, len(values) - filled) * dtype.itemsize)
        if not body or len(body) % dtype.itemsize:
            break
        piece = _as_bytes(file, key, np.frombuffer(body, dtype))
        values[filled : filled + len(piece)] = piece
        filled += len(piece)
    if filled < len(values) or member.read(1):
        raise bad(file, f"{key} has not the length that its header says")
    return np.ascontiguousarray(values.reshape(shape, order="F" if fortran else "C"))


def _read_header(file: File, key: str, member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        version = np.lib.format.read_magic(member)
        return readers[version](member)
    except Exception as error:  # the header is parsed as Python: a hostile one raises anything
        fault = str(error).split(".")[0] or type(error).__name__
        raise bad(
            file, f"{key} is not a NumPy array ({fault})", "write it with numpy.savez"
        ) from None


def _check_image_shape(file: File, key: str, shape: tuple[int, ...]) -> None:
    inner = shape[1:]
    if inner[-1:] == (1,) and len(inner) == 3:
        inner = inner[:2]
    if len(inner) == 2:
        check_shape(file, *inner)
    elif inner != (SIZE * SIZE,):
        raise bad(file, f"{key} has shape {shape} instead of (N, {SIZE}, {SIZE})", "reshape it")


def _as_bytes(file: File, key: str, values: NDArray[Any]) -> NDArray[np.uint8]:
    """Numbers as uint8, or InputError where one is not a whole number from 0 to 255."""
    with np.errstate(invalid="ignore"):  # not a number: found below
        whole = values.astype(np.uint8)
    if values.dtype != np.uint8 and not np.array_equal(whole, values):
        fault = f"{key} holds {values.min():g} to {values.max():g}"
        raise bad(
            file,
            f"{fault} instead of whole numbers from 0 to 255",
            "scale and round pixels to 0 to 255, and number classes from 0",
        )
    return whole
