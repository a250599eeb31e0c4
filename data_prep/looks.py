"""Warnings about images that are probably not stored as MNIST's are."""

import numpy as np

from data_prep.manifest import CLASSES
from data_prep.samples import Samples

_TALL = 1  # the class of MNIST's whose images are higher than wide, however they are written
_WIDE = 1.5  # ratio of spreads; MNIST's transposed ones have 2.2 to 8.8 in parts of 60, noise 1


def warnings_about(samples: Samples) -> list[str]:
    """What looks wrong with images, in words; empty for images like MNIST's.

    Args:
        samples: the images and labels of one split.
    """
    found = []
    if samples.images.min() == samples.images.max():
        found.append("all pixels are the same: nothing can be learned from these images")
    elif samples.images.max() <= 1:
        found.append("the pixels are 0 and 1 only: for 8-bit images multiply them by 255")
    elif samples.images.mean() > 127.5:
        found.append("most pixels are bright: MNIST is white on black, so invert the images")
    present = set(samples.labels.tolist())
    if len(present) == 1:
        found.append(f"every label is {samples.labels[0]}: were the labels lost?")
    elif absent := sorted(set(range(CLASSES)) - present):
        found.append(f"no image is of class {', '.join(map(str, absent))}")
    if _lies_on_its_side(samples):
        found.append(
            f"the images of class {_TALL} lie on their side: if they are transposed, as EMNIST's "
            "files are, exchange rows and columns"
        )
    return found


def _lies_on_its_side(samples: Samples) -> bool:
    """Whether the ink of class 1 spreads clearly more along a row than along a column."""
    images = samples.images[samples.labels == _TALL][:1000]
    if not len(images):
        return False
    ink = images.sum(axis=0, dtype=np.float64)
    if images.mean() > 127.5:
        ink = 255.0 * len(images) - ink
    return _spread(ink.sum(axis=0)) > _WIDE * _spread(ink.sum(axis=1))


def _spread(weights: np.ndarray) -> float:
    """Variance of the position, in pixels squared, under weights that need not add up to one."""
    total = weights.sum()
    if not total:
        return 0.0
    positions = np.arange(len(weights))
    mean = float(weights @ positions / total)
    return float(weights @ (positions - mean) ** 2 / total)
