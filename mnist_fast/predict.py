"""`python -m mnist_fast.predict WEIGHTS IMAGE...`: reads the digit in each image file."""

import json
import os
import signal
import stat
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # Ctrl-C ends it without a traceback, also while torch is imported
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open

from mnist_fast.checkpoint import digest
from mnist_fast.errors import InputError, Parser, RunError, run_main, some_path, some_text
from mnist_fast.evaluate import predict
from mnist_fast.files import drop_output, read_file
from mnist_fast.model import CLASSES, IMAGE_SIZE, NETWORKS, Network, build_network

PROGRAM = "python -m mnist_fast.predict"
MAX_WEIGHTS_BYTES = 10_000_000  # the networks have about 35,000
MAX_FILE_BYTES = 100_000_000
MAX_PIXELS = 64_000_000  # of one image, checked before it is decoded
MAX_SIDE = 1024  # larger images are reduced to this first
BOX = 20  # MNIST's digits fill a box of 20 x 20 pixels
CENTRE = IMAGE_SIZE / 2  # pixel index on which their centre of mass lies
MIN_CONTRAST = 0.1  # between digit and background, of the full range
EDGE = 0.05  # of the digit's contrast; fainter pixels do not count for its bounding box
SUFFIXES = (".png", ".jpg", ".jpeg")  # what is read in a folder
BLANK = "blank: no digit stands out from the background"
BATCH = 256  # images per forward pass


class ImageError(Exception):
    """An image that cannot be read; the message says why, on one line."""


# The network


def load_network(weights: Path) -> tuple[Network, dict[str, str]]:
    """Loads a run's network, and the names of its network and data set, from safetensors.

    Args:
        weights: a `weights.safetensors`, or the folder of a run that holds one.

    Raises:
        InputError: the file is missing, damaged, not safetensors, or of another network.
    """
    path = weights / "weights.safetensors" if os.path.isdir(weights) else weights
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_WEIGHTS_BYTES:
            raise InputError(f"{path}: not a run's weights.safetensors: no such small, plain file")
        with safe_open(path, framework="pt") as file:
            details = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}: name a run or its weights") from error
    except SafetensorError as error:
        raise InputError(f"{path}: not a whole safetensors file ({error})") from error
    name = details.get("network")
    if name not in NETWORKS:
        raise InputError(f"{path}: no weights of one of the networks {', '.join(NETWORKS)}")
    network = build_network(name)
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:  # torch's message names every tensor
        fault = f"{path}: not the weights of the network {name} that it says it holds"
        raise InputError(f"{fault}: name another run") from error
    if details.get("sha256") not in (None, digest(tensors)):
        raise InputError(f"{path}: damaged, its checksum differs: name another run")
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise InputError(f"{path}: holds a weight that is not a finite number")
    return network.eval(), details


# The images


def read_image(source: Path | bytes) -> NDArray[np.uint8]:
    """Reads a PNG or JPEG file of any size, mode and polarity as MNIST would show it.

    Returns:
        uint8 (28, 28), the digit white on black.

    Raises:
        ImageError: it cannot be read, is too large, or shows nothing.
    """
    content = source if isinstance(source, bytes) else _read_file(source)
    if not content:
        raise ImageError("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damaged metadata, and sizes checked here
            with Image.open(BytesIO(content), formats=("PNG", "JPEG")) as image:
                if image.width * image.height > MAX_PIXELS:
                    size = f"{image.width} x {image.height}"
                    raise ImageError(f"{size} pixels: more than {MAX_PIXELS / 1e6:.0f} million")
                image.draft("RGB", (MAX_SIDE, MAX_SIDE))  # JPEG decodes to less at once
                return to_mnist(to_grey(_upright(image)))
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError(f"more than {MAX_PIXELS / 1e6:.0f} million pixels") from None
    except UnidentifiedImageError:
        raise ImageError("neither a PNG nor a JPEG image") from None
    except Exception as error:  # decoders raise many kinds on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"damaged image: {reason[:200]}") from error


def _read_file(path: Path) -> bytes:
    """A regular file's content; devices and pipes, which may never end, are refused."""
    if os.path.isdir(path):
        raise ImageError(f"folder without {', '.join(SUFFIXES)} files")
    try:
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
    if max(image.size) > MAX_SIDE:
        if image.mode == "1":
            image = image.convert("L")
        factor = max(image.size) // MAX_SIDE + 1
        image = image.reduce(factor)
    return image


def to_grey(image: Image.Image) -> NDArray[np.float32]:
    """Luminance in 0..1, float32 (height, width); what is transparent becomes background."""
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):  # 16-bit PNGs
        return (np.asarray(image) / 65_535).clip(0, 1).astype(np.float32)
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
    # strokes alone are seen on the opposite of their colour, a card on more of its own
    background = middle if high - low > 0.25 else float(middle < 0.5)
    return (grey * alpha + background * (1 - alpha)).astype(np.float32)


