"""Betons are read without FFCV's compiled loader, and hold for both the same samples."""

import json
import subprocess
import sys

import helpers
import numpy as np
import pytest
import torch
from ffcv import types
from ffcv.fields.ndarray import NDArrayArgsType
from ffcv.loader import Loader, OrderOption
from ffcv.reader import Reader

from mnist_fast.beton import Beton, layout
from mnist_fast.errors import InputError

SAMPLES = 1_437
HEADER, FIELD = types.HeaderType, types.FieldDescType


def read_by_ffcv(path, batch_size=512):
    """All images and labels through FFCV's own Loader with its own pipelines."""
    order = OrderOption.SEQUENTIAL
    loader = Loader(str(path), batch_size, num_workers=1, order=order, drop_last=False)
    batches = [[part.clone() for part in batch] for batch in loader]
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return images, labels.flatten()


def test_the_layout_is_ffcvs():
    ours = layout()
    assert ours.version == types.CURRENT_VERSION
    assert (ours.header, ours.field, ours.array) == (HEADER, FIELD, NDArrayArgsType)
    names = {number: kind.__name__ for number, kind in types.TYPE_ID_HANDLER.items() if kind}
    assert ours.fields == names | {255: "None"}


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_sample_is_what_ffcvs_loader_reads(small_betons, split):
    path = small_betons / f"{split}.beton"
    images, labels = Beton(path).read(range(Beton(path).samples))
    expected_images, expected_labels = read_by_ffcv(path)
    assert torch.equal(images, expected_images)
    assert torch.equal(labels, expected_labels)


@pytest.mark.mnist
def test_every_image_of_mnist_is_what_ffcvs_loader_reads(mnist_betons):
    """It takes many of FFCV's pages, with a gap between each and the next."""
    path = mnist_betons / "train.beton"
    images, labels = Beton(path).read(range(60_000))
    expected_images, expected_labels = read_by_ffcv(path, 8_192)
    assert torch.equal(images, expected_images)
    assert torch.equal(labels, expected_labels)


def test_what_is_known_of_a_beton_is_what_ffcvs_reader_knows(small_betons):
    path = small_betons / "train.beton"
    ours, theirs = Beton(path), Reader(str(path))
    assert ours.samples == theirs.num_samples
    assert ours.shape == theirs.handlers["image"].shape == (1, 28, 28)


def test_samples_that_lie_in_another_order_are_found(small_betons, tmp_path):
    """As several of FFCV's writers leave them: each sample's entry says where its image lies."""
    whole = small_betons / "train.beton"
    images, labels = Beton(whole).read(range(SAMPLES))
    content = bytearray(whole.read_bytes())
    head = HEADER.itemsize + 2 * FIELD.itemsize
    entries = np.frombuffer(content, "<u8,<i8", SAMPLES, head)
    order = np.random.default_rng(1).permutation(SAMPLES)
    content[head : head + entries.nbytes] = entries[order].tobytes()
    shuffled = tmp_path / "train.beton"
    shuffled.write_bytes(content)
    found, found_labels = Beton(shuffled).read(range(7, SAMPLES))
    assert torch.equal(found, images[order][7:])
    assert torch.equal(found_labels, labels[order][7:])


def test_reading_imports_neither_ffcv_nor_a_compiler(small_betons):
    program = (
        "import json, pathlib, sys, torch; from mnist_fast.data import read_all;"
        f"read_all(pathlib.Path({str(small_betons / 'train.beton')!r}), range(9),"
        "torch.device('cpu')); print(json.dumps(list(sys.modules)))"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=helpers.ROOT, capture_output=True, timeout=120, check=True)
    assert not {"ffcv", "numba", "llvmlite", "cv2"} & set(json.loads(done.stdout))


# Files that are no such betons


def edit(content, dtype, address, **values):
    """Sets values of a structure in a file's content."""
    part = np.frombuffer(content, dtype, 1, address).copy()
    for name, value in values.items():
        part[name] = value
    content[address : address + part.nbytes] = part.tobytes()


def set_version(content):
    edit(content, HEADER, 0, version=3)


def set_kind(content):
    edit(content, FIELD, HEADER.itemsize, type_id=3)


def set_floats(content):
    arguments = HEADER.itemsize + FIELD.fields["arguments"][1] + NDArrayArgsType.itemsize
    content[arguments : arguments + 14] = b'[["", "<f1"]] '


def cut_header(content):
    del content[10:]


def cut_entries(content):
    del content[HEADER.itemsize + 2 * FIELD.itemsize + 100 :]


def cut_images(content):
    del content[len(content) // 2 :]


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (set_version, "its format is 3, FFCV's is 2"),
        (set_kind, "it has BytesField image and IntField label, not"),
        (set_floats, r"its images are \[\['', '<f1'\]\], not bytes"),
        (cut_header, "it is cut short"),
        (cut_entries, "it is cut short"),
        (cut_images, "it is cut short"),
        (bytearray.clear, "it is cut short"),
    ],
)
def test_a_file_that_is_no_such_beton_is_refused_in_one_line(small_betons, tmp_path, damage, fault):
    path = tmp_path / "train.beton"
    content = bytearray((small_betons / "train.beton").read_bytes())
    damage(content)
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"train\.beton: {fault}.*: run `python") as caught:
        Beton(path).read(range(SAMPLES))
    assert "\n" not in str(caught.value)


def test_rows_beyond_the_end_are_refused(small_betons):
    with pytest.raises(InputError, match="it has 1,437 samples, not 1,438"):
        Beton(small_betons / "train.beton").read(range(1_438))


def test_a_file_that_is_missing_is_refused_in_one_line(tmp_path):
    with pytest.raises(InputError, match=r"train\.beton: it cannot be read: No such file"):
        Beton(tmp_path / "train.beton")
