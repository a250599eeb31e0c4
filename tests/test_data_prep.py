"""`python -m data_prep` from the IDX files to checked betons, and everything that can go wrong."""

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import idx_files
import numpy as np
import pytest
from test_data_prep_watched import ends

from data_prep import __main__ as command
from data_prep import betons, sources, staging
from data_prep.betons import check, data_sha256, load_manifest, prepare
from data_prep.known import KNOWN
from data_prep.read_idx import NAMES
from data_prep.watched import Limits, Report, run_watched
from mnist_fast.errors import InputError, run_main

pytestmark = pytest.mark.timeout(240)

Files = dict[str, bytes]
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def idx_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return idx_files.write_idx_files(tmp_path_factory.mktemp("idx"))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, idx_root: Path) -> Path:
    """Betons of the small IDX files; not to be changed."""
    out = tmp_path_factory.mktemp("prepared") / "betons" / "small"
    prepare("mnist", idx_root, out)
    return out


@pytest.fixture
def out(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the betons to spoil."""
    return Path(shutil.copytree(prepared, tmp_path / "out"))


def run(*arguments: object) -> int:
    """`python -m data_prep` in this process."""
    return run_main(lambda: command.main([str(argument) for argument in arguments]), "data_prep")


def contents(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_refused(capsys: pytest.CaptureFixture[str], status: int, words: str) -> None:
    """Exit status 2 and exactly one line on standard error, which matches `words`."""
    printed = capsys.readouterr()
    assert status == 2
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert re.search(words, printed.err), printed.err


# Writing and reading


def test_manifest_tells_what_the_source_holds(prepared: Path, idx_root: Path) -> None:
    manifest = load_manifest(prepared)
    assert sorted(contents(prepared)) == ["manifest.json", "test.beton", "train.beton"]
    assert (manifest.dataset, manifest.published, manifest.format) == ("custom", False, 1)
    assert manifest.image_shape == (1, 28, 28)
    assert manifest.source_checksums == sources.load_source("mnist", idx_root).checksums
    assert manifest.versions.keys() == {"ffcv", "numpy", "python"}
    for split, count, seed in ((manifest.train, 50, 0), (manifest.test, 23, 1000)):
        images, labels = idx_files.make_samples(count, seed)
        assert split.samples == count
        assert split.label_histogram == tuple(np.bincount(labels, minlength=10))
        assert split.pixel_mean == pytest.approx((images / 255).mean(), rel=1e-12)
        assert split.pixel_sd == pytest.approx((images / 255).std(), rel=1e-12)
    assert str(idx_root) not in (prepared / "manifest.json").read_text()


def test_beton_has_the_documented_fields(prepared: Path) -> None:
    from ffcv.fields import IntField, NDArrayField
    from ffcv.reader import Reader

    reader = Reader(str(prepared / "test.beton"))
    assert reader.num_samples == 23
    assert list(reader.handlers) == ["image", "label"]
    image, label = reader.handlers.values()
    assert isinstance(image, NDArrayField)
    assert isinstance(label, IntField)
    assert (tuple(image.shape), image.dtype) == ((1, 28, 28), np.uint8)
    images, labels = idx_files.make_samples(23, 1000)
    assert reader.metadata["f1"].tolist() == labels.tolist()
    content = (prepared / "test.beton").read_bytes()
    for pointer, expected in zip(reader.metadata["f0"], images, strict=True):
        assert content[pointer : pointer + 784] == expected.tobytes()


def test_second_run_only_checks(out: Path, idx_root: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(betons, "run_watched", None)  # nothing is written or read back
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert run("--source", idx_root, "--out", out) == 0
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    printed = capsys.readouterr()
    assert "up to date" in printed.err
    for words in (
        "train +50",
        "test +23",
        load_manifest(out).test.sha256[:16],
        f"ready: .*{out}",
        f"train.py --data_dir {out}",
    ):
        assert re.search(words, printed.out)


def test_prepared_mnist_needs_no_source(out: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("MNIST_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    text = (out / "manifest.json").read_text()
    written = dataclasses.replace(load_manifest(out), dataset="mnist")
    (out / "manifest.json").write_text(written.to_json())
    monkeypatch.setattr(betons, "load_source", None)
    for dataset in ("mnist", "auto"):
        assert prepare(dataset, None, out) == load_manifest(out)
    (out / "manifest.json").write_text(text)  # of data that is not MNIST
    with pytest.raises(TypeError, match="not callable"):
        prepare("mnist", None, out)


def test_verify_reads_everything(out: Path, capsys) -> None:
    assert run("--verify", "--out", out) == 0
    assert "verified: custom" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["samples", "label_histogram", "pixel_mean", "pixel_sd"])
def test_verify_compares_what_it_reads(key: str, out: Path, capsys, monkeypatch) -> None:
    read = {
        name: {
            "samples": split.samples,
            "label_histogram": split.label_histogram,
            "pixel_mean": split.pixel_mean,
            "pixel_sd": split.pixel_sd,
        }
        for name, split in load_manifest(out).splits().items()
    }
    monkeypatch.setattr(betons, "run_watched", lambda *_: read)
    assert run("--verify", "--out", out) == 0
    capsys.readouterr()
    read["test"][key] = None
    assert_refused(capsys, run("--verify", "--out", out), f"test.beton: {key} is None but")


def test_verify_looks_where_the_dataset_goes(out: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    verified: list[Path] = []

    def remember(folder: Path) -> betons.Manifest:
        verified.append(folder)
        return load_manifest(out)

    monkeypatch.setattr(command, "verify", remember)
    assert run("--verify", "--dataset", "auto") == 0
    shutil.copytree(out, "data/betons/digits")
    assert run("--verify", "--dataset", "auto") == 0
    assert verified == [Path("data/betons/mnist"), Path("data/betons/digits")]


# Refusals


def test_bad_source_leaves_the_folder_untouched(out: Path, tmp_path: Path, capsys) -> None:
    root = idx_files.write_idx_files(tmp_path / "bad")
    (root / idx_files.TEST_LABELS).write_bytes(b"\0\0\10\1")
    before = contents(out)
    words = f"{idx_files.TEST_LABELS} is not usable: it is truncated"
    assert_refused(capsys, run("--source", root, "--out", out), words)
    assert contents(out) == before


def test_other_source_files_are_refused(out: Path, tmp_path: Path, capsys) -> None:
    other = idx_files.write_idx_files(tmp_path / "other", seed=1)
    before = contents(out)
    assert_refused(capsys, run("--source", other, "--out", out), "other custom files.*--out")
    assert contents(out) == before


def test_other_dataset_is_refused(out: Path, capsys) -> None:
    before = contents(out)
    assert_refused(capsys, run("--dataset", "digits", "--out", out), "betons of custom.*--out")
    assert contents(out) == before


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--dataset", "emnist"], "invalid choice: 'emnist'"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--out"], "--out: expected one argument"),
        (["--verify", "--source", "x"], "--source cannot be given with --verify"),
        (["--dataset", "digits", "--source", "x"], "--source and --name are for MNIST"),
        (["--dataset", "digits", "--name", "x"], "--source and --name are for MNIST"),
        (["--name", "My data"], "--name: 'My data': use small letters"),
        (["--name", "digits"], "--name: 'digits': .* are taken"),
        (["--verify", "--out", "/nonexistent"], "/nonexistent/manifest.json is missing"),
    ],
)
def test_bad_usage(arguments: list[str], words: str, capsys) -> None:
    assert_refused(capsys, run(*arguments), words)


def test_folder_that_cannot_be_made(idx_root: Path, tmp_path: Path, capsys) -> None:
    status = run("--source", idx_root, "--out", "/proc/data_prep")
    assert_refused(capsys, status, "cannot write /proc/data_prep: No such file")
    (tmp_path / "file").write_text("precious")
    status = run("--source", idx_root, "--out", tmp_path / "file")
    assert_refused(capsys, status, "cannot write .*file: (File exists|Not a directory)")
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write every folder")
def test_folder_that_cannot_be_written(idx_root: Path, tmp_path: Path, capsys) -> None:
    tmp_path.chmod(0o500)
    status = run("--source", idx_root, "--out", tmp_path)
    assert_refused(capsys, status, "cannot write .*: Permission denied")


def test_too_little_space(idx_root: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000_000))
    status = run("--source", idx_root, "--out", tmp_path / "new")
    assert_refused(capsys, status, "17 MB are needed there, 10 MB are free")
    assert not (tmp_path / "new").exists()


def test_locked_folder(out: Path, idx_root: Path, capsys, monkeypatch) -> None:
    (out / "test.beton").unlink()  # else nothing has to be written
    monkeypatch.setattr(staging, "LOCK_SECONDS", 0.3)
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status = run("--source", idx_root, "--out", out)
    error = capsys.readouterr().err
    assert status == 2
    assert "waiting for another process" in error
    assert "has been locked by another process for 0.3 seconds" in error


# Writers that fail


@pytest.fixture
def damaged(out: Path) -> Files:
    """What `out` holds before each failing writer: betons that have to be written again."""
    with (out / "test.beton").open("r+b") as file:
        file.truncate(1000)
    return contents(out)


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Makes the disk seem full for every file beyond `size` bytes, here and in children."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [10_000, 3_000_000])
def test_full_disk(size: int, out: Path, damaged: Files, idx_root: Path, capsys) -> None:
    """Met by this process, or by FFCV's worker process."""
    with file_size_limit(size):
        status = run("--source", idx_root, "--out", out)
    assert_refused(capsys, status, f"cannot write {out}: .*File too large")
    assert contents(out) == damaged


def _spoil_samples(spoiled: Callable[[], object]) -> None:
    sample = betons.Samples.__getitem__

    def get(self: betons.Samples, index: int) -> Any:
        if index == 20:
            spoiled()
        return sample(self, index)

    betons.Samples.__getitem__ = get  # type: ignore[method-assign]


def worker_dies(report: Report, folder: str) -> Any:
    _spoil_samples(lambda: os._exit(9))
    return betons.write_and_read_back(report, folder)


def worker_hangs(report: Report, folder: str) -> Any:
    _spoil_samples(lambda: os.kill(os.getpid(), signal.SIGSTOP))
    return betons.write_and_read_back(report, folder)


def writes_something_else(report: Report, folder: str) -> Any:
    """A beton that FFCV reads without complaint, with one wrong pixel."""
    write = betons._write_beton

    def write_wrong(report: Report, path: Path, samples: betons.Samples) -> None:
        images = samples.images.copy()
        images[-1, 0, 14, 14] ^= 1
        write(report, path, betons.Samples(images, samples.labels))

    betons._write_beton = write_wrong
    return betons.write_and_read_back(report, folder)


def use_child(
    monkeypatch: pytest.MonkeyPatch, child: Callable[..., Any], silence: float = 60.0
) -> None:
    """Lets `prepare` run `child` instead of FFCV's writer as it is.

    It may be silent so many seconds.
    """

    def run_other(target: str, arguments: list[str], _: Limits, *more: Any, **named: Any) -> Any:
        other = f"{__name__}:{child.__name__}"
        return run_watched(other, arguments, Limits(180.0, silence), *more, **named)

    monkeypatch.setattr(betons, "run_watched", run_other)


@pytest.mark.parametrize(
    "child, words",
    [
        (worker_dies, "a worker process ended with status 9"),
        (writes_something_else, "train.beton reads back different"),
        (worker_hangs, "no progress for 8 seconds"),
    ],
)
def test_failing_writer(
    child: Callable[..., Any],
    words: str,
    out: Path,
    damaged: Files,
    idx_root: Path,
    capsys,
    monkeypatch,
) -> None:
    before = shared_memory()
    use_child(monkeypatch, child, silence=8.0 if child is worker_hangs else 60.0)
    assert_refused(capsys, run("--source", idx_root, "--out", out), words)
    assert contents(out) == damaged
    left, deadline = shared_memory() - before, time.monotonic() + 60
    while left and time.monotonic() < deadline:  # tests beside this one have some for a while
        time.sleep(0.2)
        left &= shared_memory()
    assert not left


def shared_memory() -> set[str]:
    """Names of the shared memory that Python programs have on this machine."""
    return {name for name in os.listdir("/dev/shm") if name.startswith("psm_")}


def test_failure_leaves_no_new_folder(idx_root: Path, tmp_path: Path, capsys) -> None:
    with file_size_limit(10_000):
        status = run("--source", idx_root, "--out", tmp_path / "new")
    assert_refused(capsys, status, "File too large")
    assert not (tmp_path / "new").exists()


# Processes that are killed, and several at once


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "data_prep", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_writer(out: Path, parent: int) -> int:
    """The watched child, once it is there."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        if children and list(out.glob(".staging-*")):
            return int(children[0])
        time.sleep(0.02)
    raise AssertionError("no writer was started")


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stop_leaves_nothing(number: int, status: int, idx_root: Path, tmp_path: Path) -> None:
    process = start("--source", idx_root, "--out", tmp_path / "out")
    child = wait_for_writer(tmp_path / "out", process.pid)
    process.send_signal(number)
    printed = process.communicate(timeout=30)
    assert process.returncode == status
    assert printed == ("", "")
    assert ends(child, 30.0)  # by itself, if the signal came while it was being started
    assert not (tmp_path / "out").exists()


DIES = """
import os, signal, sys
from data_prep import __main__
moves, move = int(sys.argv.pop(1)), os.replace
def replace(source, target):
    global moves
    move(source, target)
    moves -= 1
    if not moves:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace
__main__.main(sys.argv[1:])
"""


def die_after_moves(moves: int, *arguments: object) -> None:
    """`python -m data_prep`, killed when it has moved so many of the three files into place."""
    command_line = [sys.executable, "-c", DIES, str(moves), *map(str, arguments)]
    done = subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize("moves", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_after_kills_two_at_once_repair_the_folder(
    moves: int, prepared: Path, idx_root: Path, tmp_path: Path
) -> None:
    """One is killed while it writes, one between its renames; two others then start at once."""
    out = tmp_path / "out"
    killed = start("--source", idx_root, "--out", out)
    child = wait_for_writer(out, killed.pid)
    killed.kill()
    killed.communicate(timeout=30)
    die_after_moves(moves, "--source", idx_root, "--out", out)
    assert len(list(out.glob("*.beton"))) == moves
    with pytest.raises(InputError, match=r"manifest.json is missing: run `python -m data_prep"):
        check(out)
    both = [start("--source", idx_root, "--out", out) for _ in range(2)]
    printed = [process.communicate(timeout=200) for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    assert printed[0][0] == printed[1][0]
    assert ends(child, 30.0)
    assert contents(out) == {
        **contents(prepared),
        "manifest.json": (out / "manifest.json").read_bytes(),
    }
    assert check(out) == load_manifest(prepared)


@pytest.mark.parametrize("moves", [0, pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_stop_between_renames_leaves_nothing(
    moves: int, idx_root: Path, tmp_path: Path, monkeypatch
) -> None:
    move, moved = os.replace, []

    def replace(source: Path, target: Path) -> None:
        if len(moved) == moves:
            raise SystemExit(143)
        moved.append(target)
        move(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(SystemExit):
        prepare("mnist", idx_root, tmp_path / "out", progress=False)
    assert len(moved) == moves
    assert not (tmp_path / "out").exists()


# Files of somebody else


@pytest.mark.parametrize(
    "names",
    [
        ("train.beton",),
        ("test.beton",),
        ("train.beton", "test.beton"),
        ("train.beton", "test.beton", ".staging-old/train.beton"),
        ("train.beton", "manifest.json"),
        ("manifest.json",),
    ],
)
def test_files_of_others_are_left_alone(
    names: tuple[str, ...], idx_root: Path, tmp_path: Path, capsys
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f'{{"name": "precious {name}"}}')
    status = run("--source", idx_root, "--out", tmp_path)
    assert_refused(capsys, status, r"(beton|manifest.json) is left as it is, .*--out")
    there = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert there == set(names)
    for name in names:
        assert (tmp_path / name).read_text() == f'{{"name": "precious {name}"}}'


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_manifest_is_left_alone(make, idx_root: Path, tmp_path: Path, capsys) -> None:
    make(tmp_path / "manifest.json")
    status = run("--source", idx_root, "--out", tmp_path)
    assert_refused(capsys, status, r"manifest.json")
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_other_betons_beside_a_killed_run_are_left_alone(
    prepared: Path, idx_root: Path, tmp_path: Path, capsys
) -> None:
    (tmp_path / "train.beton").write_text("precious")
    (tmp_path / ".staging-old").mkdir()
    shutil.copy(prepared / "manifest.json", tmp_path / ".staging-old")
    assert_refused(capsys, run("--source", idx_root, "--out", tmp_path), "train.beton is left as")
    assert (tmp_path / "train.beton").read_text() == "precious"
    assert (tmp_path / ".staging-old" / "manifest.json").exists()


@pytest.mark.parametrize("damage", ["", "cut", pytest.param("flipped", marks=pytest.mark.slow)])
def test_a_damaged_manifest_is_written_anew(
    damage: str, out: Path, prepared: Path, idx_root: Path
) -> None:
    path = out / "manifest.json"
    text = path.read_text()
    path.write_text(
        {"": "", "cut": text[:100], "flipped": text.replace("format", "gormat")}[damage]
    )
    assert prepare("mnist", idx_root, out, progress=False) == load_manifest(prepared)
    assert check(out)


# The check before training


def flip_a_byte(folder: Path) -> None:
    content = bytearray((folder / "train.beton").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "train.beton").write_bytes(content)


def swap(folder: Path) -> None:
    (folder / "train.beton").rename(folder / "other")
    (folder / "test.beton").rename(folder / "train.beton")
    (folder / "other").rename(folder / "test.beton")


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda folder: (folder / "test.beton").unlink(), "test.beton is missing"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
    "truncated": (lambda folder: os.truncate(folder / "test.beton", 99), "test.beton has 99 bytes"),
    "flipped": (flip_a_byte, "train.beton is not what was written"),
    "swapped": (swap, "train.beton (is not what was written|has)"),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_check_notices(fault: str, out: Path, capsys) -> None:
    spoil, words = SPOILT[fault]
    check(out)
    spoil(out)
    with pytest.raises(InputError, match=f"{words}.*run `python -m data_prep"):
        check(out)
    assert_refused(capsys, run("--verify", "--out", out), words)


def test_checksum_of_the_pair(prepared: Path) -> None:
    manifest = check(prepared)
    swapped = dataclasses.replace(manifest, train=manifest.test, test=manifest.train)
    assert re.fullmatch("[0-9a-f]{64}", data_sha256(manifest))
    assert data_sha256(manifest) != data_sha256(swapped)


def _set(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = value

    return change


BAD_MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "version": (_set("format", value=2), "format 2 instead of 1"),
    "unknown key": (_set("colour", value=1), "unknown key colour"),
    "unknown split key": (_set("test", "colour", value=1), "unknown key test.colour"),
    "missing key": (lambda document: document.pop("versions"), "no key versions"),
    "missing split key": (lambda document: document["train"].pop("bytes"), "no key train.bytes"),
    "dataset": (_set("dataset", value="../mnist"), "dataset"),
    "dataset's kind": (_set("dataset", value=1), "dataset"),
    "published": (_set("published", value=1), "published"),
    "shape": (_set("image_shape", value=[28, 28, 1]), "image_shape"),
    "split": (_set("train", value=[]), "train"),
    "path": (_set("train", "file", value="../train.beton"), "train.file"),
    "absolute path": (_set("test", "file", value="/etc/passwd"), "test.file"),
    "same file": (_set("test", "file", value="train.beton"), "test.file"),
    "bool": (_set("train", "samples", value=True), "train.samples"),
    "none": (_set("train", "bytes", value=0), "train.bytes"),
    "text": (_set("train", "samples", value="50"), "train.samples"),
    "not a number": (_set("test", "pixel_mean", value=float("nan")), "test.pixel_mean"),
    "short histogram": (_set("test", "label_histogram", value=[23]), "test.label_histogram"),
    "wrong sum": (_set("test", "label_histogram", value=[1] * 10), "test.label_histogram"),
    "checksum": (_set("test", "sha256", value="0" * 63), "test.sha256"),
    "checksums": (_set("source_checksums", value={"a": 1}), "source_checksums"),
}


@pytest.mark.parametrize("fault", BAD_MANIFESTS)
def test_manifest_is_read_strictly(fault: str, prepared: Path, tmp_path: Path) -> None:
    change, words = BAD_MANIFESTS[fault]
    document = json.loads((prepared / "manifest.json").read_text())
    change(document)
    (tmp_path / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=f"manifest.json is not a valid manifest .*{words}"):
        load_manifest(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "[" * 100_000, "\xff\xfe", '{"format": 1}']
)
def test_malformed_manifest(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match="is not a valid manifest"):
        load_manifest(tmp_path)


def test_the_remedy_names_the_command_that_wrote_it(prepared: Path, tmp_path: Path) -> None:
    text = (prepared / "manifest.json").read_text()
    assert json.loads(text)["published"] is False
    (tmp_path / "manifest.json").write_text(text.replace('"format": 1', '"format": 7'))
    with pytest.raises(InputError, match=r"--source ROOT --name custom --out .* the same files"):
        load_manifest(tmp_path)
    (tmp_path / "digits").mkdir()
    with pytest.raises(InputError, match=r"--dataset digits --out .*digits` to write it anew$"):
        load_manifest(tmp_path / "digits")
    with pytest.raises(InputError, match=r"--dataset NAME --out .*`, NAME being mnist or digits,"):
        load_manifest(tmp_path / "nothing")


def test_the_remedy_for_a_foreign_manifest_works(tmp_path: Path) -> None:
    out = tmp_path / "digits"
    out.mkdir()
    (out / "manifest.json").write_text("garbage")
    with pytest.raises(InputError, match=r"move it away, and run `.*--dataset digits --out"):
        load_manifest(out)
    (out / "manifest.json").rename(tmp_path / "away.json")
    assert run("--dataset", "digits", "--out", out) == 0


def test_manifest_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(InputError, match="not a regular file"):
        load_manifest(tmp_path)


# The real thing


def test_digits(small_betons: Path) -> None:
    manifest = check(small_betons)
    assert (manifest.dataset, manifest.published) == ("digits", True)
    assert (manifest.train.samples, manifest.test.samples) == (1437, 360)
    assert manifest.source_origin == "scikit-learn"


@pytest.mark.mnist
def test_mnist_from_the_shell(mnist_root: Path, tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = start("--source", mnist_root, "--out", tmp_path / "out")
    output, errors = process.communicate(timeout=200)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (process.returncode, errors) == (0, "")
    assert re.search("train +60,000.*\ntest +10,000", output)
    manifest = load_manifest(tmp_path / "out")
    assert manifest.published
    assert manifest.train.pixel_mean == pytest.approx(0.1307, abs=5e-5)
    assert manifest.train.pixel_sd == pytest.approx(0.3081, abs=5e-5)
    # Processor time: about the time from the shell, but the same on a busy machine.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60


@pytest.mark.mnist
def test_published_files(mnist_root: Path) -> None:
    source = sources.load_source("mnist", mnist_root)
    assert source.published
    assert [f"md5:{md5}" for md5 in source.checksums.values()] == list(KNOWN["mnist"])
    assert source.name == "mnist"
    assert np.bincount(source.train_labels).tolist() == [
        5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949
    ]  # fmt: skip


@pytest.mark.mnist
def test_compressed_published_files(mnist_root: Path, tmp_path: Path) -> None:
    raw, _ = sources.find_mnist() or pytest.fail("MNIST_ROOT is not looked into")
    for name in NAMES.values():
        if not (raw / f"{name}.gz").exists():
            pytest.skip(f"{name}.gz is not there")
        (tmp_path / f"{name}.gz").symlink_to(raw / f"{name}.gz")
    assert sources.load_source("mnist", tmp_path).published
