"""Data sets in the layouts and forms that people bring, what they are called, and refusals."""

import bz2
import gzip
import io
import lzma
import pickle
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import idx_files
import numpy as np
import pytest
import source_forms as forms
from idx_files import TEST_IMAGES, TEST_LABELS, TRAIN_IMAGES, TRAIN_LABELS

from data_prep import archives, known, read_csv, sources
from data_prep.betons import prepare
from data_prep.known import identify, parts_of
from data_prep.read_idx import parse_name
from data_prep.samples import Samples
from data_prep.sources import load_source
from mnist_fast.errors import InputError

pytestmark = pytest.mark.timeout(60)

Maker = Callable[[Path], Path]


def has_pyarrow() -> bool:
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        return False
    return True


needs_pyarrow = pytest.mark.skipif(not has_pyarrow(), reason="needs pyarrow")


def capitals(root: Path) -> Path:
    forms.tables(root, "MNIST_{}.csv")
    for path in list(root.iterdir()):
        path.rename(path.with_name(path.name.upper()))
    return root


def with_header(root: Path, *names: object) -> Path:
    for path in forms.tables(root, header=False).iterdir():
        path.write_text(",".join(map(str, names)) + "\n" + path.read_text())
    return root


def with_names(root: Path, train: str, test: str) -> Path:
    forms.tables(root)
    (root / "mnist_train.csv").rename(root / f"{train}.csv")
    (root / "mnist_test.csv").rename(root / f"{test}.csv")
    return root


def byte_order_mark(root: Path) -> Path:
    for path in forms.tables(root).iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    return root


def torchvision_root(root: Path) -> Path:
    idx_files.write_idx_files(root / "MNIST" / "raw")
    idx_files.write_idx_files(root / "FashionMNIST" / "raw", seed=9)
    return root


FORMS: dict[str, Maker] = {
    "plain": lambda root: forms.renamed(root, lambda name: name),
    "dots": lambda root: forms.renamed(root, forms.dots),
    "upper case": lambda root: forms.renamed(root, str.upper),
    "underscores": lambda root: forms.renamed(root, lambda name: name.replace("-", "_")),
    "browser's copy": lambda root: forms.renamed(root, lambda name: f"{name} (1)"),
    "browser's copy, gz": lambda root: forms.renamed(
        root, lambda name: name.replace(".gz", " (1).gz"), compressed=True
    ),
    "test for t10k": lambda root: forms.renamed(root, lambda name: name.replace("t10k", "test")),
    "Kaggle's folders": lambda root: forms.kaggle_mirror(root, with_files=False),
    "Kaggle's folders and files": lambda root: forms.kaggle_mirror(root, with_files=True),
    "gzip by content": forms.both_names_lie,
    "folder per split": lambda root: forms.renamed(root, lambda n: f"{n.split('-')[0]}/{n}"),
    "torchvision root": torchvision_root,
    "torchvision MNIST": lambda root: torchvision_root(root) / "MNIST",
    "torchvision raw": lambda root: torchvision_root(root) / "MNIST" / "raw",
    "zip": lambda root: forms.zipped(FORMS["dots"](root), root / "archive.zip"),
    "zip of gz": lambda root: forms.zipped(forms.both_names_lie(root), root / "archive.zip"),
    "tar of .": lambda root: forms.tarred(FORMS["plain"](root), root / "x.tar", "w", "."),
    "tar": lambda root: forms.tarred(FORMS["plain"](root), root / "mnist.tar", "w"),
    "tar.gz": lambda root: forms.tarred(FORMS["plain"](root), root / "mnist.tar.gz"),
    "tar.xz": lambda root: forms.tarred(FORMS["plain"](root), root / "mnist.tar.xz", "w:xz"),
    "QMNIST": forms.qmnist,
    "EMNIST": forms.emnist,
    "CSV": forms.tables,
    "CSV without header": lambda root: forms.tables(root, header=False),
    "CSV, Windows and quotes": lambda root: forms.tables(
        root, lineterminator="\r\n", quoting=1
    ),
    "CSV, semicolons": lambda root: forms.tables(root, delimiter=";"),
    "CSV, tabs": lambda root: forms.tables(root, header=False, delimiter="\t"),
    "CSV, numbered columns": lambda root: with_header(root, "label", *range(784)),
    "CSV, numbers for names": lambda root: with_header(root, *range(785)),
    "CSV, names with counts": lambda root: with_names(root, "mnist_train_100", "mnist_test_10"),
    "CSV, words in words": lambda root: with_names(root, "mnistTrain", "testset"),
    "CSV, upper case": capitals,
    "CSV, byte order mark": byte_order_mark,
    "CSV, zip": lambda root: forms.zipped(forms.tables(root / "in"), root / "digits.zip"),
    "CSV, folder per split": lambda root: forms.tables(root, "{0}/mnist_{0}.csv"),
    "npz": forms.keras_npz,
    "npz itself": lambda root: forms.keras_npz(root) / "mnist.npz",
    "npz, flat": lambda root: forms.keras_npz(
        root, x_train=forms.splits()["train"][0].reshape(-1, 784).astype(np.float32)
    ),
    "npz, Fortran order": lambda root: forms.keras_npz(
        root, x_train=np.asfortranarray(forms.splits()["train"][0])
    ),
    "pictures": forms.pictures,
    "pictures, other names": lambda root: forms.pictures(root / "png", ("Training", "testing")),
    "pictures, RGB": lambda root: forms.pictures(root, mode="RGB"),
    "pictures, Windows zip": lambda root: forms.zipped(
        forms.pictures(root / "in"), root / "x.zip", "\\"
    ),
    "pictures, tar.gz": lambda root: forms.tarred(forms.pictures(root / "in"), root / "x.tar.gz"),
}  # fmt: skip


