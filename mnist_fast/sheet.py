"""A sheet for people: each picture, what each step made of it, what the network saw, the answer."""

import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mnist_fast.errors import InputError, RunError
from mnist_fast.files import write_atomically

MOST_ROWS = 300
CELL = 116  # pixels of a step's picture, which is 112 = 4 x 28 wide
TEXT = 300
COLUMNS = (
    *("picture", "without frame", "ink", "strokes", "without lines", "digit"),
    *("network's input", "answer"),
)
PAPER, INK, GOOD, BAD = (70, 74, 90), (255, 255, 255), (150, 230, 160), (255, 170, 150)


def check_sheet(path: Path) -> None:
    """Refuses a sheet that could not be written, before the pictures are read.

    Raises:
        InputError: it is no PNG by its name, it exists, or its folder does not.
    """
    if path.suffix.lower() != ".png":
        raise InputError(f"{path}: --sheet writes a PNG: let the name end with .png")
    if os.path.lexists(path):  # it may be one of the pictures
        raise InputError(f"{path}: exists: give --sheet another name, or move the file away")
    if not path.parent.is_dir():
        raise InputError(f"{path}: --sheet needs a file's name in a folder that exists")


class Sheet:
    """Collects up to `MOST_ROWS` pictures, small, and draws them in a table."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Image.Image]] = []
        self.answers: list[dict[str, Any]] = []

    def next_row(self) -> Callable[[str, NDArray[Any]], None]:
        """A function that keeps one step's picture (luminance 0..1, or uint8) under its name."""
        row: dict[str, Image.Image] = {}
        if len(self.rows) < MOST_ROWS:
            self.rows.append(row)

        def keep(name: str, picture: NDArray[Any]) -> None:
            row[name] = _small(picture)

        return keep

    def answer(self, result: dict[str, Any]) -> None:
        """Keeps what was said about the pictures, in the order of the rows."""
        if len(self.answers) < MOST_ROWS:
            self.answers.append(result)

    def write(self, path: Path) -> None:
        """Draws the table as a PNG.

        Raises:
            RunError: it cannot be written.
        """
        content = BytesIO()
        self._drawn().save(content, "PNG")
        try:
            write_atomically(path, content.getvalue())
        except OSError as error:
            raise RunError(f"{path}: {error.strerror}") from error

    def _drawn(self) -> Image.Image:
        font = ImageFont.load_default(13)
        size = (CELL * (len(COLUMNS) - 1) + TEXT, 24 + CELL * max(1, len(self.rows)))
        sheet = Image.new("RGB", size, PAPER)
        draw = ImageDraw.Draw(sheet)
        for column, name in enumerate(COLUMNS):
            draw.text((column * CELL + 2, 4), name, INK, font)
        for index, (row, result) in enumerate(zip(self.rows, self.answers, strict=True)):
            top = 24 + index * CELL
            for column, name in enumerate(COLUMNS[:-1]):
                if name in row:
                    sheet.paste(row[name], (column * CELL + 2, top))
            colour = BAD if "error" in result else GOOD
            left = (len(COLUMNS) - 1) * CELL + 6
            draw.multiline_text((left, top + 20), _said(result), colour, font)
        return sheet


def _small(picture: NDArray[Any]) -> Image.Image:
    if picture.dtype != np.uint8:
        picture = np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)
    image = Image.fromarray(picture)
    factor = (CELL - 4) / max(image.size)
    width, height = (max(1, round(side * factor)) for side in image.size)
    return image.resize(
        (width, height), Image.Resampling.BOX if factor < 1 else Image.Resampling.NEAREST
    )


def _said(result: dict[str, Any]) -> str:
    name = "".join(c if c.isprintable() else "?" for c in Path(result["file"]).name)
    if "error" in result:
        text = result["error"]
    else:
        text = f"{result['digit']}   {100 * result['probability']:.1f} %"
    lines = [text[start : start + 40] for start in range(0, min(len(text), 160), 40)]
    return "\n".join([name[-40:], *lines])
