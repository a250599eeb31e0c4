"""Checkpoints, the lock on a run's folder, and resuming: what is on disk is never trusted."""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys

import helpers
import pytest
import torch

from mnist_fast import checkpoint, run_folder
from mnist_fast.checkpoint import Checkpoint, CorruptCheckpointError
from mnist_fast.config import Config
from mnist_fast.errors import InputError, RunError, Stopped
from mnist_fast.resume import check_state

RECORD = {
    "epoch": 1,
    "dataset": "digits",
    "train_loss": 0.5,
    "train_accuracy": 80.0,
    "test_loss": 0.6,
    "test_accuracy": 79.5,
    "epoch_seconds": 1.5,
    "images_per_second": 900.0,
    "gradient_norm": None,
}
STATE = {
    "config": Config().as_dict(),
    "data_sha256": "ab" * 32,
    "world_size": 1,
    "device": "cpu",
    "precision": "no",
    "mode": "eager",
    "steps_per_epoch": 12,
    "epoch": 1,
    "step": 3,
    "global_step": 15,
    "epoch_seconds": 0.25,
    "records": [RECORD],
    "scaler": {},
    "wandb_id": "abc123",
}
TENSORS = {"network/weight": torch.arange(6.0).view(2, 3), "process/0/cpu": torch.get_rng_state()}


def make(step=15, **changes):
    state = STATE | {"step": step - 12, "global_step": step} | changes
    return Checkpoint({"network/weight": torch.full((2, 3), float(step))}, state)


@pytest.fixture
def saved(tmp_path):
    return checkpoint.save(tmp_path / "checkpoints", make(), check_state)


def rewrite(path, **contents):
    """Replaces files of a checkpoint, with a manifest that fits them."""
    for name, content in contents.items():
        (path / {"state": checkpoint.STATE, "tensors": checkpoint.TENSORS}[name]).write_bytes(
            content
        )
    files = {}
    for name in (checkpoint.TENSORS, checkpoint.STATE):
        content = (path / name).read_bytes()
        files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / checkpoint.MANIFEST).write_bytes(checkpoint._manifest_text(files))


def test_what_is_saved_is_loaded(tmp_path):
    path = checkpoint.save(
        tmp_path / "new" / "checkpoints", Checkpoint(TENSORS, STATE), check_state
    )
    found = checkpoint.load(path, check_state)
    assert path.name == "step-00000015"
    assert found.state == STATE
    assert found.tensors.keys() == TENSORS.keys()
    assert all(found.tensors[name].equal(TENSORS[name]) for name in TENSORS)


def test_two_are_kept_and_no_newer_one_is_touched(tmp_path):
    (tmp_path / "step-00000099").mkdir()  # not valid, so passed over
    for step in (12, 13, 14, 15):
        checkpoint.save(tmp_path, make(step), check_state)
    (tmp_path / ".writing-1").mkdir()
    checkpoint.save(tmp_path, make(16), check_state)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-00000015", "step-00000016", "step-00000099"]
    found, skipped = checkpoint.load_newest(tmp_path, check_state)
    assert found.state["global_step"] == 16
    assert "step-00000099" in skipped[0]
    assert "No such file" in skipped[0]


@pytest.mark.parametrize("name", [checkpoint.MANIFEST, checkpoint.STATE, checkpoint.TENSORS])
def test_no_flipped_bit_and_no_length_is_accepted(tmp_path, name):
    saved = checkpoint.save(
        tmp_path, make(config={}, epoch=0, records=[], global_step=3), check_state
    )
    path = saved / name
    content = path.read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << random.Random(position).randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CorruptCheckpointError, match=str(saved)):
            checkpoint.load(saved, check_state)
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(CorruptCheckpointError, match=str(saved)):
            checkpoint.load(saved, check_state)
    path.write_bytes(content + b" ")
    with pytest.raises(CorruptCheckpointError, match=str(saved)):
        checkpoint.load(saved, check_state)
    path.write_bytes(content)
    checkpoint.load(saved, check_state)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("payload-was-executed",)


