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
import time

import helpers
import pytest
import torch
from safetensors.torch import load_file

from mnist_fast import checkpoint, run_folder, signals
from mnist_fast.checkpoint import Checkpoint, CorruptCheckpointError
from mnist_fast.config import Config
from mnist_fast.errors import InputError, RunError, Stopped

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
    return checkpoint.save(tmp_path / "checkpoints", make())


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
    path = checkpoint.save(tmp_path / "new" / "checkpoints", Checkpoint(TENSORS, STATE))
    found = checkpoint.load(path)
    assert path.name == "step-00000015"
    assert found.state == STATE
    assert found.tensors.keys() == TENSORS.keys()
    assert all(found.tensors[name].equal(TENSORS[name]) for name in TENSORS)


def test_two_are_kept_and_no_newer_one_is_touched(tmp_path):
    (tmp_path / "step-00000099").mkdir()  # not valid, so passed over
    for step in (12, 13, 14, 15):
        checkpoint.save(tmp_path, make(step))
    (tmp_path / ".writing-1").mkdir()
    checkpoint.save(tmp_path, make(16))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-00000015", "step-00000016", "step-00000099"]
    found, skipped = checkpoint.load_newest(tmp_path)
    assert found.state["global_step"] == 16
    assert "step-00000099" in skipped[0]
    assert "No such file" in skipped[0]


@pytest.mark.parametrize("name", [checkpoint.MANIFEST, checkpoint.STATE, checkpoint.TENSORS])
def test_no_flipped_bit_and_no_length_is_accepted(tmp_path, name):
    saved = checkpoint.save(tmp_path, make(config={}, epoch=0, records=[], global_step=3))
    path = saved / name
    content = path.read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << random.Random(position).randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CorruptCheckpointError, match=str(saved)):
            checkpoint.load(saved)
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(CorruptCheckpointError, match=str(saved)):
            checkpoint.load(saved)
    path.write_bytes(content + b" ")
    with pytest.raises(CorruptCheckpointError, match=str(saved)):
        checkpoint.load(saved)
    path.write_bytes(content)
    checkpoint.load(saved)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("payload-was-executed",)


def test_pickles_are_never_executed(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(Payload(), saved / checkpoint.TENSORS)
    rewrite(saved)
    with pytest.raises(CorruptCheckpointError, match=r"tensors\.safetensors: not readable"):
        checkpoint.load(saved)
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
        checkpoint.load(saved)


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
        checkpoint.load(saved)


def test_a_manifest_that_lists_other_files_is_refused(saved, tmp_path):
    manifest = json.loads((saved / checkpoint.MANIFEST).read_text())
    manifest["files"]["../../secret"] = {"bytes": 1, "sha256": "00" * 32}
    (saved / checkpoint.MANIFEST).write_bytes(checkpoint._manifest_text(manifest["files"]))
    with pytest.raises(CorruptCheckpointError, match="not as it was written"):
        checkpoint.load(saved)


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
            checkpoint.load(saved)
        target.rmdir() if target.is_dir() else target.unlink()
        target.write_bytes(content)
    link = saved.with_name("step-00000050")
    link.symlink_to(saved)
    found, skipped = checkpoint.load_newest(saved.parent)
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
        checkpoint.load(saved)


def wanted(**changes):
    keys = ("config", "data_sha256", "world_size", "device", "precision", "mode", "steps_per_epoch")
    return {key: STATE[key] for key in keys} | changes


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": "notebook"},
        {"run_dir": "elsewhere", "data_dir": "elsewhere", "resume": "auto"},
        {"wandb": "disabled", "wandb_name": "another", "feed": "stream", "process_timeout": 5},
        {"epochs": 20},  # the schedule is constant
    ],
)
def test_what_does_not_change_the_training_may_change(changes):
    checkpoint.check_same_training(STATE, wanted(config=STATE["config"] | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 2},
        {"network": "record"},
        {"learning_rate": 0.02},
        {"epochs": 1},  # it is over already
        {"unknown": 1},
    ],
)
def test_another_configuration_is_refused(changes):
    with pytest.raises(InputError, match=f"cannot resume.*{next(iter(changes))}"):
        checkpoint.check_same_training(STATE, wanted(config=STATE["config"] | changes))


def test_another_length_is_refused_where_the_schedule_knows_the_end():
    state = STATE | {"config": STATE["config"] | {"schedule": "onecycle"}}
    with pytest.raises(InputError, match="epochs 15, this run 20"):
        checkpoint.check_same_training(
            state, wanted(config=state["config"] | {"epochs": 20, "schedule": "onecycle"})
        )


@pytest.mark.parametrize(
    "change",
    [
        {"data_sha256": "cd" * 32},
        {"world_size": 2},
        {"device": "cuda"},
        {"precision": "bf16"},
        {"mode": "compiled"},
        {"steps_per_epoch": 11},
    ],
    ids=str,
)
def test_another_data_set_or_machine_is_refused(change):
    with pytest.raises(InputError, match=f"cannot resume.*{next(iter(change))}"):
        checkpoint.check_same_training(STATE, wanted(**change))


