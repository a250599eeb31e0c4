"""W&B's own file says what metrics.jsonl says; and W&B is never in training's way."""

import struct
import sys
import zlib

import pytest
import wandb_file
import yaml
from helpers import QUICK, read_records, read_summary, single_process
from wandb.proto.wandb_internal_pb2 import Record
from wandb_file import BLOCK, Damaged

from mnist_fast import wandb_files, wandb_run
from mnist_fast.cli import load
from mnist_fast.loop import train
from mnist_fast.wandb_panels import SUMMARISED


@pytest.fixture(scope="module")
def launched(launched_run):
    """The run folder that a real launch left."""
    folder, done = launched_run
    assert done.returncode == 0, done.stderr
    (run,) = (folder / "runs").iterdir()
    return run


@pytest.fixture(scope="module")
def records(launched):
    """The records of its .wandb file."""
    return list(wandb_file.read_records(wandb_file.find(launched)))


def epochs_of(records):
    """What was logged with each epoch, without W&B's own keys."""
    lines = [wandb_file.plain(r.history.item) for r in records if r.HasField("history")]
    return [
        {key: value for key, value in line.items() if not key.startswith("_")}
        for line in lines
        if "train_loss" in line  # tables and pictures have lines of their own
    ]


def test_the_wandb_file_equals_metrics_jsonl(records, launched):
    expected = [
        {key: value for key, value in record.items() if not isinstance(value, str)}
        for record in read_records(launched)
    ]
    assert len(expected) == 2
    assert {"train_loss", "test_accuracy", "learning_rate"} < expected[0].keys()
    assert epochs_of(records) == expected


def test_the_wandb_file_holds_the_resolved_configuration(records, launched):
    (run,) = [record.run for record in records if record.HasField("run")]
    config = wandb_file.plain(run.config.update)
    chosen = yaml.safe_load((launched / "config.yaml").read_text())
    facts = read_summary(launched)  # what `auto` came to
    for key, value in chosen.items():
        assert config[key] == facts.get(key, value), key
    assert run.project == "mnist_fast"
    assert run.display_name == launched.name


def test_the_wandb_file_holds_the_summary(records, launched):
    found = {}
    for record in records:
        if record.HasField("summary"):
            found |= wandb_file.plain(record.summary.update)
    epochs, over_epochs = read_records(launched), SUMMARISED
    for key, value in read_summary(launched).items():
        if not isinstance(value, dict):
            assert found[f"final/{key}" if key in over_epochs else key] == value, key
    for name in over_epochs:
        values = [epoch[name] for epoch in epochs]
        assert found[name] == {"min": min(values), "max": max(values), "last": values[-1]}, name


def test_the_wandb_file_says_that_the_run_succeeded(records):
    (exit_record,) = [record.exit for record in records if record.HasField("exit")]
    assert exit_record.exit_code == 0


# Without W&B


def run(betons, folder, *options):
    """One epoch on the digits."""
    arguments = [*QUICK, "--data_dir", betons, "--run_dir", folder, "--epochs", 1, *options]
    with single_process():
        return train(load([str(word) for word in arguments]))


@pytest.fixture(scope="module")
def disabled(small_betons, tmp_path_factory):
    folder = tmp_path_factory.mktemp("disabled") / "run"
    return folder, run(small_betons, folder, "--wandb", "disabled")


def assert_same_result(folder, summary, disabled):
    """Training went on as if W&B had never been asked for."""
    assert summary["test_accuracy"] == disabled[1]["test_accuracy"]
    assert summary["test_loss"] == disabled[1]["test_loss"]
    assert read_summary(folder) == summary
    assert len(read_records(folder)) == 1
    ours, theirs = ((f / "weights.safetensors").read_bytes() for f in (folder, disabled[0]))
    assert ours == theirs  # the files too, whatever the order in which they were written


