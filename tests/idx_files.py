"""Makes small IDX files: a stand-in for MNIST that is learnable and takes milliseconds."""

import gzip
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

TRAIN_IMAGES = "train-images-idx3-ubyte"
TRAIN_LABELS = "train-labels-idx1-ubyte"
TEST_IMAGES = "t10k-images-idx3-ubyte"
TEST_LABELS = "t10k-labels-idx1-ubyte"


def make_samples(count: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images (count, 28, 28) with a bright block whose place tells the label, and labels."""
    random = np.random.default_rng(seed)
    labels = (np.arange(count) % 10).astype(np.uint8)
    random.shuffle(labels)
    images = random.integers(0, 50, (count, 28, 28), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        row, column = 4 + 10 * (int(label) // 5), 2 + 5 * (int(label) % 5)
        image[row : row + 8, column : column + 4] += 200
    return images, labels


def idx_images(images: NDArray[np.uint8]) -> bytes:
    return struct.pack(">4I", 0x803, *images.shape) + images.tobytes()


def idx_labels(labels: NDArray[np.uint8]) -> bytes:
    return struct.pack(">2I", 0x801, len(labels)) + labels.tobytes()


def write_idx_files(
    folder: Path, train: int = 50, test: int = 23, seed: int = 0, compressed: bool = False
) -> Path:
    """Writes the four files into `folder` (give ROOT/MNIST/raw for a torchvision root)."""
    train_images, train_labels = make_samples(train, seed)
    test_images, test_labels = make_samples(test, seed + 1000)
    contents = {
        TRAIN_IMAGES: idx_images(train_images),
        TRAIN_LABELS: idx_labels(train_labels),
        TEST_IMAGES: idx_images(test_images),
        TEST_LABELS: idx_labels(test_labels),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        if compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return folder
