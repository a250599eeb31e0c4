"""Writes small data sets in the layouts and forms that people bring."""

import csv
import gzip
import io
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from idx_files import idx_images, idx_labels, make_samples, write_idx_files
from PIL import Image

TRAIN, TEST = 50, 23  # images of each split


def splits(seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The images and labels that all of these hold, as `write_idx_files` has them."""
    return {"train": make_samples(TRAIN, seed), "test": make_samples(TEST, seed + 1000)}


# Layouts of the four files


def renamed(root: Path, new_name: Callable[[str], str], compressed: bool = False) -> Path:
    """The four files under other names, `new_name` giving the path of each."""
    for path in write_idx_files(root / "plain", compressed=compressed).iterdir():
        target = root / "data" / new_name(path.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return root / "data"


def dots(name: str) -> str:
    return name.replace("-idx", ".idx")


def kaggle_mirror(root: Path, with_files: bool) -> Path:
    """A folder of each file's name that holds it, with or without the file beside it."""
    folder = renamed(root, lambda name: f"{name}/{name}")
    if with_files:
        for path in (root / "plain").iterdir():
            shutil.copy(path, folder / dots(path.name))
    return folder


def both_names_lie(root: Path) -> Path:
    """Files that are compressed without saying so, and the reverse."""
    folder = renamed(root, lambda name: name)
    for path in list(folder.iterdir()):
        if "labels" in path.name:
            path.write_bytes(gzip.compress(path.read_bytes()))
        else:
            path.rename(f"{path}.gz")
    return folder


def zipped(folder: Path, file: Path, separator: str = "/") -> Path:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("__MACOSX/._train-images-idx3-ubyte", b"\0\5\26\7")
        for path in sorted(folder.rglob("*")):
            name = f"some folder/{path.relative_to(folder)}"
            if path.is_file():
                archive.writestr(name.replace("/", separator), path.read_bytes())
    return file


def tarred(folder: Path, file: Path, mode: str = "w:gz", name: str = "mnist") -> Path:
    with tarfile.open(file, mode) as archive:  # type: ignore[call-overload]
        archive.add(folder, name)
    return file


def qmnist(root: Path) -> Path:
    """QMNIST's names, and its labels: eight 32-bit numbers per image, the class first."""
    folder = root / "QMNIST" / "raw"
    folder.mkdir(parents=True)
    for split, (images, labels) in splits().items():
        table = np.arange(8 * len(labels), dtype=">i4").reshape(-1, 8)
        table[:, 0] = labels
        content = struct.pack(">3I", 0xC02, *table.shape) + table.tobytes()
        (folder / f"qmnist-{split}-images-idx3-ubyte.gz").write_bytes(
            gzip.compress(idx_images(images))
        )
        (folder / f"qmnist-{split}-labels-idx2-int.gz").write_bytes(gzip.compress(content))
    return folder


def emnist(root: Path) -> Path:
    """EMNIST's names, and its images, which are transposed; letters lie beside the digits."""
    root.mkdir()
    for part, last in (("digits", 9), ("letters", 26)):
        for split, (images, labels) in splits().items():
            upright = np.ascontiguousarray(images.transpose(0, 2, 1))
            (root / f"emnist-{part}-{split}-images-idx3-ubyte").write_bytes(idx_images(upright))
            numbers = labels if last == 9 else np.arange(1, len(labels) + 1, dtype=np.uint8) % 27
            content = idx_labels(numbers)
            (root / f"emnist-{part}-{split}-labels-idx1-ubyte").write_bytes(content)
    return root


# Other forms


def csv_rows(images: np.ndarray, labels: np.ndarray) -> list[list[int]]:
    return np.concatenate([labels[:, None], images.reshape(len(images), -1)], axis=1).tolist()


def write_csv(path: Path, rows: Iterable[Iterable[object]], header: bool, **style: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, **style)  # type: ignore[arg-type]
        if header:
            writer.writerow(["label", *(f"pixel{number}" for number in range(784))])
        writer.writerows(rows)


def tables(root: Path, names: str = "mnist_{}.csv", header: bool = True, **style: object) -> Path:
    for split, samples in splits().items():
        write_csv(root / names.format(split), csv_rows(*samples), header, **style)
    return root


def keras_npz(root: Path, **changes: np.ndarray) -> Path:
    (x_train, y_train), (x_test, y_test) = splits().values()
    arrays = {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}
    root.mkdir(exist_ok=True)
    np.savez_compressed(root / "mnist.npz", **(arrays | changes))
    return root


def picture(pixels: np.ndarray, form: str = "PNG", mode: str = "L") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, form)
    return file.getvalue()


def pictures(root: Path, names: tuple[str, str] = ("train", "test"), mode: str = "L") -> Path:
    """PNG files by class, numbered through all classes as the images are."""
    for name, (images, labels) in zip(names, splits().values(), strict=True):
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = root / name / str(label) / f"image {number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(image, mode=mode))
    return root


def parquet(root: Path) -> Path:
    """Two files per split, as Hugging Face splits larger ones."""
    import pyarrow
    import pyarrow.parquet

    root.mkdir()
    for split, (images, labels) in splits().items():
        for shard, part in enumerate((slice(0, 10), slice(10, None))):
            cells = [{"bytes": picture(image), "path": None} for image in images[part]]
            numbers = labels[part].astype(np.int64)
            table = pyarrow.table({"image": cells, "label": numbers})
            name = f"{split}-{shard:05}-of-00002.parquet"
            pyarrow.parquet.write_table(table, root / name)
    return root
