"""One PNG or JPEG file as the pixels of one image."""

import io
import warnings

import numpy as np
from numpy.typing import NDArray

from data_prep.file import File
from data_prep.samples import SIZE, bad, check_shape

MAX_BYTES = 1 << 20  # of one picture of 28 x 28

_FORMATS = ("PNG", "JPEG")
_GRAY = ("1", "L")
_COLOURED = ("LA", "P", "PA", "RGB", "RGBA")


def decode(file: File, content: bytes) -> NDArray[np.uint8]:
    """Pixels, uint8 (28, 28), of a gray PNG or JPEG; its size is checked before it is decoded.

    Args:
        file: for messages.
        content: of the picture.

    Raises:
        InputError: it is no such picture, or of another size, or in colour.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a size that is refused below anyway
            image = Image.open(io.BytesIO(content), formats=_FORMATS)
        check_shape(file, image.height, image.width)
        if image.mode in _COLOURED:
            return _gray(file, np.asarray(image.convert("RGBA")))
        if image.mode not in _GRAY:
            raise bad(file, f"its pixels are of mode {image.mode}", "save it as 8-bit gray")
        return np.asarray(image.convert("L"))
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        fault = str(error).split("<")[0].strip() or type(error).__name__
        raise bad(file, f"it cannot be read as PNG or JPEG ({fault})") from None


def _gray(file: File, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The gray of (28, 28, 4) pixels, or InputError where they are coloured or see-through."""
    red, green, blue, alpha = np.moveaxis(pixels, -1, 0)
    if not (np.array_equal(red, green) and np.array_equal(red, blue)):
        raise bad(file, "it is in colour", f"save it as {SIZE}x{SIZE} gray")
    if alpha.min() < 255:
        raise bad(file, "it is transparent in places", f"save it as {SIZE}x{SIZE} gray")
    return red