# What else is said about some of them.
SAYS = {
    "EMNIST": ".*2 data sets .*: taking emnist-digits\n.*turned upright\n",
    "torchvision root": ".*2 data sets .*: taking MNIST/raw\n",
}


def assert_same_samples(source: sources.Source) -> None:
    for split, (images, labels) in forms.splits().items():
        assert np.array_equal(getattr(source, f"{split}_images"), images)
        assert np.array_equal(getattr(source, f"{split}_labels"), labels)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_samples(form: str, tmp_path: Path, capsys) -> None:
    tmp_path = tmp_path / "place"
    plain = load_source("mnist", idx_files.write_idx_files(tmp_path / "idx"))
    source = load_source("mnist", FORMS[form](tmp_path / "form"))
    assert_same_samples(source)
    assert (source.name, source.published) == ("custom", False)
    assert re.fullmatch(SAYS.get(form, ""), capsys.readouterr().err)
    if form != "EMNIST":
        assert source.checksums == plain.checksums


@needs_pyarrow
def test_parquet_gives_the_same_samples(tmp_path: Path) -> None:
    assert_same_samples(load_source("mnist", forms.parquet(tmp_path / "hf")))


@pytest.mark.timeout(240)
def test_betons_are_the_same_bytes(tmp_path: Path, capsys) -> None:
    plain = idx_files.write_idx_files(tmp_path / "idx")
    first = prepare("mnist", plain, tmp_path / "plain", progress=False)
    prepare("mnist", forms.tables(tmp_path / "tables"), tmp_path / "csv", progress=False)
    for beton in ("train.beton", "test.beton"):
        assert (tmp_path / "csv" / beton).read_bytes() == (tmp_path / "plain" / beton).read_bytes()
    # The same images in another form are not written again.
    assert prepare("mnist", forms.keras_npz(tmp_path / "npz"), tmp_path / "plain") == first
    assert "up to date" in capsys.readouterr().err


def test_environment_takes_the_same_layouts(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MNIST_ROOT", str(forms.kaggle_mirror(tmp_path / "k", with_files=False)))
    source = load_source("mnist")
    assert_same_samples(source)
    assert (source.name, source.origin) == ("custom", "$MNIST_ROOT")
    assert "WARNING" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, parsed",
    [
        ("t10k-labels-idx1-ubyte", ("", "test", "labels")),
        ("TRAIN-IMAGES.IDX3-UBYTE.GZ", ("", "train", "images")),
        ("emnist-digits-test-images-idx3-ubyte (2).gz", ("emnist-digits", "test", "images")),
        ("qmnist-train-labels-idx2-int", ("qmnist", "train", "labels")),
        ("qmnist-train-labels.tsv.gz", None),
        ("train-images.png", None),
        ("emnist-digits-mapping.txt", None),
    ],
)
def test_names(name: str, parsed: tuple[str, str, str] | None) -> None:
    assert parse_name(name) == parsed


