"""Picture files of every kind: finding them, and decoding one to luminance."""

import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from mnist_fast.files import read_file

MAX_FILE_BYTES = 100_000_000
MAX_PIXELS = 64_000_000  # of one image, checked before it is decoded
MAX_SIDE = 1024  # larger images are reduced to this first
UNSAFE = {"EPS"}  # Pillow starts Ghostscript for it
PAGED = {"GIF", "PNG", "TIFF", "WEBP"}  # what else is in a camera's JPEG or HEIC is no page
UNMARKED = {"TGA"}  # no signature: other files would be taken for it
DEPTHS = (8, 10, 12, 14, 16, 32)  # bits per pixel in which scanners and cameras count

# What systems leave in folders of pictures: resource forks, thumbnails, settings of a window.
LEFTOVERS = {".DS_Store", "Thumbs.db", "ehthumbs.db", "desktop.ini"}
LEFTOVER_FOLDERS = {"__MACOSX", "@eaDir", ".thumbnails", ".@__thumb"}


class ImageError(Exception):
    """An image that cannot be read; the message says why, on one line."""


# Decoding


def read_grey(source: Path | bytes) -> NDArray[np.float32]:
    """Decodes an image file of any format that Pillow reads, told by its content.

    Returns:
        Luminance in 0..1, float32 (height, width), at most `MAX_SIDE` on a side.

    Raises:
        ImageError: it cannot be read, is too large, has several pages, or is wholly transparent.
    """
    content = source if isinstance(source, bytes) else _read_file(source)
    if not content:
        raise ImageError("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damaged metadata, and sizes checked here
            with Image.open(BytesIO(content), formats=_formats()) as image:
                if image.width * image.height > MAX_PIXELS:
                    size = f"{image.width} x {image.height}"
                    raise ImageError(f"{size} pixels: more than {MAX_PIXELS / 1e6:.0f} million")
                pages = getattr(image, "n_frames", 1) if image.format in PAGED else 1
                if pages > 1:
                    raise ImageError(f"{pages} pages: save the one that is meant by itself")
                image.draft("RGB", (MAX_SIDE, MAX_SIDE))  # JPEG decodes to less at once
                return to_grey(_upright(image))
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError(f"more than {MAX_PIXELS / 1e6:.0f} million pixels") from None
    except UnidentifiedImageError:
        raise ImageError(_unknown(content)) from None
    except Exception as error:  # decoders raise many kinds on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"damaged image: {reason[:200]}") from error


@cache
def _formats() -> tuple[str, ...]:
    """The names of the formats that this Pillow reads, HEIC where pillow-heif is installed."""
    try:
        import pillow_heif
    except ImportError:
        pass
    else:
        pillow_heif.register_heif_opener()
    Image.init()
    return tuple(name for name in Image.ID if name not in UNSAFE | UNMARKED)


def _unknown(content: bytes) -> str:
    """Names what Pillow could not identify."""
    if content[4:8] == b"ftyp":  # the container of HEIC, AVIF and films
        brand = content[8:12]
        if brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"):
            return "HEIC image: install pillow-heif to read it, or save it as JPEG"
        if brand in (b"avif", b"avis"):
            return "AVIF image: a newer Pillow reads it; or save it as JPEG"
    return "not an image, or of a kind that Pillow does not read"


def _read_file(path: Path) -> bytes:
    """A regular file's content; devices and pipes, which may never end, are refused."""
    try:
        if os.path.isdir(path):
            os.listdir(path)
            raise ImageError("folder without files")
        return read_file(path, MAX_FILE_BYTES)
    except OSError as error:
        raise ImageError(error.strerror or str(error)) from error
    except ValueError as error:  # a name with a zero byte
        raise ImageError(str(error)) from error


def _upright(image: Image.Image) -> Image.Image:
    """Turns an image as its camera says, and reduces a large one."""
    image.load()
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # damaged metadata: the pixels are fine
        image = image.copy()
    if image.mode in ("P", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode == "LAB":
        image = image.getchannel("L")
    if max(image.size) > MAX_SIDE:
        if image.mode == "1":
            image = image.convert("L")
        elif image.mode.startswith("I;16"):
            image = image.convert("I")
        factor = max(image.size) // MAX_SIDE + 1
        image = image.reduce(factor)
    return image


def to_grey(image: Image.Image) -> NDArray[np.float32]:
    """Luminance in 0..1, float32 (height, width); what is transparent becomes background."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _of_many_bits(np.asarray(image))
    alpha = None
    if image.mode in ("LA", "La", "RGBA", "RGBa"):
        image = image.convert("RGBA")
        alpha = np.asarray(image.getchannel("A"), np.float32) / 255
        image = image.convert("RGB")
    grey = (np.asarray(image.convert("L")) / 255).astype(np.float32)
    if alpha is None or alpha.min() > 0.99:
        return grey
    visible = grey[alpha > 0.5]
    if not visible.size:
        raise ImageError("wholly transparent")
    low, middle, high = np.percentile(visible, (5, 50, 95))
    rows, columns = np.nonzero(alpha > 0.5)
    box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
    # strokes alone, whose soft edges are grey, are seen on the opposite of their colour; a card,
    # which fills its box, on more of its own
    is_card = high - low > 0.25 and len(rows) > 0.7 * box
    background = middle if is_card else float(middle < 0.5)
    return (grey * alpha + background * (1 - alpha)).astype(np.float32)


def _of_many_bits(values: NDArray[np.generic]) -> NDArray[np.float32]:
    """Luminance of more than eight bits a pixel; the maximum tells 12 bits from 16."""
    numbers = np.nan_to_num(values.astype(np.float64), nan=0, posinf=0, neginf=0).clip(0)
    largest = float(numbers.max())
    full = next((2.0**bits - 1 for bits in DEPTHS if largest < 2**bits), largest)
    return (numbers / (1.0 if largest <= 1 else full)).astype(np.float32)


# Finding


def find_sources(names: Iterable[str]) -> Iterator[tuple[str, Path | bytes]]:
    """The images meant by a command line: files, all files below folders, standard input (-)."""
    for name in names:
        if name == "-":
            yield from _from_standard_input()
        else:
            yield from _from_path(name)


def _from_path(name: str) -> Iterator[tuple[str, Path]]:
    """The file itself; of a folder every file but `LEFTOVERS`, sorted.

    A folder without files, or one that cannot be read, is handed on itself: it gets its line. Links
    to folders are followed, into each folder once.
    """
    found: list[str] = []

    def hand_on(error: OSError) -> None:
        found.append(error.filename)

    if os.path.isdir(name):
        seen = {_identity(name)}
        for root, folders, files in os.walk(name, onerror=hand_on, followlinks=True):
            found += [os.path.join(root, file) for file in files if not _is_leftover(file)]
            below = sorted(folder for folder in folders if folder not in LEFTOVER_FOLDERS)
            folders.clear()
            for folder in below:
                if (identity := _identity(os.path.join(root, folder))) not in seen:
                    seen.add(identity)
                    folders.append(folder)
    yield from ((path, Path(path)) for path in sorted(found) or [name])


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _is_leftover(name: str) -> bool:
    return name in LEFTOVERS or name.startswith("._")


def _from_standard_input() -> Iterator[tuple[str, Path | bytes]]:
    """One image, if standard input looks like one, else the names of images, one per line."""
    content = sys.stdin.buffer.read(MAX_FILE_BYTES)
    # no file's name holds a zero byte, and nearly every image format does
    if content.startswith((b"\x89PNG", b"\xff\xd8")) or b"\0" in content:
        yield "standard input", content
        return
    names = [name for line in content.splitlines() if (name := os.fsdecode(line).strip())]
    for name in names:
        yield from _from_path(name)
    if not names:  # handed on itself, so that it gets its line
        yield "standard input", b""