def test_tensors_of_another_network_are_refused():
    ours = {"a": torch.zeros(2, 3), "b": torch.zeros(1)}
    for other in ({"a": torch.zeros(3, 2)}, {"a": ours["a"].double()}, {"c": torch.zeros(1)}):
        with pytest.raises(InputError, match="tensor"):
            checkpoint.check_tensors(ours | other, ours)
    with pytest.raises(InputError, match="tensor b missing"):
        checkpoint.check_tensors({"a": ours["a"]}, ours)


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
    checkpoint.save(tmp_path, make(13))
    checkpoint.save(tmp_path, make(14))
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
        checkpoint.save(tmp_path, make(15))

    while forked(save) == -signal.SIGKILL:
        found, skipped = checkpoint.load_newest(tmp_path)
        assert not skipped
        step = found.state["global_step"]
        assert step in (14, 15)
        assert found.tensors["network/weight"].eq(step).all()
        if step == 15:  # so that the next one has the same to do
            shutil.rmtree(tmp_path / "step-00000015")
            checkpoint.save(tmp_path, make(13))
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
    checkpoint.save(folder, make(13))
    large = Checkpoint({"network/weight": torch.zeros(100_000)}, make(14).state)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(folder, large)
    assert [path.name for path in folder.iterdir()] == ["step-00000013"]
    assert checkpoint.load_newest(folder)[0].state["global_step"] == 13


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
    def lock_and_leave_a_child():
        run_folder.lock(tmp_path)
        if not os.fork():
            time.sleep(3)

    started = time.monotonic()
    assert forked(lock_and_leave_a_child) == 0
    run_folder.lock(tmp_path)
    run_folder.unlock(tmp_path)
    assert time.monotonic() - started < 2


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


OPTIONS = {
    "recipe": "notebook",
    "dataset": "digits",
    "epochs": 3,
    "dropout": 0.1,
    "ema_decay": 0.9,
    "rotation": 7.0,
    "brightness": 0.4,
    "step": "eager",
    "precision": "no",
    "wandb": "disabled",
    "threads": 1,
}


@pytest.fixture(scope="module")
def uninterrupted(small_betons, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    run(folder, small_betons)
    return folder


def run(folder, data, stop_at=None, **changes):
    """Trains in this process; a request to stop comes in the given step."""
    from mnist_fast.loop import train

    steps = iter(range(1, 1_000))
    choices = OPTIONS | {"run_dir": str(folder), "data_dir": str(data)} | changes
    with helpers.single_process(), pytest.MonkeyPatch.context() as patch:
        if stop_at:
            patch.setattr(signals, "requested", lambda: next(steps) == stop_at or None)
        return train(Config(**choices))


def same_weights(one, other):
    ours, theirs = (load_file(folder / "weights.safetensors") for folder in (one, other))
    return ours.keys() == theirs.keys() and all(ours[k].equal(theirs[k]) for k in ours)


@pytest.mark.parametrize(
    "step", [1, 12, 36, *(pytest.param(step, marks=pytest.mark.slow) for step in (7, 13))]
)
def test_a_stopped_run_ends_with_the_same_bits(uninterrupted, small_betons, tmp_path, step):
    with pytest.raises(Stopped, match=f"at step {step}"):
        run(tmp_path, small_betons, stop_at=step)
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "stopped"
    summary = run(tmp_path, small_betons)
    assert same_weights(tmp_path, uninterrupted)
    measured = ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "learning_rate")
    for ours, theirs in zip(*map(helpers.read_records, (tmp_path, uninterrupted)), strict=True):
        assert [ours[key] for key in measured] == [theirs[key] for key in measured]
    assert summary["best_epoch"] == helpers.read_summary(uninterrupted)["best_epoch"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("step", ["compiled", "native"])
def test_a_stopped_run_of_another_step_ends_with_the_same_bits(small_betons, tmp_path, step):
    changes = {"step": step, "epochs": 2}
    run(tmp_path / "one", small_betons, **changes)
    with pytest.raises(Stopped):
        run(tmp_path / "other", small_betons, stop_at=7, **changes)
    run(tmp_path / "other", small_betons, **changes)
    assert same_weights(tmp_path / "one", tmp_path / "other")


def test_resuming_between_epochs_gives_the_same_bits(uninterrupted, small_betons, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000036")
    (folder / "weights.safetensors").unlink()
    run(folder, small_betons)
    assert same_weights(folder, uninterrupted)


def test_a_damaged_newest_checkpoint_is_named_and_passed_over(
    uninterrupted, small_betons, tmp_path, capsys
):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    (folder / "checkpoints" / "step-00000036" / checkpoint.TENSORS).write_bytes(b"")
    (folder / "weights.safetensors").unlink()
    run(folder, small_betons)
    said = capsys.readouterr().out
    assert "skipped a checkpoint" in said
    assert f"step-00000036/{checkpoint.TENSORS}: 0 bytes instead of" in said
    assert same_weights(folder, uninterrupted)
    assert not checkpoint.load_newest(folder / "checkpoints")[1]


def test_nothing_is_promised_before_another_training_is_refused(
    uninterrupted, small_betons, tmp_path, capsys
):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    for path in checkpoint.newest_first(folder / "checkpoints"):
        (path / checkpoint.TENSORS).write_bytes(b"")
    with pytest.raises(InputError, match="holds a run with seed 1"):
        run(folder, small_betons, seed=2)
    assert "starting from the beginning" not in capsys.readouterr().out


def test_another_training_is_refused_in_a_run_folder(uninterrupted, small_betons, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    for changes in ({"seed": 2}, {"dropout": 0.2}, {"batch_size": 64}, {"resume": "never"}):
        with pytest.raises(InputError):
            run(folder, small_betons, **changes)
    with pytest.raises(InputError, match=r"--resume: .*No such file"):
        run(folder, small_betons, resume=str(tmp_path / "nothing"))


def test_tensors_that_do_not_fit_are_refused(uninterrupted, small_betons, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    newest = checkpoint.newest_first(folder / "checkpoints")[0]
    found = checkpoint.load(newest)
    for name in ("network/layers.0.weight", "optimizer/0/momentum_buffer", "process/0/totals"):
        shutil.rmtree(newest)
        odd = {name: torch.zeros(3)}
        checkpoint.save(folder / "checkpoints", Checkpoint(found.tensors | odd, found.state))
        with pytest.raises(InputError, match=f"tensor {name}"):
            run(folder, small_betons)
