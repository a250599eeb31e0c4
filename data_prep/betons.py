"""Writes the two betons and reads them back; the work with FFCV happens in a watched child."""

import hashlib
import math
import os
import platform
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data_prep.manifest import (
    CLASSES,
    FORMAT,
    IMAGE_SHAPE,
    MANIFEST_NAME,
    SPLITS,
    Manifest,
    Split,
    check,
    data_sha256,
    is_foreign,
    load_manifest,
    remedy,
)
from data_prep.sources import Source, find_mnist, load_source
from data_prep.staging import Staging, staging
from data_prep.watched import Limits, Report, WorkFailed, run_watched
from mnist_fast.errors import InputError
from mnist_fast.imports import plain_dictionaries

__all__ = [
    "Manifest",
    "Split",
    "check",
    "data_sha256",
    "default_folder",
    "load_manifest",
    "prepare",
    "verify",
]

LIMITS = Limits(first=180.0, then=30.0)  # to import FFCV, for 1,000 samples

_PAGE_BYTES = 1 << 21  # FFCV's smallest page: a small data set makes a small file
_BATCH = 1000  # samples; only sets how often progress is reported


def default_folder(dataset: str) -> Path:
    """Where the betons of a data set go unless told otherwise."""
    return Path("data") / "betons" / dataset


def prepare(
    dataset: str = "mnist",
    source: Path | None = None,
    out: Path | None = None,
    progress: bool = True,
    name: str | None = None,
) -> Manifest:
    """Writes `train.beton`, `test.beton` and `manifest.json`, unless valid ones are there already.

    Fields of a beton: `image`, uint8 (1, 28, 28), and `label`, an integer from 0 to 9. The same
    source gives byte-identical betons. Everything is written to a temporary folder, read back
    through FFCV, compared with the source and only then renamed, the manifest last.

    Args:
        dataset: `mnist`, `digits`, or `auto` for MNIST if it is to be had and the digits if not.
        source: folder, archive or file of the data, see `load_source`.
        out: folder to write, by default `default_folder` of the data set that is used.
        progress: show a progress bar (on a terminal) and say where the betons are.
        name: what to call data that has no published checksums, instead of `custom`.

    Raises:
        InputError: no or bad source files, `out` holds something else, or writing failed.
    """
    out = Path(out) if out else None
    manifest = None if name else _already_prepared(dataset, source, out)
    if manifest is None:
        images = load_source(dataset, source, name)
        folder = out or default_folder(images.name)
        manifest = _valid_manifest(folder, images)
        if manifest is None:
            return _write(images, folder, progress)
    if progress:
        folder = out or default_folder(manifest.dataset)
        print(f"data_prep: {folder} is up to date", file=sys.stderr, flush=True)
    return manifest


def verify(folder: Path, progress: bool = True) -> Manifest:
    """Checks both betons and reads every sample through FFCV to compare it with the manifest.

    Raises:
        InputError: anything differs.
    """
    manifest = check(folder)
    samples = sum(split.samples for split in manifest.splits().values())
    try:
        with _bar("reading", samples, progress) as bar:
            read = run_watched("data_prep.betons:read_betons", [str(folder)], LIMITS, bar.update)
    except WorkFailed as failure:
        raise InputError(f"{folder} cannot be read by FFCV: {failure}") from None
    for name, split in manifest.splits().items():
        for key, value in read[name].items():
            if value != getattr(split, key):
                raise InputError(
                    f"{Path(folder) / split.file}: {key} is {value} but {getattr(split, key)} in "
                    f"{MANIFEST_NAME}: {remedy(folder, manifest.dataset, manifest.published)}"
                )
    return manifest


def _already_prepared(dataset: str, source: Path | None, out: Path | None) -> Manifest | None:
    """MNIST betons that are valid, where no MNIST files are at hand that could differ from them.

    They need no source: it may have been somewhere else, or downloaded, when they were written.
    """
    if source is not None or dataset not in ("mnist", "auto") or find_mnist() is not None:
        return None
    try:
        manifest = check(out or default_folder("mnist"))
    except InputError:
        return None
    return manifest if manifest.dataset == "mnist" else None


def _valid_manifest(out: Path, source: Source) -> Manifest | None:
    """The manifest in `out` if its betons are valid and come from `source`; None if to be written.

    Raises:
        InputError: the manifest is of another data set or of other source files.
    """
    try:
        there = load_manifest(out)
    except InputError:
        return None
    if there.dataset != source.name:
        raise InputError(
            f"{out} holds the betons of {there.dataset}: use another folder with --out"
        )
    if there.source_checksums != source.checksums:
        raise InputError(
            f"{out} holds betons of other {source.name} files than the given ones: "
            "use another folder with --out, or delete that one first"
        )
    try:
        return check(out)
    except InputError:
        return None


