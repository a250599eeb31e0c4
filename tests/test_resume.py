"""Whether a run may go on from a checkpoint, and that it ends with the same bits."""

import errno
import json
import os
import shutil

import helpers
import pytest
import torch
from safetensors.torch import load_file
from test_checkpoint import STATE

from mnist_fast import checkpoint, resume, signals
from mnist_fast.checkpoint import Checkpoint
from mnist_fast.config import Config
from mnist_fast.errors import InputError, Stopped
from mnist_fast.resume import Identity, check_state


def wanted(**changes):
    keys = ("config", "data_sha256", "world_size", "device", "precision", "mode", "steps_per_epoch")
    return Identity(**({key: STATE[key] for key in keys} | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": "notebook"},
        {"run_dir": "elsewhere", "data_dir": "elsewhere", "resume": "auto"},
        {"wandb": "disabled", "wandb_name": "another", "feed": "stream", "process_timeout": 5},
        {"epochs": 20},  # the schedule is constant
        {"threads": 8},
    ],
)
def test_what_does_not_change_the_training_may_change(changes):
    resume.check_same_training(STATE, wanted(config=STATE["config"] | changes))


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
        resume.check_same_training(STATE, wanted(config=STATE["config"] | changes))


def test_another_length_is_refused_where_the_schedule_knows_the_end():
    state = STATE | {"config": STATE["config"] | {"schedule": "onecycle"}}
    with pytest.raises(InputError, match="epochs 15, this run 20"):
        resume.check_same_training(
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
        resume.check_same_training(STATE, wanted(**change))


def test_tensors_of_another_network_are_refused():
    ours = {"a": torch.zeros(2, 3), "b": torch.zeros(1)}
    for other in ({"a": torch.zeros(3, 2)}, {"a": ours["a"].double()}, {"c": torch.zeros(1)}):
        with pytest.raises(InputError, match="tensor"):
            resume.check_tensors(ours | other, ours)
    with pytest.raises(InputError, match="tensor b missing"):
        resume.check_tensors({"a": ours["a"]}, ours)


@pytest.mark.parametrize(
    ("mode", "changes", "line"),
    [
        ("eager", {}, None),
        ("eager", {"threads": 8}, "threads 0 before, 8 now"),
        ("native", {"threads": 8}, None),  # its sums have one order
        ("eager", {"step": "eager"}, None),  # the mode is the same
    ],
)
def test_other_rounding_is_told(mode, changes, line):
    found = resume.different_rounding(STATE, wanted(mode=mode, config=STATE["config"] | changes))
    assert found is None if line is None else line in found


def test_every_choice_says_what_it_affects():
    """What may differ when a run goes on, what tells two runs apart: both follow from it."""
    from mnist_fast.config import FIELDS, names_affecting, what_is_trained

    kinds = [names_affecting(kind) for kind in ("result", "rounding", "nothing")]
    assert set.union(*kinds) == set(FIELDS)
    assert sum(map(len, kinds)) == len(FIELDS)
    kept = what_is_trained(Config().as_dict())
    assert {"learning_rate", "threads", "recipe", "dataset"} <= kept.keys()
    assert not {"seed", "run_dir", "wandb", "feed"} & kept.keys()


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
    assert not checkpoint.load_newest(folder / "checkpoints", check_state)[1]


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
    found = checkpoint.load(newest, check_state)
    for name in ("network/layers.0.weight", "optimizer/0/momentum_buffer", "process/0/totals"):
        shutil.rmtree(newest)
        odd = {name: torch.zeros(3)}
        checkpoint.save(
            folder / "checkpoints", Checkpoint(found.tensors | odd, found.state), check_state
        )
        with pytest.raises(InputError, match=f"tensor {name}"):
            run(folder, small_betons)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
@pytest.mark.parametrize("chosen", [True, False], ids=["option", "machine"])
def test_another_number_of_threads_goes_on_and_says_so(
    small_betons, tmp_path, capsys, monkeypatch, chosen
):
    """As a job does that is queued again on a node with other cores."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(Stopped):
        run(tmp_path, small_betons, stop_at=13, threads=0)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    run(tmp_path, small_betons, threads=2 if chosen else 0)
    line = "the last bits may differ from those of a run without a stop: threads 1 before, 2 now"
    assert line in capsys.readouterr().out


def test_the_same_threads_by_another_choice_are_no_difference(small_betons, tmp_path, capsys):
    with pytest.raises(Stopped):
        run(tmp_path, small_betons, stop_at=13, threads=0)
    run(tmp_path, small_betons, threads=1)  # the tests' OMP_NUM_THREADS
    assert "last bits" not in capsys.readouterr().out


def test_a_folder_that_cannot_be_read_is_refused_in_one_line(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "checkpoints")

    monkeypatch.setattr(checkpoint, "load_newest", refuse)
    with pytest.raises(InputError, match=r"^checkpoints: Permission denied: check its perm"):
        resume.find(Config(), tmp_path, print)


def test_another_mode_is_refused_with_the_option_that_keeps_it():
    with pytest.raises(InputError, match=f"mode {STATE['mode']}, .*: add --step {STATE['mode']},"):
        resume.check_same_training(STATE, wanted(mode="compiled"))


def test_a_scalers_state_goes_through_the_checkpoint(small_betons, tmp_path, monkeypatch):
    """fp16 needs a GPU: a scaler that only remembers stands in for torch's."""
    from mnist_fast.runtime import Runtime

    kept, loaded = {"scale": 512.0, "_growth_tracker": 7}, []
    monkeypatch.setattr(Runtime, "scaler_state", lambda _: kept)
    monkeypatch.setattr(Runtime, "load_scaler_state", lambda _, state: loaded.append(state))
    with pytest.raises(Stopped):
        run(tmp_path, small_betons, stop_at=5)
    run(tmp_path, small_betons)
    assert loaded == [kept]
