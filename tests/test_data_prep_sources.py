"""The IDX files, where they are looked for, the download and the digits."""

import errno
import gzip
import hashlib
import os
import re
import socket
import struct
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import idx_files
import numpy as np
import pytest
from idx_files import TEST_IMAGES, TEST_LABELS, TRAIN_IMAGES, TRAIN_LABELS

from data_prep import download, sources
from data_prep.read_idx import NAMES
from data_prep.sources import load_source
from data_prep.watched import WorkFailed
from mnist_fast.errors import InputError

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def _nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty current folder, no MNIST_ROOT, and a network that refuses every connection."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.delenv("MNIST_ROOT", raising=False)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # held, so that nobody else listens there
        set_proxy(monkeypatch, f"http://127.0.0.1:{unused.getsockname()[1]}")
        yield


def set_proxy(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, address)
        monkeypatch.setenv(name.upper(), address)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return idx_files.write_idx_files(tmp_path / "idx")


@pytest.mark.parametrize("below", ["", "MNIST/raw"])
@pytest.mark.parametrize("compressed", [False, True])
def test_loads_plain_and_compressed_files(tmp_path: Path, below: str, compressed: bool) -> None:
    idx_files.write_idx_files(tmp_path / "root" / below, 50, 23, seed=3, compressed=compressed)
    source = load_source("mnist", tmp_path / "root")
    images, labels = idx_files.make_samples(50, 3)
    assert np.array_equal(source.train_images, images)
    assert np.array_equal(source.train_labels, labels)
    images, labels = idx_files.make_samples(23, 1003)
    assert np.array_equal(source.test_images, images)
    assert np.array_equal(source.test_labels, labels)
    assert (source.name, source.published) == ("custom", False)
    content = hashlib.md5(idx_files.idx_images(images)).hexdigest()
    assert source.checksums[TEST_IMAGES] == content


def test_explicit_root_is_the_only_place(tmp_path: Path, root: Path, monkeypatch) -> None:
    monkeypatch.setenv("MNIST_ROOT", str(root))
    (tmp_path / "empty").mkdir()
    for dataset in ("mnist", "auto"):
        with pytest.raises(InputError, match=r"--source .*empty is empty: put a data set there"):
            load_source(dataset, tmp_path / "empty")


def test_environment_comes_before_the_data_folder(root: Path, monkeypatch) -> None:
    idx_files.write_idx_files(Path("data/MNIST/raw"), train=30)
    assert len(load_source("mnist").train_labels) == 30
    monkeypatch.setenv("MNIST_ROOT", str(root))
    source = load_source("auto")
    assert (len(source.train_labels), source.origin) == (50, "$MNIST_ROOT")
    (root / TEST_LABELS).unlink()  # incomplete: the next place is as good
    assert load_source("mnist").origin == "data/"


Fault = Callable[[Path], object]


def replaced(name: str, change: Callable[[bytes], bytes]) -> Fault:
    return lambda root: (root / name).write_bytes(change((root / name).read_bytes()))


def zipped(name: str, change: Callable[[bytes], bytes], zip_: Callable = gzip.compress) -> Fault:
    def fault(root: Path) -> None:
        (root / f"{name}.gz").write_bytes(zip_(change((root / name).read_bytes())))
        (root / name).unlink()

    return fault


def header(*numbers: int) -> bytes:
    return struct.pack(f">{len(numbers)}I", *numbers)


def flip_last(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 255])


def make_folder(root: Path) -> None:
    (root / TEST_LABELS).unlink()
    (root / TEST_LABELS).mkdir()


def make_pipe(root: Path) -> None:
    (root / TEST_LABELS).unlink()
    os.mkfifo(root / TEST_LABELS)


def same(content: bytes) -> bytes:
    return content