def test_pickles_are_never_executed(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(Payload(), saved / checkpoint.TENSORS)
    rewrite(saved)
    with pytest.raises(CorruptCheckpointError, match=r"tensors\.safetensors: not readable"):
        checkpoint.load(saved, check_state)
    assert not (tmp_path / "payload-was-executed").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        (2**62).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (64).to_bytes(8, "little")
        + b'{"a":{"dtype":"F32","shape":[9999999],"data_offsets":[0,4]}}'.ljust(64)
        + bytes(4),
    ],
)
def test_hostile_tensors_are_refused(saved, content):
    rewrite(saved, tensors=content)
    with pytest.raises(CorruptCheckpointError, match=r"tensors\.safetensors: not readable"):
        checkpoint.load(saved, check_state)


@pytest.mark.parametrize(
    "manifest",
    [
        b"[]",
        b"null",
        b"[" * 9_000,
        b'{"format": 2, "files": []}',
        b'{"format": 2, "files": {"../state.json": {"bytes": 1, "sha256": "00"}}}',
        b" " * 20_000,
    ],
)
def test_hostile_manifests_are_refused(saved, manifest):
    (saved / checkpoint.MANIFEST).write_bytes(manifest)
    with pytest.raises(CorruptCheckpointError, match=r"manifest\.json"):
        checkpoint.load(saved, check_state)


def test_a_manifest_that_lists_other_files_is_refused(saved, tmp_path):
    manifest = json.loads((saved / checkpoint.MANIFEST).read_text())
    manifest["files"]["../../secret"] = {"bytes": 1, "sha256": "00" * 32}
    (saved / checkpoint.MANIFEST).write_bytes(checkpoint._manifest_text(manifest["files"]))
    with pytest.raises(CorruptCheckpointError, match="not as it was written"):
        checkpoint.load(saved, check_state)


def test_links_pipes_and_folders_are_refused(saved, tmp_path):
    target = saved / checkpoint.STATE
    content = target.read_bytes()
    (tmp_path / "elsewhere").write_bytes(content)
    for put in (
        lambda: target.symlink_to(tmp_path / "elsewhere"),
        lambda: os.mkfifo(target),
        target.mkdir,
    ):
        target.unlink()
        put()
        with pytest.raises(CorruptCheckpointError, match=r"state\.json"):
            checkpoint.load(saved, check_state)
        target.rmdir() if target.is_dir() else target.unlink()
        target.write_bytes(content)
    link = saved.with_name("step-00000050")
    link.symlink_to(saved)
    found, skipped = checkpoint.load_newest(saved.parent, check_state)
    assert found.state == make().state
    assert "symbolic link" in skipped[0]


