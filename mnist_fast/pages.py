"""Pages of digits with texts around them, as PNG files.

Pillow draws them: matplotlib would take a tenth of a second for the texts.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # a run that draws nothing needs neither
    from numpy.typing import NDArray
    from PIL.Image import Image

    from mnist_fast.evaluate import Outcome

MISREAD_SHOWN, MISREAD_COLUMNS = 40, 8
SAMPLES_SHOWN = 12
SIDE = 28  # pixels of a digit
TITLE_SIZE, TEXT_SIZE = 26, 20  # dots, on a page of digits
TITLE_WIDTH = 150  # pixels that the title of `before_and_after` needs
FRAME = 75  # shade of grey
DPI = 150
PNG_LEVEL = 3  # of 9: a quarter less time than the usual 6, for files a tenth larger


@dataclass
class Page:
    """A page of digits, with texts around them.

    Attributes:
        pixels: uint8 (height, width), black on white.
        scale: dots by which a pixel is drawn, in either direction.
        texts: position in pixels, anchor as Pillow has it, size in dots, and the text.
        frames: left and top pixel of each digit that has a frame.
    """

    pixels: NDArray[np.uint8]
    scale: int
    texts: list[tuple[tuple[float, float], str, int, str]] = field(default_factory=list)
    frames: Sequence[tuple[int, int]] = ()

    def png(self) -> bytes:
        """The page as a PNG file, in shades of grey."""
        from PIL import Image, ImageDraw, ImageFont

        dots = self.pixels.repeat(self.scale, 0).repeat(self.scale, 1)
        image = Image.fromarray(dots)
        draw = ImageDraw.Draw(image)
        for left, top in self.frames:
            box = (left, top, left + SIDE, top + SIDE)
            draw.rectangle([self.scale * edge for edge in box], outline=FRAME)
        sizes = {size for _, _, size, _ in self.texts}
        fonts = {size: ImageFont.load_default(size) for size in sizes}
        for (x, y), anchor, size, text in self.texts:
            place = (self.scale * x, self.scale * y)
            draw.text(place, text, fill=0, font=fonts[size], anchor=anchor, align="center")
        return compress(image)


def misread(outcome: Outcome, name: str) -> Page:
    """The surest of the misread digits, with label, prediction and its probability."""
    count = min(len(outcome.images), MISREAD_SHOWN)
    shown = outcome.images[:count].numpy()
    pixels, corners = tile(255 - shown, MISREAD_COLUMNS, gap=(14, 8), margins=(24, 4, 3, 4))
    which = "all" if count == outcome.errors else f"the {count} surest"
    title = f"{outcome.errors:,} {name} images misread, shown: {which}"
    page = Page(pixels, scale=5, texts=[((pixels.shape[1] / 2, 2), "ma", TITLE_SIZE, title)])
    labels, guesses = outcome.labels[outcome.misread], outcome.predictions[outcome.misread]
    for (left, top), label, guess, probability in zip(
        corners, labels.tolist(), guesses.tolist(), outcome.probabilities.tolist(), strict=False
    ):
        text = f"{label} read as {guess}\n{100 * probability:.0f} % sure"
        page.texts.append(((left + SIDE / 2, top), "md", TEXT_SIZE, text))
    return page


def before_and_after(samples: NDArray[np.uint8]) -> Page:
    """Training images above what augmentation makes of them."""
    shown = samples[:, :SAMPLES_SHOWN]
    columns = shown.shape[1]
    images = shown.reshape(-1, SIDE, SIDE)
    left = 18
    right = max(2, TITLE_WIDTH - left - columns * (SIDE + 2))
    pixels, corners = tile(255 - images, columns, gap=(4, 2), margins=(13, right, 2, left))
    title = "training images before and after augmentation"
    page = Page(pixels, scale=4, frames=corners)
    page.texts.append(((pixels.shape[1] / 2, 2), "ma", TITLE_SIZE, title))
    for (left, top), text in zip(corners[::columns], ("before", "after"), strict=True):
        page.texts.append(((left - 2, top + SIDE / 2), "rm", TEXT_SIZE, text))
    return page


def tile(
    images: NDArray[np.uint8],
    columns: int,
    gap: tuple[int, int] = (1, 1),
    margins: tuple[int, int, int, int] = (0, 0, 0, 0),
) -> tuple[NDArray[np.uint8], list[tuple[int, int]]]:
    """Lays images out in rows on a white page.

    Args:
        images: uint8 (n, height, width).
        columns: images in a row.
        gap: pixels between rows and between columns.
        margins: pixels above, right of, below and left of all images.

    Returns:
        The page, uint8 (height, width); left and top of each image on it.
    """
    count, height, width = images.shape
    above, right, below, left = margins
    down, across = height + gap[0], width + gap[1]
    rows = max(-(-count // columns), 1)
    size = (above + rows * down - gap[0] + below, left + columns * across - gap[1] + right)
    page = np.full(size, 255, np.uint8)
    corners = [(left + i % columns * across, above + i // columns * down) for i in range(count)]
    for image, (x, y) in zip(images, corners, strict=True):
        page[y : y + height, x : x + width] = image
    return page, corners


def compress(image: Image) -> bytes:
    """The image as a PNG file."""
    file = io.BytesIO()
    image.save(file, "png", compress_level=PNG_LEVEL, dpi=(DPI, DPI))
    return file.getvalue()