def _write(source: Source, out: Path, progress: bool) -> Manifest:
    with staging(out, partial(_make_way, out)) as stage:
        manifest = _valid_manifest(out, source)  # another process may have been at work
        if manifest is not None:
            return manifest
        _require_space(stage.folder, source)
        _hand_over(source, stage.folder)
        statistics = _run_writer(source, stage, out, progress)
        manifest = _describe(source, statistics, stage.folder)
        (stage.folder / MANIFEST_NAME).write_text(manifest.to_json())
        _publish(stage.folder, out)
    return manifest


def _make_way(out: Path, leftovers: list[Path]) -> None:
    """Removes betons that a killed run had moved to `out`, their manifest not yet.

    That manifest still lies in one of the `leftovers`, the temporary folders of such runs. Called
    before those are removed, so that being killed here leaves nothing that cannot be told.

    Raises:
        InputError: there are other betons, or a manifest, that nobody here wrote.
    """
    manifest = out / MANIFEST_NAME
    if is_foreign(out):
        _refuse(manifest, "it is not one of data_prep")
    paths = [out / f"{split}.beton" for split in SPLITS]
    orphans = [path for path in paths if os.path.lexists(path)]
    if not orphans or manifest.exists():
        return
    if not any(_came_from(leftover, orphans) for leftover in leftovers):
        _refuse(orphans[0], f"no {MANIFEST_NAME} says that data_prep wrote it")
    for path in orphans:
        path.unlink()


def _refuse(path: Path, reason: str) -> NoReturn:
    raise InputError(
        f"{path} is left as it is, {reason}: move it away, or use another folder with --out"
    )


def _came_from(leftover: Path, orphans: list[Path]) -> bool:
    """Whether the manifest in a temporary folder describes the betons."""
    try:
        splits = load_manifest(leftover).splits()
    except InputError:
        return False
    return all(path.is_file() and _sha256(path) == splits[path.stem].sha256 for path in orphans)


def _require_space(folder: Path, source: Source) -> None:
    images = source.train_images.nbytes + source.test_images.nbytes
    # Once to hand over, once as betons, which have 40 bytes more per sample and some pages' rest.
    needed = int(2.1 * images) + 2 * 4 * _PAGE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"cannot write {folder.parent}: {needed / 1e6:,.0f} MB are needed there, "
            f"{free / 1e6:,.0f} MB are free"
        )


def _hand_over(source: Source, folder: Path) -> None:
    """Writes the plain arrays that the child process maps into its memory."""
    for split in SPLITS:
        for kind in ("images", "labels"):
            array = np.ascontiguousarray(getattr(source, f"{split}_{kind}"))
            (folder / f"{split}.{kind}").write_bytes(array.data)


def _run_writer(source: Source, stage: Staging, out: Path, progress: bool) -> dict[str, Any]:
    samples = len(source.train_images) + len(source.test_images)
    try:
        with _bar("writing and reading back", 2 * samples, progress) as bar:
            # The child holds the lock too: should this process be killed, nobody else starts
            # before the child has noticed and ended.
            return run_watched(
                "data_prep.betons:write_and_read_back",
                [str(stage.folder)],
                LIMITS,
                bar.update,
                held_files=[stage.lock],
            )
    except WorkFailed as failure:
        raise InputError(f"cannot write {out}: the FFCV writer failed: {failure}") from None


def _bar(description: str, total: int, progress: bool) -> "tqdm[Any]":
    # None: shown on a terminal only.
    hidden = None if progress else True
    return tqdm(desc=description, total=total, unit=" images", disable=hidden, leave=False)


def _describe(source: Source, statistics: dict[str, Any], folder: Path) -> Manifest:
    splits = {}
    for split in SPLITS:
        path = folder / f"{split}.beton"
        size, sha256 = path.stat().st_size, _sha256(path)
        splits[split] = Split(file=path.name, bytes=size, sha256=sha256, **statistics[split])
    return Manifest(
        format=FORMAT,
        dataset=source.name,
        published=source.published,
        image_shape=IMAGE_SHAPE,
        source_origin=source.origin,
        source_checksums=source.checksums,
        versions={
            "python": platform.python_version(),
            "ffcv": version("ffcv"),
            "numpy": version("numpy"),
        },
        **splits,
    )


def _publish(folder: Path, out: Path) -> None:
    """Moves the files into place, safely on disk, the manifest last.

    Killed in between, the old manifest (or none) does not fit the new betons: `check` says so.
    The new manifest is then still in `folder`, by which `_make_way` knows the betons. Where it is
    only stopped, or fails, no betons without a manifest stay.
    """
    names = [f"{split}.beton" for split in SPLITS] + [MANIFEST_NAME]
    for name in names:
        _sync(folder / name)
    _sync(folder)
    try:
        for name in names:
            os.replace(folder / name, out / name)
    except BaseException:
        if not (out / MANIFEST_NAME).exists():
            for name in names:
                (out / name).unlink(missing_ok=True)
        raise
    _sync(out)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# What follows runs in the child process.