def test_pictures_are_sorted_by_number_then_class(tmp_path: Path) -> None:
    image = forms.splits()["train"][0][0]
    for split, names in (("train", ("1/10", "0/9", "1/9", "0/b", "2/0009")), ("test", ("0/1",))):
        for number, name in enumerate(names):
            path = tmp_path / split / f"{name}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(forms.picture(image + np.uint8(number), "JPEG"))
    assert load_source("mnist", tmp_path).train_labels.tolist() == [0, 1, 2, 1, 0]


# What it is called


def known_as(monkeypatch, name: str, seed: int) -> None:
    """Makes the small set of a seed a published one."""
    splits = {split: Samples(*samples) for split, samples in forms.splits(seed).items()}
    sums = tuple(f"md5:{part.md5}" for part in parts_of(splits, {}))
    monkeypatch.setitem(known.KNOWN, name, sums)


def test_names_come_from_checksums(tmp_path: Path, monkeypatch, capsys) -> None:
    known_as(monkeypatch, "kmnist", seed=0)
    source = load_source("mnist", forms.tables(tmp_path / "csv"))
    assert (source.name, source.published) == ("kmnist", True)
    other = idx_files.write_idx_files(tmp_path / "idx", seed=5)
    assert load_source("mnist", other).name == "custom"
    named = load_source("mnist", other, name="mnist")
    assert (named.name, named.published) == ("mnist", False)
    with pytest.raises(InputError, match=r"--name mnist: .* holds kmnist, by its checksums"):
        load_source("mnist", tmp_path / "csv", name="mnist")


def test_one_damaged_file_of_a_published_set_is_refused(tmp_path: Path, monkeypatch) -> None:
    known_as(monkeypatch, "kmnist", seed=0)
    root = idx_files.write_idx_files(tmp_path / "idx")
    content = bytearray((root / TEST_IMAGES).read_bytes())
    content[100] ^= 1
    (root / TEST_IMAGES).write_bytes(content)
    with pytest.raises(InputError, match=f"{TEST_IMAGES} is not the published one of kmnist"):
        load_source("mnist", root)
    assert load_source("mnist", root, name="mine").name == "mine"


def test_compressed_files_are_known_by_their_own_checksums(tmp_path: Path, monkeypatch) -> None:
    import hashlib

    folder = forms.qmnist(tmp_path)
    found = next(iter(sources.read_idx.find(list_files(folder))))
    splits = {split: found.read(split, found.files[split]) for split in ("train", "test")}
    parts = parts_of(splits, found.files)
    sums = [f"md5:{part.md5}" for part in parts]
    images = folder / "qmnist-train-images-idx3-ubyte.gz"
    sums[0] = "gz-md5:" + hashlib.md5(images.read_bytes()).hexdigest()
    sums[2] = (
        "git:" + hashlib.sha1(git_blob(folder / "qmnist-test-images-idx3-ubyte.gz")).hexdigest()
    )
    monkeypatch.setitem(known.KNOWN, "qmnist", tuple(sums))
    assert identify(parts) == ("qmnist", True, None)
    images.write_bytes(gzip.decompress(images.read_bytes()))  # the labels then decide
    assert identify(parts) == ("qmnist", False, None)


def git_blob(path: Path) -> bytes:
    content = gzip.decompress(path.read_bytes())
    return b"blob %d\0" % len(content) + content


def list_files(folder: Path) -> list:
    with sources.open_tree(folder) as files:
        return files