def to_mnist(grey: NDArray[np.float32]) -> NDArray[np.uint8]:
    """What MNIST's authors did to their scans (http://yann.lecun.com/exdb/mnist).

    The digit's bounding box is scaled, aspect ratio kept, into 20 x 20 pixels, with grey levels
    from anti-aliasing, and put into 28 x 28 pixels with its centre of mass in the middle.

    Args:
        grey: luminance in 0..1, float (height, width), of a digit on a plain background, of either
            polarity: the border tells the background.

    Returns:
        uint8 (28, 28), white on black.

    Raises:
        ImageError: there is nothing to be seen.
    """
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    background = float(np.median(border))
    noise = 1.4826 * float(np.median(np.abs(border - background)))  # sd, robust against strokes
    darker, lighter = background - float(grey.min()), float(grey.max()) - background
    ink = (grey - background) * (1 if lighter >= darker else -1)
    if ink.max() < MIN_CONTRAST:
        raise ImageError(BLANK)
    noise /= float(ink.max())
    ink = np.clip(ink / ink.max(), 0, 1)
    if noise > 0.002:  # a photograph or a scan
        pixels = Image.fromarray(np.rint(ink * 255).astype(np.uint8))
        ink = np.asarray(pixels.filter(ImageFilter.MedianFilter(3)), np.float32) / 255
        ink[ink < min(5 * noise, 0.3)] = 0
    rows, columns = (np.flatnonzero((ink > EDGE).any(axis)) for axis in (1, 0))
    if not len(rows):
        raise ImageError(BLANK)
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = BOX / max(ink.shape)
    height, width = (max(1, round(side * scale)) for side in ink.shape)
    if (height, width) != ink.shape:
        resample = Image.Resampling.BOX if scale < 0.5 else Image.Resampling.BILINEAR
        small = Image.fromarray(ink).resize((width, height), resample)
        ink = np.asarray(small, np.float32)
    return _centred(np.clip(ink / ink.max(), 0, 1))


