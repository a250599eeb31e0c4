"""The 1,797 digits inside scikit-learn, which stand in for MNIST where there is no network."""

import hashlib

import numpy as np

from data_prep.samples import SIZE, Samples

_TRAIN = 1_437  # of 1,797, about 80 %


def read_digits() -> tuple[dict[str, Samples], str]:
    """Both splits, made to look like MNIST: 20x20 in the middle of 28x28; and the data's MD5.

    They come as 8x8 pixels of 0 to 16 and are enlarged bilinearly. The first 1,437 are for
    training and the last 360 for testing: neighbours tend to have the same writer, so a shuffled
    split would have most writers on both sides.
    """
    from PIL import Image
    from sklearn import datasets

    digits = datasets.load_digits()
    small = np.round(digits.images * (255 / 16)).astype(np.uint8)
    images = np.zeros((len(small), SIZE, SIZE), np.uint8)
    for image, pixels in zip(images, small, strict=True):
        enlarged = Image.fromarray(pixels).resize((20, 20), Image.Resampling.BILINEAR)
        image[4:24, 4:24] = np.asarray(enlarged)
    labels = digits.target.astype(np.uint8)
    md5 = hashlib.md5(small.tobytes() + labels.tobytes(), usedforsecurity=False).hexdigest()
    splits = {
        "train": Samples(images[:_TRAIN], labels[:_TRAIN]),
        "test": Samples(images[_TRAIN:], labels[_TRAIN:]),
    }
    return splits, md5
