"""Reads betons, FFCV's files, without compiling anything.

FFCV's loader decodes with code that numba compiles at every start: 1.1 s, and 0.3 s for FFCV's
import. Images of a fixed size lie in a beton as plain bytes, so that reading them once needs
neither. The layout is FFCV's own: it is taken from the source of the FFCV that is installed.
"""

import ast
import dataclasses
import functools
import importlib.util
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mnist_fast.errors import InputError

REMEDY = "run `python -m data_prep` with another --out, and train from there"


@dataclasses.dataclass(frozen=True)
class Layout:
    """The parts of a beton as FFCV defines them.

    Attributes:
        version: of the format.
        header: numpy's type of the file's first bytes.
        field: type of a field's description; one per field follows the header.
        array: type of an array field's arguments, which its own type follows as JSON.
        fields: number of a field's kind, as in its description, to the name of FFCV's class.
    """

    version: int
    header: np.dtype[Any]
    field: np.dtype[Any]
    array: np.dtype[Any]
    fields: dict[int, str]


@functools.cache
def layout() -> Layout:
    """The layout of the installed FFCV."""
    types, arrays = _definitions("types.py"), _definitions("fields/ndarray.py")
    handlers = types["TYPE_ID_HANDLER"]
    assert isinstance(handlers, ast.Dict)
    keys = [ast.literal_eval(key) for key in handlers.keys if key is not None]
    return Layout(
        version=ast.literal_eval(types["CURRENT_VERSION"]),
        header=_dtype(types["HeaderType"]),
        field=_dtype(types["FieldDescType"]),
        array=_dtype(arrays["NDArrayArgsType"]),
        fields=dict(zip(keys, map(ast.unparse, handlers.values), strict=True)),
    )


def _definitions(module: str) -> dict[str, ast.expr]:
    """What a module of FFCV assigns to its names, unevaluated; nothing is imported."""
    found = importlib.util.find_spec("ffcv")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("No module named 'ffcv'", name="ffcv")
    tree = ast.parse((Path(found.origin).parent / module).read_text(encoding="utf-8"))
    return {
        ast.unparse(target): statement.value
        for statement in tree.body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
    }


def _dtype(call: ast.expr) -> np.dtype[Any]:
    """The type that the source of a call of `np.dtype` with literal arguments stands for."""
    assert isinstance(call, ast.Call), ast.unparse(call)
    options = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    return np.dtype(*map(ast.literal_eval, call.args), **options)


class Beton:
    """A beton with a field `image`, a uint8 array of one shape, and an integer field `label`.

    Attributes:
        path: of the file.
        samples: their number.
        shape: of an image.

    Raises:
        InputError: the file is not such a beton, or cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        header = self._read(layout().header, 0, 1)[0]
        if header["version"] != layout().version:
            self._refuse(f"its format is {header['version']}, FFCV's is {layout().version}")
        fields = self._read(layout().field, layout().header.itemsize, int(header["num_fields"]))
        self.samples = int(header["num_samples"])
        self.shape = self._image_shape(fields)
        self._entries = layout().header.itemsize + fields.nbytes  # address of the first

    def read(self, rows: range) -> tuple[Tensor, Tensor]:
        """Images uint8 (n, *shape) and labels int64 (n,) of successive samples.

        Raises:
            InputError: the file ends before them, or cannot be read.
        """
        if rows.stop > self.samples:
            self._refuse(f"it has {self.samples:,} samples, not {rows.stop:,}")
        images = torch.empty(len(rows), *self.shape, dtype=torch.uint8)
        # a sample's entry: where its image begins, and its label
        entry = np.dtype([("image", "<u8"), ("label", "<i8")], align=True)
        first = self._entries + rows.start * entry.itemsize
        entries = self._read(entry, first, len(rows))
        self._read_images(entries["image"], images.flatten(1).numpy())
        return images, torch.from_numpy(entries["label"].copy())

    def _read_images(self, addresses: NDArray[np.uint64], into: NDArray[np.uint8]) -> None:
        try:
            with self.path.open("rb") as file:
                for start, stop in _runs(addresses, into.shape[1]):
                    file.seek(int(addresses[start]))
                    if file.readinto(into[start:stop].data) < into[start:stop].nbytes:
                        self._refuse("it is cut short")
        except OSError as error:
            self._refuse(f"it cannot be read: {error.strerror}")

    def _read(self, dtype: np.dtype[Any], address: int, count: int) -> NDArray[Any]:
        try:
            values = np.fromfile(self.path, dtype, count, offset=address)
        except OSError as error:
            self._refuse(f"it cannot be read: {error.strerror}")
        if len(values) != count:
            self._refuse("it is cut short")
        return values

    def _image_shape(self, fields: NDArray[Any]) -> tuple[int, ...]:
        """The shape in the description of the field `image`; refuses fields that are not ours."""
        names = [bytes(field["name"]).rstrip(b"\0").decode("ascii", "replace") for field in fields]
        kinds = [layout().fields.get(int(field["type_id"]), "unknown") for field in fields]
        if (names, kinds) != (["image", "label"], ["NDArrayField", "IntField"]):
            found = " and ".join(map(" ".join, zip(kinds, names, strict=True)))
            self._refuse(f"it has {found}, not NDArrayField image and IntField label")
        arguments = bytes(fields[0]["arguments"])
        array = np.frombuffer(arguments, layout().array, 1)[0]
        start = layout().array.itemsize
        descriptor = json.loads(arguments[start : start + int(array["type_length"])])
        if descriptor != [["", "|u1"]]:
            self._refuse(f"its images are {descriptor}, not bytes")
        return tuple(int(size) for size in array["shape"] if size)

    def _refuse(self, fault: str) -> NoReturn:
        raise InputError(f"{self.path}: {fault}: {REMEDY}")


def _runs(addresses: NDArray[np.uint64], size: int) -> Iterator[tuple[int, int]]:
    """Start and stop of each run of samples that lie one behind the other in the file."""
    breaks = np.flatnonzero(np.diff(addresses) != size) + 1
    edges = [0, *breaks.tolist(), len(addresses)]
    return ((start, stop) for start, stop in itertools.pairwise(edges) if stop > start)