BAD_FILES: dict[str, tuple[str, Fault, str]] = {
    "truncated": (TRAIN_IMAGES, replaced(TRAIN_IMAGES, lambda c: c[:-1]), "truncated"),
    "over-long": (TRAIN_LABELS, replaced(TRAIN_LABELS, lambda c: c + b"\0"), "too long"),
    "empty": (TEST_IMAGES, replaced(TEST_IMAGES, lambda c: b""), "an empty file"),
    "half header": (TEST_LABELS, replaced(TEST_LABELS, lambda c: c[:7]), "truncated: 7 bytes"),
    "magic": (TEST_IMAGES, replaced(TEST_IMAGES, lambda c: header(0x802) + c[4:]), "0x00000802"),
    "swapped": (TEST_IMAGES, replaced(TEST_IMAGES, lambda c: header(0x801) + c[4:]), "labels"),
    "size": (
        TRAIN_IMAGES,
        replaced(TRAIN_IMAGES, lambda c: c[:8] + header(28, 27) + c[16:]),
        "28x27 instead of 28x28",
    ),
    "no samples": (TEST_LABELS, replaced(TEST_LABELS, lambda c: header(0x801, 0)), "0 samples"),
    "too many": (
        TEST_LABELS,
        replaced(TEST_LABELS, lambda c: header(0x801, 2**32 - 1) + c[8:]),
        "4,294,967,295 samples",
    ),
    "label": (
        TEST_LABELS,
        replaced(TEST_LABELS, lambda c: c[:9] + b"\12" + c[10:]),
        "labels are 0 to 10 (label 1 is 10)",
    ),
    "counts": (
        TEST_LABELS,
        replaced(TEST_LABELS, lambda c: header(0x801, 22) + c[9:]),
        f"{TEST_IMAGES} has 23 images but ",
    ),
    "gz truncated": (TEST_IMAGES, zipped(TEST_IMAGES, lambda c: c[:-5]), "truncated"),
    "gz over-long": (TEST_IMAGES, zipped(TEST_IMAGES, lambda c: c + b"\0"), "too long"),
    "gz cut": (
        TRAIN_IMAGES,
        zipped(TRAIN_IMAGES, same, lambda c: gzip.compress(c)[:-20]),
        "not a complete gzip file",
    ),
    "gz crc": (
        TRAIN_LABELS,
        zipped(TRAIN_LABELS, same, lambda c: gzip.compress(c)[:-8] + bytes(8)),
        "not a complete gzip file",
    ),
    "gz garbage": (
        TRAIN_LABELS,
        zipped(TRAIN_LABELS, same, lambda c: b"this is not gzip"),
        "magic number is 0x74686973",
    ),
    "html": (
        TRAIN_LABELS,
        zipped(TRAIN_LABELS, same, lambda c: b"<!DOCTYPE html><html>404</html>"),
        "it is an HTML page",
    ),
    "gz trailing": (
        TEST_LABELS,
        zipped(TEST_LABELS, same, lambda c: gzip.compress(c) + b"more"),
        "not a complete gzip file",
    ),
    "gz bomb": (TEST_LABELS, zipped(TEST_LABELS, lambda c: c + bytes(10**8)), "too long"),
    "gz claim": (
        TEST_IMAGES,
        zipped(TEST_IMAGES, lambda c: header(0x803, 10**6, 28, 28)),
        "truncated",
    ),
    "folder": (TEST_LABELS, make_folder, "lacks"),
    "pipe": (TEST_LABELS, make_pipe, "not a regular file"),
}


# Where another copy of the same file would not help.
ADVICE = {
    "size": "resize them to 28x28",
    "swapped": "name the files after their content",
    "label": "use data of ten classes",
    "folder": "add what is missing",
    "pipe": "put the file itself there",
}


@pytest.mark.parametrize("fault", BAD_FILES)
def test_bad_file_is_refused(root: Path, fault: str) -> None:
    name, spoil, words = BAD_FILES[fault]
    spoil(root)
    with pytest.raises(InputError) as error:
        load_source("mnist", root)
    assert name in str(error.value)
    assert words in str(error.value)
    assert re.search(ADVICE.get(fault, "good copy|same place"), str(error.value))


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read every file")
def test_unreadable_file_is_refused(root: Path) -> None:
    (root / TEST_LABELS).chmod(0)
    with pytest.raises(InputError, match=f"{TEST_LABELS} cannot be read: Permission denied"):
        load_source("mnist", root)


def test_a_bad_file_never_falls_back_to_the_digits(root: Path, monkeypatch) -> None:
    monkeypatch.setenv("MNIST_ROOT", str(root))
    (root / TRAIN_LABELS).write_bytes(b"")
    with pytest.raises(InputError, match="an empty file"):
        load_source("auto")


def test_nothing_found_names_the_files_and_the_alternatives(tmp_path: Path, monkeypatch) -> None:
    started = time.monotonic()
    with pytest.raises(InputError) as error:
        load_source("mnist")
    assert time.monotonic() - started < 20
    message = str(error.value)
    assert "which is not set" in message
    for words in (*NAMES.values(), "MNIST_ROOT=", "--source", "--dataset digits", "--dataset auto"):
        assert words in message
    monkeypatch.setenv("MNIST_ROOT", str(tmp_path))
    with pytest.raises(InputError, match=f"MNIST_ROOT .which is {tmp_path}. and data/ do not hold"):
        load_source("mnist")
    assert list(Path.cwd().iterdir()) == []