def _centred(ink: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Puts a digit of at most 20 x 20 pixels into 28 x 28, its centre of mass in the middle."""
    corner = []
    for axis, size in enumerate(ink.shape):
        mass = ink.sum(axis=1 - axis)
        centre = float((mass * np.arange(size)).sum() / mass.sum())
        corner.append(min(max(round(CENTRE - centre), 0), IMAGE_SIZE - size))
    top, left = corner
    canvas = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.float32)
    canvas[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
    return np.rint(canvas * 255).astype(np.uint8)


# The command


def find_sources(names: Iterable[str]) -> Iterator[tuple[str, Path | bytes]]:
    """The images meant by the command line: files, the images below folders, standard input (-)."""
    for name in names:
        if name == "-":
            yield from _from_standard_input()
        elif os.path.isdir(name):
            yield from _in_folder(name)
        else:
            yield name, Path(name)


def _in_folder(folder: str) -> Iterator[tuple[str, Path]]:
    found = [
        os.path.join(root, name)
        for root, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(SUFFIXES)
    ]
    # an empty one is handed on itself, so that it gets its line
    yield from ((path, Path(path)) for path in sorted(found) or [folder])


def _from_standard_input() -> Iterator[tuple[str, Path | bytes]]:
    """One image, if standard input looks like one, else the names of images, one per line."""
    content = sys.stdin.buffer.read(MAX_FILE_BYTES)
    # no file's name holds a zero byte, and every other image format does
    if content.startswith((b"\x89PNG", b"\xff\xd8")) or b"\0" in content:
        yield "standard input", content
        return
    names = [name for line in content.splitlines() if (name := os.fsdecode(line).strip())]
    for name in names:
        yield from _in_folder(name) if os.path.isdir(name) else [(name, Path(name))]
    if not names:  # handed on itself, so that it gets its line
        yield "standard input", b""


def classify(
    network: Network, sources: Iterable[tuple[str, Path | bytes]]
) -> Iterator[dict[str, Any]]:
    """What the network reads in each image, in order: see `_result`; or `file` and `error`."""
    waiting: list[tuple[str, NDArray[np.uint8] | str]] = []
    for name, source in sources:
        try:
            waiting.append((name, read_image(source)))
        except ImageError as error:
            waiting.append((name, str(error)))
        if len(waiting) == BATCH:
            yield from _answers(network, waiting)
            waiting = []
    yield from _answers(network, waiting)


def _answers(
    network: Network, waiting: Sequence[tuple[str, NDArray[np.uint8] | str]]
) -> Iterator[dict[str, Any]]:
    images = [image for _, image in waiting if not isinstance(image, str)]
    rows: Iterator[list[float]] = iter(())
    if images:
        batch = torch.from_numpy(np.stack(images))[:, None]
        probabilities = predict(network, batch).exp()
        if not probabilities.isfinite().all():
            raise InputError("these weights give no finite probabilities: name another run")
        rows = iter(probabilities.tolist())
    for name, image in waiting:
        if isinstance(image, str):
            yield {"file": name, "error": image}
        else:
            yield _result(name, next(rows))


def _result(name: str, probabilities: list[float]) -> dict[str, Any]:
    digit = max(range(CLASSES), key=probabilities.__getitem__)
    return {
        "file": name,
        "digit": digit,
        "probability": probabilities[digit],
        "probabilities": probabilities,
    }


def printable(text: str) -> str:
    """A file's name on one line, whatever is in it."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def show(results: Iterable[dict[str, Any]], as_json: bool) -> int:
    """Prints results, and each fault on standard error; returns the number of faults."""
    kept, faults = [], 0
    for result in results:
        if "error" in result:
            faults += 1
            name = printable(result["file"])
            print(f"{PROGRAM}: {name}: {result['error']}", file=sys.stderr, flush=True)
        elif not as_json:
            percent = f"{100 * result['probability']:.1f} %"
            _print(f"{printable(result['file'])}  {result['digit']}  {percent}")
        if as_json:
            kept.append(result)
    if as_json:
        _print(json.dumps(kept, indent=1, allow_nan=False))
    return faults


def _print(text: str) -> None:
    """Writes to standard output, at once; a full disk or a closed pipe is one line."""
    try:
        print(text, flush=True)
    except OSError as error:
        drop_output()
        raise RunError(f"standard output: {error.strerror}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Classifies the images named on the command line; 1 if some could not be read."""
    parser = Parser(
        prog=PROGRAM,
        description="Reads the digit in PNG and JPEG images of any size, dark on light or light "
        "on dark: one digit per image, on a plain background. Prints file, digit and its "
        "probability. Exit status: 0 all read, 1 some could not be read, 2 bad usage or weights.",
    )
    parser.add_argument(
        "weights", type=some_path, help="weights.safetensors of a run, or its folder"
    )
    parser.add_argument(
        "images",
        nargs="+",
        type=some_text,
        metavar="IMAGE",
        help="image file, folder of such, or -: an image or a list of files on standard input",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="one list of objects: file, digit, probability, probabilities; or file and error",
    )
    options = parser.parse_args(arguments)
    if "-" in options.images and sys.stdin is None:
        raise InputError("standard input is closed: hand an image or names to it, or leave out -")
    network, _ = load_network(options.weights)
    return 1 if show(classify(network, find_sources(options.images)), options.json) else 0


if __name__ == "__main__":
    raise SystemExit(run_main(main, PROGRAM))