class Samples:
    """The dataset as FFCV's writer wants it: image (1, 28, 28) and label by index."""

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        return self.images[index], int(self.labels[index])


def write_and_read_back(report: Report, folder: str) -> dict[str, Any]:
    """Writes both betons in `folder` and compares all samples; returns each split's statistics."""
    _import_ffcv()
    report(0)
    samples = {}
    for path in _beton_paths(folder):
        images = np.fromfile(path.with_suffix(".images"), np.uint8).reshape(-1, *IMAGE_SHAPE)
        labels = np.fromfile(path.with_suffix(".labels"), np.uint8)
        samples[path] = Samples(images, labels)
        _write_beton(report, path, samples[path])
    # Only now, because reading starts threads and writing forks.
    return {path.stem: _read_back(report, path, samples[path]) for path in samples}


def read_betons(report: Report, folder: str) -> dict[str, Any]:
    """Reads every sample of both betons in `folder`; returns each split's statistics."""
    _import_ffcv()
    report(0)
    return {path.stem: _read_back(report, path) for path in _beton_paths(folder)}


def _import_ffcv() -> None:
    with plain_dictionaries():  # most of the time goes here
        import ffcv  # noqa: F401


def _beton_paths(folder: str) -> list[Path]:
    return [Path(folder) / f"{split}.beton" for split in SPLITS]


def _write_beton(report: Report, path: Path, samples: Samples) -> None:
    import ffcv.writer
    from ffcv.fields import IntField, NDArrayField

    class Progress:
        """Takes the place of FFCV's own progress bar."""

        def __init__(self, total: int) -> None:
            self.update, self.close = report, lambda: None

    ffcv.writer.tqdm = Progress
    fields = {"image": NDArrayField(np.dtype("uint8"), IMAGE_SHAPE), "label": IntField()}
    # One worker: two would be no faster for this little data, and share out pages by chance, so
    # that the same samples would give another file each time.
    writer = ffcv.writer.DatasetWriter(str(path), fields, page_size=_PAGE_BYTES, num_workers=1)
    with _failing_workers_raise():
        writer.from_indexed_dataset(samples, chunksize=_BATCH)


@contextmanager
def _failing_workers_raise() -> Iterator[None]:
    """Raises when a worker process of FFCV fails, for which FFCV itself would wait for ever."""

    def look(_signal: int, _frame: object) -> None:
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[1]:
                    code = os.waitstatus_to_exitcode(ended[1])
                    raise WorkFailed(f"a worker process ended with status {code}")

    previous = signal.signal(signal.SIGCHLD, look)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, previous)


def _read_back(report: Report, path: Path, expected: Samples | None = None) -> dict[str, Any]:
    """Reads every sample through FFCV and returns the statistics that the manifest holds.

    Raises:
        WorkFailed: a sample differs from `expected`.
    """
    position = 0
    histogram = np.zeros(CLASSES, np.int64)
    pixels = np.zeros(256, np.int64)
    for images, labels in _loader(str(path)):
        # Views of buffers that FFCV uses again: all is done with them here.
        labels = labels.reshape(-1)
        batch = slice(position, position + len(labels))
        if expected is not None and not (
            np.array_equal(images, expected.images[batch])
            and np.array_equal(labels, expected.labels[batch])
        ):
            raise WorkFailed(f"{path.name} reads back different from what was written")
        histogram += np.bincount(labels, minlength=CLASSES)
        pixels += np.bincount(images.reshape(-1), minlength=256)
        position += len(labels)
        report(len(labels))
    if expected is not None and position != len(expected):
        raise WorkFailed(f"{path.name} has {position} samples instead of {len(expected)}")
    mean, sd = _moments(pixels.tolist())
    return {
        "samples": position,
        "label_histogram": tuple(histogram.tolist()),
        "pixel_mean": mean,
        "pixel_sd": sd,
    }


def _loader(path: str) -> Any:
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.ndarray import NDArrayDecoder
    from ffcv.loader import Loader, OrderOption

    return Loader(
        path,
        batch_size=_BATCH,
        num_workers=1,
        order=OrderOption.SEQUENTIAL,
        drop_last=False,
        pipelines={"image": [NDArrayDecoder()], "label": [IntDecoder()]},
    )


def _moments(histogram: list[int]) -> tuple[float, float]:
    """Mean and standard deviation, 0 to 1, from the number of pixels of each of 256 values.

    In whole numbers up to the last step, so that they are the same on every machine.
    """
    count = sum(histogram)
    total = sum(value * number for value, number in enumerate(histogram))
    squares = sum(value**2 * number for value, number in enumerate(histogram))
    return total / (255 * count), math.sqrt(count * squares - total**2) / (255 * count)