@pytest.fixture
def black_hole(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A network that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        set_proxy(monkeypatch, f"http://127.0.0.1:{server.getsockname()[1]}")
        yield


@pytest.mark.usefixtures("black_hole")
def test_a_silent_network_is_given_up(monkeypatch) -> None:
    assert download.CONNECT_SECONDS <= 12
    monkeypatch.setattr(download, "CONNECT_SECONDS", 2.0)
    started = time.monotonic()
    with pytest.raises(InputError, match="no progress for 2 seconds"):
        load_source("mnist")
    assert time.monotonic() - started < 40


def test_a_folder_beside_the_data_that_cannot_be_read_is_passed_over(monkeypatch, capsys) -> None:
    idx_files.write_idx_files(Path("mine"))
    Path("mine/lost+found").mkdir()
    scan = os.scandir

    def refuse(folder: Path) -> Iterator[os.DirEntry[str]]:
        if Path(folder).name == "lost+found":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    assert len(load_source("mnist", Path("mine")).train_labels)
    assert capsys.readouterr().err == (
        "data_prep: mine/lost+found cannot be read: Permission denied: passed over\n"
    )


def test_a_wrong_mnist_root_is_said(monkeypatch, capsys) -> None:
    idx_files.write_idx_files(Path("data/MNIST/raw"))
    monkeypatch.setenv("MNIST_ROOT", "/nowhere")
    assert sources.find_mnist() == (Path("data/MNIST/raw"), "data/")
    assert "WARNING: $MNIST_ROOT (/nowhere) does not hold MNIST" in capsys.readouterr().err


def test_auto_without_mnist_says_loudly_that_it_uses_digits(capsys) -> None:
    source = load_source("auto")
    assert source.name == "digits"
    assert re.search("WARNING.*1,797.*NOT MNIST", capsys.readouterr().err)


def test_mirrors_are_those_of_torchvision() -> None:
    spec = find_spec("torchvision")
    assert spec is not None
    assert spec.origin is not None
    text = (Path(spec.origin).parent / "datasets" / "mnist.py").read_text()
    block = text[text.index("mirrors = [") :]
    assert re.findall('"(http.*)"', block[: block.index("]")]) == list(download.MIRRORS)


def fake_download(content: Callable[[Path], object]) -> Callable[..., None]:
    """Takes the place of the watched child processes."""

    def run(target: str, arguments: list[str], *_: object) -> None:
        if target.endswith(":download"):
            content(Path(arguments[0]) / "MNIST" / "raw")

    return run


def test_download_lands_in_the_data_folder(monkeypatch) -> None:
    monkeypatch.setattr(download, "run_watched", fake_download(idx_files.write_idx_files))
    assert load_source("mnist").origin == "torchvision's download"
    assert sorted(os.listdir("data")) == ["MNIST"]
    assert sorted(os.listdir("data/MNIST/raw")) == sorted(NAMES.values())
    assert load_source("mnist").origin == "data/"


def test_bad_download_leaves_nothing(monkeypatch) -> None:
    def cut(folder: Path) -> None:
        idx_files.write_idx_files(folder)
        (folder / TRAIN_LABELS).write_bytes(b"")

    monkeypatch.setattr(download, "run_watched", fake_download(cut))
    with pytest.raises(InputError, match="an empty file"):
        load_source("mnist")
    assert list(Path.cwd().iterdir()) == []


def test_failed_download_leaves_nothing(monkeypatch) -> None:
    def fail(_: Path) -> None:
        raise WorkFailed("no progress for 45 seconds")

    monkeypatch.setattr(download, "run_watched", fake_download(fail))
    with pytest.raises(InputError, match="the download failed: no progress"):
        load_source("mnist")
    assert list(Path.cwd().iterdir()) == []


def test_digits_look_like_mnist() -> None:
    source = load_source("digits")
    assert source.train_images.shape == (1437, 28, 28)
    assert source.test_images.shape == (360, 28, 28)
    assert source.train_images.dtype == np.uint8
    for images in (source.train_images, source.test_images):
        assert images.max() == 255
        border = images.copy()
        border[:, 4:24, 4:24] = 0
        assert not border.any()
    for labels in (source.train_labels, source.test_labels):
        assert np.bincount(labels).min() > 0.08 * len(labels)


@pytest.mark.parametrize(
    "dataset, root, words",
    [("emnist", None, "unknown data set 'emnist'"), ("digits", Path("x"), "--source and --name")],
)
def test_usage_is_checked(dataset: str, root: Path | None, words: str) -> None:
    with pytest.raises(InputError, match=words):
        load_source(dataset, root)