WRONG = [
    {"epoch": -1},
    {"epoch": True},
    {"step": 13},
    {"global_step": 16},
    {"steps_per_epoch": 0},
    {"records": []},
    {"records": [RECORD, RECORD]},
    {"records": [RECORD | {"epoch": 2}]},
    {"records": [RECORD | {"epoch_seconds": "1"}]},
    {"records": [RECORD | {"epoch_seconds": float("nan")}]},
    {"records": [RECORD | {"more": []}]},
    {"records": ["record"]},
    {"epoch_seconds": float("inf")},
    {"epoch_seconds": None},
    {"config": None},
    {"wandb_id": "../../elsewhere"},
    {"wandb_id": 1},
    {"more": 1},
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_state_is_checked(saved, wrong):
    rewrite(saved, state=json.dumps(STATE | wrong).encode())
    with pytest.raises(CorruptCheckpointError, match=r"state\.json"):
        checkpoint.load(saved, check_state)


# Every stage of a save


def forked(action):
    """Runs an action in a child process; returns how that ended, negative: by which signal."""
    child = os.fork()
    if not child:
        try:
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_kill_at_any_stage_of_a_save_leaves_a_valid_checkpoint(tmp_path):
    checkpoint.save(tmp_path, make(13), check_state)
    checkpoint.save(tmp_path, make(14), check_state)
    stages = 0

    def save():
        calls = 0

        def look(event, _arguments):
            nonlocal calls
            if event.startswith(("open", "os.", "shutil.")) and event != "os.kill":
                calls += 1
                if calls > stages:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(look)
        checkpoint.save(tmp_path, make(15), check_state)

    while forked(save) == -signal.SIGKILL:
        found, skipped = checkpoint.load_newest(tmp_path, check_state)
        assert not skipped
        step = found.state["global_step"]
        assert step in (14, 15)
        assert found.tensors["network/weight"].eq(step).all()
        if step == 15:  # so that the next one has the same to do
            shutil.rmtree(tmp_path / "step-00000015")
            checkpoint.save(tmp_path, make(13), check_state)
        stages += 1
    assert stages > 15
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000014", "step-00000015"]


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a file system of that many kB, and the folder where it lies."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size, *options):
        more = ",".join((f"size={size}k", *options))
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", more, "tmpfs", folder], timeout=20)
        if done.returncode:
            pytest.skip("mounting a small file system needs root")
        return folder

    yield mount
    subprocess.run(["umount", "-l", folder], timeout=20, stderr=subprocess.DEVNULL)


def test_a_full_disk_leaves_the_earlier_checkpoint(small_disk):
    folder = small_disk(64) / "checkpoints"
    checkpoint.save(folder, make(13), check_state)
    large = Checkpoint({"network/weight": torch.zeros(100_000)}, make(14).state)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(folder, large, check_state)
    assert [path.name for path in folder.iterdir()] == ["step-00000013"]
    assert checkpoint.load_newest(folder, check_state)[0].state["global_step"] == 13


# The run's folder


HOLD = """
import sys, time
from pathlib import Path
from mnist_fast import run_folder
run_folder.lock(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(60)
"""


def test_a_folder_is_locked_as_long_as_its_process_lives(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, cwd=helpers.ROOT
    )
    try:
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(InputError, match="another process trains in"):
            run_folder.lock(tmp_path)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    run_folder.lock(tmp_path)
    run_folder.unlock(tmp_path)


def test_a_child_that_lives_on_does_not_keep_the_lock(tmp_path):
    reader, writer = os.pipe()

    def lock_and_leave_a_child():
        os.close(writer)
        run_folder.lock(tmp_path)
        if not os.fork():
            os.read(reader, 1)  # until the test closes the other end

    assert forked(lock_and_leave_a_child) == 0
    run_folder.lock(tmp_path)
    run_folder.unlock(tmp_path)
    os.close(writer)
    os.close(reader)


def test_a_read_only_folder_is_refused_in_one_line(small_disk):
    folder = small_disk(64, "ro")
    for action in (run_folder.lock, run_folder.make_new):
        with pytest.raises(InputError, match="Read-only file system: choose"):
            action(folder / "run")


def test_new_folders_get_numbers(tmp_path):
    wanted = tmp_path / "runs" / "name"
    made = [run_folder.make_new(wanted).name for _ in range(3)]
    assert made == ["name", "name-2", "name-3"]


@pytest.mark.parametrize(
    "error, status, raised",
    [
        (None, "finished", None),
        (Stopped("on request"), "stopped", Stopped),
        (RunError("a fault"), "failed", RunError),
        (KeyboardInterrupt(), "failed", KeyboardInterrupt),
        (OSError(errno.ENOSPC, "No space left on device", "metrics"), "failed", RunError),
    ],
)
def test_the_status_says_how_a_run_ended(tmp_path, monkeypatch, error, status, raised):
    monkeypatch.setenv("SLURM_JOB_ID", "17")

    def read():
        return json.loads((tmp_path / "status.json").read_text())

    def run():
        with run_folder.reporting(tmp_path, active=True):
            assert read()["status"] == "running"
            if error is not None:
                raise error

    if raised:
        with pytest.raises(raised):
            run()
    else:
        run()
    assert (read()["status"], read()["job"]) == (status, "17.0")


def test_choices_that_are_refused_leave_the_status_of_an_earlier_run(tmp_path):
    def refuse():
        with pytest.raises(InputError), run_folder.reporting(tmp_path, active=True):
            raise InputError("other epochs")

    refuse()
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "failed"
    run_folder.write_status(tmp_path, "finished")
    before = (tmp_path / "status.json").read_bytes()
    refuse()
    assert (tmp_path / "status.json").read_bytes() == before


# Resuming