def test_disabled_writes_nothing_of_wandbs(disabled):
    names = {path.name for path in disabled[0].rglob("*")}
    assert not [name for name in names if "wandb" in name]
    assert "metrics.jsonl" in names


def test_a_wandb_that_cannot_be_imported_is_done_without(
    disabled, small_betons, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    summary = run(small_betons, tmp_path, "--wandb", "online")
    assert "W&B cannot be imported" in capsys.readouterr().out
    assert_same_result(tmp_path, summary, disabled)


def test_a_wandb_that_cannot_start_is_done_without(
    disabled, small_betons, tmp_path, monkeypatch, capsys
):
    def fail(*_):
        raise RuntimeError("no room for W&B\nwith details")

    monkeypatch.setattr(wandb_run.WandbRun, "_init", fail)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    summary = run(small_betons, tmp_path, "--wandb", "online")
    said = capsys.readouterr().out
    assert "W&B online failed: no room for W&B with details\n" in said
    assert "W&B offline failed" in said
    assert "training goes on without W&B" in said
    assert_same_result(tmp_path, summary, disabled)


# The reader itself


def log_file(records):
    """A .wandb file with the given records, cut into pieces as LevelDB does."""
    content = bytearray(struct.pack("<4sHB", b":W&B", 0xBEE1, 0))
    for record in records:
        data, first = record.SerializeToString(), True
        while data or first:
            room = BLOCK - len(content) % BLOCK - 7
            if room < 0:
                content += bytes(room + 7)
                continue
            piece, data = data[:room], data[room:]
            kind = {(1, 1): 1, (1, 0): 2, (0, 0): 3, (0, 1): 4}[first, not data]
            checksum = zlib.crc32(bytes([kind]) + piece)
            content += struct.pack("<IHB", checksum, len(piece), kind) + piece
            first = False
    return bytes(content)


@pytest.fixture
def many(tmp_path):
    """Records of all sizes around a block's, and their file."""
    records = [Record(num=n) for n in range(1, 40)]
    for record, size in zip(records, range(0, 200_000, 5_003), strict=False):
        record.output_raw.line = "x" * size
    path = tmp_path / "run-1.wandb"
    path.write_bytes(log_file(records))
    return path, records


def test_the_reader_puts_pieces_together(many):
    path, records = many
    assert path.stat().st_size > 100 * BLOCK
    assert list(wandb_file.read_records(path)) == records


@pytest.mark.parametrize("where", [2, 30, 10_000, -1])
def test_the_reader_notices_a_flipped_bit(many, where):
    path, _ = many
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)
    with pytest.raises(Damaged):
        list(wandb_file.read_records(path))


def test_the_reader_notices_a_missing_end(many):
    path, _ = many
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(Damaged):
        list(wandb_file.read_records(path))


# The reader that a run itself uses


def test_it_yields_what_the_other_reader_does(many):
    path, records = many
    found = [Record.FromString(data) for data, _ in wandb_files.whole_records(path.read_bytes())]
    assert found == records


@pytest.mark.parametrize("size", [0, 7, 20, BLOCK - 1, BLOCK, BLOCK + 3, 5 * BLOCK - 1])
def test_it_ends_before_a_record_that_is_cut_off(many, size):
    path, records = many
    content = path.read_bytes()[:size]
    found = list(wandb_files.whole_records(content))
    assert [Record.FromString(data) for data, _ in found] == records[: len(found)]
    end = found[-1][1] if found else wandb_files.HEADER_SIZE
    path.write_bytes(content[:end].ljust(wandb_files.HEADER_SIZE, b"\0"))
    if size >= wandb_files.HEADER_SIZE:
        assert list(wandb_file.read_records(path)) == records[: len(found)]


def test_a_damaged_record_ends_it(many):
    path, records = many
    content = bytearray(path.read_bytes())
    content[10_000] ^= 1
    assert 0 < len(list(wandb_files.whole_records(bytes(content)))) < len(records)