WARNINGS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str]] = {
    "inverted": (lambda images: 255 - images, "most pixels are bright"),
    "0/1": (lambda images: images // 128, "0 and 1 only"),
    "blank": (lambda images: images * 0, "all pixels are the same"),
    "transposed": (lambda images: images.transpose(0, 2, 1), "lie on their side"),
    "transposed, inverted": (lambda images: 255 - images.transpose(0, 2, 1), "on their side"),
}


def test_pictures_that_are_left_out_are_counted(tmp_path: Path, capsys) -> None:
    forms.pictures(tmp_path)
    (tmp_path / "train" / "0" / "more").mkdir()
    for name in ("train/0/more/a.png", "train/0/b.bmp"):
        (tmp_path / name).write_bytes(SMALL)
    assert_same_samples(load_source("mnist", tmp_path))
    said = "data_prep: 2 pictures are left out, such as train/0/more/a.png\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("split, place", [("train", ""), ("test", "of the test set: ")])
@pytest.mark.parametrize("fault", WARNINGS)
def test_warnings_about_pixels(fault, split, place, tmp_path: Path, capsys) -> None:
    change, words = WARNINGS[fault]
    digits = load_source("digits")
    arrays = {
        "x_train": digits.train_images,
        "y_train": digits.train_labels,
        "x_test": digits.test_images,
        "y_test": digits.test_labels,
    }
    np.savez(tmp_path / "upright.npz", **arrays)
    load_source("mnist", tmp_path / "upright.npz")
    assert capsys.readouterr().err == ""
    arrays[f"x_{split}"] = change(arrays[f"x_{split}"])
    np.savez(tmp_path / "changed.npz", **arrays)
    load_source("mnist", tmp_path / "changed.npz")
    assert re.search(f"WARNING: {place}.*{words}", capsys.readouterr().err)


def test_a_warning_about_labels_that_are_all_the_same(tmp_path: Path, capsys) -> None:
    digits = load_source("digits")
    arrays = {"x_train": digits.train_images, "y_train": digits.train_labels * 0}
    arrays |= {"x_test": digits.test_images, "y_test": digits.test_labels}
    np.savez(tmp_path / "lost.npz", **arrays)
    load_source("mnist", tmp_path / "lost.npz")
    assert re.search("WARNING: .*every label is 0", capsys.readouterr().err)


# Refusals that name what is there


def nothing(root: Path) -> Path:
    return root / "nowhere"


def empty(root: Path) -> Path:
    (root / "empty").mkdir()
    return root / "empty"


def a_file(root: Path) -> Path:
    path = root / "notes.txt"
    path.write_text("hello")
    return path


def one_idx_file(root: Path) -> Path:
    return idx_files.write_idx_files(root / "idx") / TRAIN_IMAGES


def written(name: str, content: bytes) -> Maker:
    def make(root: Path) -> Path:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
        return root

    return make


def without(*names: str) -> Maker:
    def make(root: Path) -> Path:
        folder = idx_files.write_idx_files(root / "idx")
        for name in names:
            (folder / name).unlink()
        return folder

    return make


def idx_with(name: str, content: bytes) -> Maker:
    def make(root: Path) -> Path:
        folder = idx_files.write_idx_files(root / "idx")
        (folder / name).write_bytes(content)
        return folder

    return make


def table_with(
    change: Callable[[list[list[int]]], list[list[object]]], header: bool = True
) -> Maker:
    def make(root: Path) -> Path:
        folder = forms.tables(root / "csv")
        rows = change(forms.csv_rows(*forms.splits()["test"]))
        forms.write_csv(folder / "mnist_test.csv", rows, header)
        return folder

    return make


def as_utf_16(folder: Path) -> Path:
    for path in folder.iterdir():
        path.write_text(path.read_text(), encoding="utf-16")
    return folder


def large_pictures(root: Path) -> Path:
    folder = forms.pictures(root / "png")
    for path in folder.glob("test/3/*"):
        path.write_bytes(forms.picture(np.zeros((32, 32), np.uint8)))
    return folder


def with_test_set(name: str, content: bytes) -> Maker:
    """Pictures of which one is something else."""

    def make(root: Path) -> Path:
        folder = forms.pictures(root / "png")
        path = folder / "test" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return folder

    return make


def two_sets(root: Path) -> Path:
    for name in ("first", "second"):
        idx_files.write_idx_files(root / name)
    return root


def two_halves(root: Path) -> Path:
    """What 2024 lacks is in 2025: labels of other images."""
    for year, lost in (("2024", TEST_LABELS), ("2025", TEST_IMAGES)):
        idx_files.write_idx_files(root / year)
        (root / year / lost).unlink()
    return root


LETTERS = idx_files.idx_labels((np.arange(26) + 1).astype(np.uint8))
HTML = b"<!DOCTYPE html>\n<html><head><title>404</title>"
RED = np.full((28, 28, 3), (9, 0, 0), np.uint8)
SMALL = forms.picture(np.zeros((28, 28), np.uint8))

REFUSED: dict[str, tuple[Maker, str]] = {
    "path": (nothing, "nowhere: No such file or directory: check the path"),
    "file": (a_file, "notes.txt is a file .*, not a data set: give its folder"),
    "one of four": (one_idx_file, f"holds only {TRAIN_IMAGES} and lacks {TRAIN_LABELS}.*folder"),
    "empty": (empty, "is empty: put a data set there"),
    "other files": (written("a.txt", b"x"), "holds no data set, but 1 x a.txt"),
    "an archive in a folder": (
        lambda root: forms.zipped(FORMS["dots"](root / "x"), empty(root) / "archive.zip").parent,
        "holds no data set, but archive.zip: give that as --source",
    ),
    "HTML": (idx_with(TRAIN_LABELS, HTML), "is an HTML page: replace it with a good copy"),
    "HTML in gzip": (idx_with(TEST_IMAGES, gzip.compress(HTML)), "is an HTML page"),
    "LFS": (idx_with(TEST_IMAGES, b"version https://git-lfs.github.com/spec/v1"), "Git LFS"),
    "Parquet": (idx_with(TEST_IMAGES, b"PAR1"), "is a Parquet file: name it after its content"),
    "only training": (
        without(TEST_IMAGES, TEST_LABELS),
        f"holds only {TRAIN_IMAGES}, {TRAIN_LABELS} .the train set. and lacks .*{TEST_LABELS}",
    ),
    "no labels": (
        without(TRAIN_LABELS, TEST_LABELS),
        f"holds only {TRAIN_IMAGES}, {TEST_IMAGES} and lacks {TRAIN_LABELS}",
    ),
    "32 x 32": (
        idx_with(TEST_IMAGES, struct.pack(">4I", 0x803, 23, 32, 32) + bytes(23 * 1024)),
        "its images are 32x32 instead of 28x28: resize them",
    ),
    "letters": (idx_with(TRAIN_LABELS, LETTERS), "labels are 1 to 26 .*these are letters"),
    "two sets": (two_sets, "holds 2 data sets .first, second.: name the folder of one"),
    "CSV, only training": (
        lambda root: forms.tables(root, "train.csv"),
        "holds only train.csv .the train set. and lacks the test set, a CSV",
    ),
    "CSV without labels": (
        table_with(lambda rows: [row[1:] for row in rows], header=False),
        "mnist_test.csv is not usable: it has no labels: 784 columns",
    ),
    "CSV of 32 x 32": (
        table_with(lambda rows: [[1] * 1025 for _ in rows], header=False), "images are 32x32"),
    "CSV, short line": (
        table_with(lambda rows: [*rows[:4], rows[4][:-1]]), "line 6 has 784 columns instead of"),
    "CSV, fractions": (
        table_with(lambda rows: [*rows[:4], [*rows[4][:-1], 0.5]]),
        "line 6, column 785: '0.5' instead of a whole number from 0 to 255: write pixels as whole",
    ),
    "CSV, 256": (
        table_with(lambda rows: [[*row[:-1], 256] for row in rows]), "line 2, column 785: '256'"),
    "CSV, negative": (
        table_with(lambda rows: [[*row[:-1], -1] for row in rows]), "line 2, column 785: '-1'"),
    "CSV, row numbers": (
        table_with(lambda rows: [[n, *row] for n, row in enumerate(rows)], header=False),
        "785: leave a column of row numbers out",
    ),
    "CSV, fractions without header": (
        table_with(lambda rows: [[row[0], *(0.5 for _ in row[1:])] for row in rows], header=False),
        "line 1, column 2: '0.5' instead of a whole number",
    ),
    "two halves": (
        two_halves, f"holds only {TRAIN_IMAGES}, {TRAIN_LABELS}, {TEST_IMAGES} and lacks"),
    "Parquet, a file of two": (
        lambda root: written("test-00000-of-00001.parquet", b"PAR1")(
            written("train-00000-of-00002.parquet", b"PAR1")(root)
        ),
        "lacks train-00001-of-00002.parquet",
    ),
    "CSV, UTF-16": (
        lambda root: as_utf_16(forms.tables(root)), "is not plain text, perhaps UTF-16: save it"),
    "CSV, label 10": (
        table_with(lambda rows: [[10, *row[1:]] for row in rows]), "label 0 is 10"),
    "CSV, blank": (
        written("mnist_test.csv", b""),
        "holds only mnist_test.csv .the test set. and lacks the train set",
    ),
    "npz, pickle": (
        lambda root: forms.keras_npz(root / "n", x_train=np.array([{}] * 3, dtype=object)),
        "x_train holds pickled objects, which are never opened",
    ),
    "npz, names": (
        written("weights.npz", zlib.compress(b"")), "mnist|weights.npz is not usable: it is a"),
    "npz, fractions": (
        lambda root: forms.keras_npz(root / "n", x_test=np.full((23, 28, 28), 0.5)),
        "x_test holds 0.5 to 0.5 instead of whole numbers from 0 to 255",
    ),
    "npz, shape": (
        lambda root: forms.keras_npz(root / "n", x_test=np.zeros((23, 32, 32), np.uint8)),
        "32x32 instead of 28x28",
    ),
    "npz, one-hot": (
        lambda root: forms.keras_npz(root / "n", y_test=np.zeros((23, 10), np.uint8)),
        r"y_test has shape \(23, 10\) instead of \(N,\)",
    ),
    "loose pictures": (
        written("digits/a.png", SMALL), r"lacks folders train/0 .*.its pictures lie in digits.: add"
    ),
    "pictures of 32 x 32": (large_pictures, "images are 32x32 instead of 28x28"),
    "no class": (with_test_set("cats/a.png", SMALL), "folder 'cats', which is no class"),
    "no picture": (with_test_set("3/a.png", HTML), "it cannot be read as PNG or JPEG"),
    "half a picture": (with_test_set("3/a.png", SMALL[:45]), "it cannot be read as PNG or JPEG"),
    "colour": (
        with_test_set("3/a.png", forms.picture(RED, mode="RGB")),
        "it is in colour",
    ),
    "transparent": (
        with_test_set("3/a.png", forms.picture(np.full((28, 28, 4), 9, np.uint8), mode="RGBA")),
        "it is transparent",
    ),
    "16 bits": (
        with_test_set("3/a.png", forms.picture(np.full((28, 28), 999, np.uint16), mode="I;16")),
        "pixels are of mode I",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_refusals_name_what_is_there(fault: str, tmp_path: Path) -> None:
    make, words = REFUSED[fault]
    with pytest.raises(InputError, match=words) as error:
        load_source("mnist", make(tmp_path))
    assert str(tmp_path) in str(error.value)
    if not re.search("HTML|LFS|cannot be read|columns|line|weights", str(error.value)):
        assert "good copy" not in str(error.value)


def test_parquet_without_its_reader(tmp_path: Path, monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for split in ("train", "test"):
        (tmp_path / f"{split}-00000-of-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"needs pyarrow, which is not installed: run .*pyarrow"):
        load_source("mnist", tmp_path)


@needs_pyarrow
@pytest.mark.parametrize(
    "columns, words",
    [
        ({"picture": [SMALL], "label": [1]}, "no column image .but picture, label"),
        ({"image": [[1, 2]], "label": [1]}, "image holds no bytes"),
        ({"image": [SMALL], "label": [None]}, "label is not a whole number in every row"),
        ({"image": [SMALL], "label": [11]}, "label 0 is 11"),
        ({"image": [b"x" * 2_000_000], "label": [1]}, "more than 1,048,576 bytes"),
    ],
)
def test_parquet_that_is_no_data_set(columns: dict, words: str, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    for split in ("train", "test"):
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / f"{split}.parquet")
    with pytest.raises(InputError, match=words):
        load_source("mnist", tmp_path)


# Hostile files


def endless_line(root: Path) -> Path:
    for split in ("train", "test"):
        content = b"1," * 785 + b"0\n" if split == "test" else b"0," * 20_000_000
        (root / f"{split}.csv").write_bytes(gzip.compress(content, 1))
    return root


def endless_later_line(root: Path) -> Path:
    for split in ("train", "test"):
        content = b"0" + b",0" * 784 + b"\n" + b"1," * 20_000_000
        (root / f"{split}.csv").write_bytes(gzip.compress(content, 1))
    return root


def npz_claiming(shape: str) -> Maker:
    """An array whose header claims a size that its content does not have."""

    def make(root: Path) -> Path:
        folder = forms.keras_npz(root / "n")
        file = io.BytesIO()
        text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
        file.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + b"\0" * 99)
        with zipfile.ZipFile(folder / "mnist.npz") as old:
            members = {name: old.read(name) for name in old.namelist()}
        with zipfile.ZipFile(folder / "mnist.npz", "w") as new:
            for name, content in (members | {"x_train.npy": file.getvalue()}).items():
                new.writestr(name, content)
        return folder

    return make


def pickled_npz(root: Path) -> Path:
    folder = forms.keras_npz(root / "n")
    with zipfile.ZipFile(folder / "mnist.npz") as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(folder / "mnist.npz", "w") as new:
        for name, content in (members | {"x_train.npy": pickle.dumps(print)}).items():
            new.writestr(name, content)
    return folder


def zip_bomb(root: Path) -> Path:
    with zipfile.ZipFile(root / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(TRAIN_IMAGES, bytes(5_000_000))
    return root / "bomb.zip"


def png_bomb(size: int) -> bytes:
    """A picture whose header says size x size, a millionth of it in the file."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">2I5B", size, size, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(10**6))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels)


def tar_of(*members: tarfile.TarInfo, claim: int = 0) -> Maker:
    def make(root: Path) -> Path:
        with tarfile.open(root / "hostile.tar", "w") as archive:
            for member in members:
                archive.addfile(member)
        if claim:
            content = bytearray((root / "hostile.tar").read_bytes())
            content[124:136] = b"%011o\0" % claim
            header = content[:148] + b" " * 8 + content[156:512]
            content[148:156] = b"%06o\0 " % sum(header)
            (root / "hostile.tar").write_bytes(content)
        return root / "hostile.tar"

    return make


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


HOSTILE: dict[str, tuple[Maker, str]] = {
    "endless first line": (endless_line, "line 1 has more than 65,536 bytes"),
    "endless line": (endless_later_line, "a line of more than 65,536 bytes"),
    "npz of 10^12": (npz_claiming("(1000000000000, 28, 28)"), "1,000,000,000,000 samples"),
    "npz of wide images": (npz_claiming("(3, 10000000000, 28)"), "10000000000x28 instead of"),
    "npz, short": (npz_claiming("(900000, 28, 28)"), "not the length that its header says"),
    "npz, negative": (npz_claiming("(-1, 28, 28)"), "samples instead of"),
    "npz, nested header": (npz_claiming("(" * 90), "x_train is not a NumPy array"),
    "npz, bare pickle": (pickled_npz, "x_train is not a NumPy array"),
    "zip bomb": (zip_bomb, "holds more than .* unpack what you need"),
    "PNG bomb": (
        with_test_set("3/a.png", png_bomb(60_000)),
        "cannot be read as PNG or JPEG .Image size",
    ),
    "PNG of 28 x 28 with a bomb's data": (with_test_set("3/a.png", png_bomb(28)), ""),
    "PNG of zeros": (with_test_set("3/a.png", bytes(2_000_000)), "more than 1,048,576 bytes"),
    "tar, links": (
        tar_of(
            member(TRAIN_IMAGES, tarfile.SYMTYPE, "/etc/passwd"),
            member(TRAIN_LABELS, tarfile.LNKTYPE, "../../secret"),
            member("pipe", tarfile.FIFOTYPE),
            member("device", tarfile.CHRTYPE),
        ),
        "is empty",
    ),
    "tar, path": (tar_of(member(f"../../{TRAIN_IMAGES}")), "is empty"),
    "tar, size": (tar_of(member(TRAIN_IMAGES), claim=4 << 30), "not a complete archive"),
    "tar, header": (tar_of(member("x", b"L"), claim=1 << 30), "a header of 1,073,741,824 bytes"),
}


def packed(kind: str, content: bytes) -> bytes:
    return {"tar": bytes, "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[kind](
        content
    )


def flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


DAMAGED = {
    "header": lambda kind, tar: packed(kind, flip(tar, tar.index(b"t10k-labels"))),
    "no end": lambda kind, tar: packed(kind, tar[: -(-len(tar.rstrip(b"\0")) // 512) * 512]),
    "cut": lambda kind, tar: packed(kind, tar)[:-6],
    "more": lambda kind, tar: packed(kind, tar + b"more"),
}


@pytest.mark.parametrize(
    "kind, damage",
    [("tar", "header"), ("tar", "more"), ("tar", "no end")]
    + [(kind, damage) for kind in ("gz", "bz2", "xz") for damage in ("header", "more", "cut")],
)
def test_a_damaged_archive_gives_nothing(kind: str, damage: str, tmp_path: Path) -> None:
    """What comes before the damage could be taken for all."""
    whole = forms.tarred(FORMS["plain"](tmp_path / "in"), tmp_path / "x.tar", "w:")
    path = tmp_path / f"damaged.{kind}"
    path.write_bytes(DAMAGED[damage](kind, whole.read_bytes()))
    with pytest.raises(InputError, match=r"is not a complete archive|is a file .a bzip2 file"):
        load_source("mnist", path)


def test_a_gzip_s_checksum_is_compared(tmp_path: Path) -> None:
    whole = forms.tarred(FORMS["plain"](tmp_path / "in"), tmp_path / "x.tar.gz")
    content = whole.read_bytes()
    whole.write_bytes(flip(content, len(content) - 8))
    with pytest.raises(InputError, match=r"is not a complete archive .CRC check failed"):
        load_source("mnist", whole)


def test_an_archive_s_links_are_passed_over(tmp_path: Path) -> None:
    path = forms.zipped(FORMS["plain"](tmp_path / "in"), tmp_path / "x.zip")
    link = zipfile.ZipInfo("copy/" + TRAIN_IMAGES)
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "../" + TRAIN_IMAGES)
    assert_same_samples(load_source("mnist", path))


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_end_in_one_line(kind: str, tmp_path: Path, monkeypatch) -> None:
    make, words = HOSTILE[kind]
    monkeypatch.setattr(archives, "MIN_UNPACKED", 3_000_000)
    before = memory()
    place = tmp_path / "a" / "b"  # ../../ of an archive ends beside them
    place.mkdir(parents=True)
    source = make(place)
    there = sorted(tmp_path.rglob("*"))
    if words:
        with pytest.raises(InputError, match=words):
            load_source("mnist", source)
    else:
        load_source("mnist", source)
    assert sorted(tmp_path.rglob("*")) == there
    assert memory() - before < 300e6


def memory() -> int:
    """Most bytes that this process has had in memory so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_a_million_files_are_too_many(tmp_path: Path, monkeypatch) -> None:
    from data_prep import tree

    monkeypatch.setattr(tree, "MAX_FILES", 20)
    with pytest.raises(InputError, match="more than 20 files: name the folder of the data"):
        load_source("mnist", forms.pictures(tmp_path))


def test_folders_in_a_circle(tmp_path: Path, capsys) -> None:
    root = FORMS["plain"](tmp_path)
    (root / "again").symlink_to(root)
    assert_same_samples(load_source("mnist", root))
    assert capsys.readouterr().err == ""


def test_a_csv_over_many_blocks(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(read_csv, "_BLOCK", 5000)
    assert_same_samples(load_source("mnist", forms.tables(tmp_path)))
    (tmp_path / "mnist_train.csv").write_bytes(
        (tmp_path / "mnist_train.csv").read_bytes().replace(b"\r\n", b"\n") + b"\n\n"
    )
    assert_same_samples(load_source("mnist", tmp_path))
