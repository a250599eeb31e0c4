"""`python -m mnist_fast.predict WEIGHTS IMAGE...`: reads the digit in each image file."""

import contextlib
import json
import os
import signal
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # Ctrl-C ends it without a traceback, also while torch is imported
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from mnist_fast.checkpoint import digest
from mnist_fast.errors import InputError, Parser, RunError, run_main, some_path, some_text
from mnist_fast.evaluate import predict
from mnist_fast.files import drop_output
from mnist_fast.model import CLASSES, NETWORKS, Network, build_network
from mnist_fast.picture_files import ImageError, find_sources, read_grey
from mnist_fast.pictures import find_digit
from mnist_fast.sheet import Sheet, check_sheet

PROGRAM = "python -m mnist_fast.predict"
MAX_WEIGHTS_BYTES = 10_000_000  # the networks have about 35,000
BATCH = 256  # images per forward pass


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


# The answers


def read_image(
    source: Path | bytes, see: Callable[[str, NDArray[Any]], None] = lambda *_: None
) -> NDArray[np.uint8]:
    """Reads an image file of any format, size, mode and polarity as MNIST would show its digit.

    Args:
        source: a file's path, or its content.
        see: called with the name and the picture of each step.

    Returns:
        uint8 (28, 28), the digit white on black.

    Raises:
        ImageError: it cannot be read, is too large, or does not show one digit.
    """
    return find_digit(read_grey(source), see)


def classify(
    network: Network, sources: Iterable[tuple[str, Path | bytes]], sheet: Sheet | None = None
) -> Iterator[dict[str, Any]]:
    """The network's answer for each image, in order: see `_result`; or `file` and `error`."""
    waiting: list[tuple[str, NDArray[np.uint8] | str]] = []
    for name, source in sources:
        try:
            waiting.append((name, _read(source, sheet)))
        except ImageError as error:
            waiting.append((name, str(error)))
        if len(waiting) == BATCH:
            yield from _answers(network, waiting)
            waiting = []
    yield from _answers(network, waiting)


def _read(source: Path | bytes, sheet: Sheet | None) -> NDArray[np.uint8]:
    return read_image(source) if sheet is None else read_image(source, sheet.next_row())


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
            with contextlib.suppress(OSError):  # nobody reads it: the others are still answered
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
        description="Finds and reads the digit in each image: any format that Pillow reads, any "
        "size, dark on light or light on dark. Prints file, digit and its probability. An image "
        "with several digits, or none, gets a line that says so. Exit status: 0 all read, 1 some "
        "could not be read, 2 bad usage or weights.",
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
    parser.add_argument(
        "--sheet",
        type=some_path,
        metavar="FILE.png",
        help="draw each picture, each step, the network's input and the answer",
    )
    options = parser.parse_args(arguments)
    if "-" in options.images and sys.stdin is None:
        raise InputError("standard input is closed: hand an image or names to it, or leave out -")
    if options.sheet:
        check_sheet(options.sheet)
    network, _ = load_network(options.weights)
    sheet = Sheet() if options.sheet else None
    results = classify(network, find_sources(options.images), sheet)
    faults = show(_noted(results, sheet), options.json)
    if sheet:
        sheet.write(options.sheet)
    return 1 if faults else 0


def _noted(results: Iterable[dict[str, Any]], sheet: Sheet | None) -> Iterator[dict[str, Any]]:
    """Hands results on, and keeps them for the sheet."""
    for result in results:
        if sheet:
            sheet.answer(result)
        yield result


if __name__ == "__main__":
    raise SystemExit(run_main(main, PROGRAM))
