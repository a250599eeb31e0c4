"""What W&B gets to see: one offline run, read back from its .wandb file."""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

import helpers
import pytest
import wandb_file
import yaml
from PIL import Image
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from mnist_fast.cli import load
from mnist_fast.config import Config
from mnist_fast.errors import RunError
from mnist_fast.loop import train
from mnist_fast.tracking import Tracker
from mnist_fast.wandb_panels import SUMMARISED


def nested(items, into=None):
    """The values of history or summary items by key; later ones replace earlier ones."""
    values = {} if into is None else into
    for item in items:
        *path, last = item.nested_key or [item.key]
        place = values
        for key in path:
            if not isinstance(place.get(key), dict):
                place[key] = {}
            place = place[key]
        place[last] = json.loads(item.value_json)
    return values


class Board:
    """What the records of a run say, by kind; `folder` is W&B's own."""

    def __init__(self, folder):
        (path,) = folder.glob("*.wandb")
        self.files = path.parent / "files"
        self.records = []
        deadline = time.monotonic() + 30  # W&B's own process writes after `finish` has returned
        while not self.all("exit") and time.monotonic() < deadline:
            time.sleep(0.05)
            with contextlib.suppress(wandb_file.Damaged):
                self.records = list(wandb_file.read_records(path))
        self.run = next(r.run for r in self.records if r.HasField("run"))
        self.config = {u.key: json.loads(u.value_json) for u in self.run.config.update}
        self.history = [nested(line.item) for line in self.all("history")]
        self.summary = {}
        for update in self.all("summary"):
            nested(update.update, self.summary)

    def all(self, field):
        return [getattr(r, field) for r in self.records if r.HasField(field)]

    def artifacts(self):
        """Type, name and files (content by path) of every artifact."""
        for record in self.records:
            if record.request.HasField("log_artifact"):
                artifact = record.request.log_artifact.artifact
            elif record.HasField("artifact"):
                artifact = record.artifact
            else:
                continue
            yield (
                artifact.type,
                artifact.name,
                {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents},
            )

    def logged(self, key):
        (value,) = [line[key] for line in self.history if key in line]
        return value

    def table(self, key):
        return json.loads((self.files / self.logged(key)["path"]).read_text())


def train_quickly(betons, folder, *options, wandb="offline"):
    """Trains on the digits in this process, with W&B offline unless told otherwise."""
    arguments = ("--dataset", "digits", "--data_dir", betons, "--run_dir", folder)
    plain = ("--step", "eager", "--precision", "no", "--wandb", wandb)
    with helpers.single_process():
        return train(load([str(part) for part in (*arguments, *plain, *options)]))


OPTIONS = (
    *("--wandb_project", "p", "--wandb_entity", "e", "--wandb_group", "g"),
    *(
        "--wandb_name",
        "n",
        "--wandb_job_type",
        "j",
        "--wandb_tags",
        "a, b",
        "--wandb_notes",
        "n: o",
    ),
)
VARIABLES = {
    "WANDB_PROJECT": "project-v",
    "WANDB_ENTITY": "entity-v",
    "WANDB_RUN_GROUP": "group-v",
    "WANDB_NAME": "name-v",
    "WANDB_JOB_TYPE": "job-v",
    "WANDB_TAGS": "c,d",
    "WANDB_NOTES": "notes: v",
}


@contextlib.contextmanager
def environment(**variables):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WANDB_DATA_DIR")
        for name, value in variables.items():
            patch.setenv(name, str(value))
        yield


@pytest.fixture(scope="module")
def folder(small_betons, tmp_path_factory):
    """A run of two epochs inside a SLURM job; the variables say something else than its options."""
    folder = tmp_path_factory.mktemp("run") / "seen"
    slurm = {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "2"}
    with environment(**VARIABLES, **slurm, WANDB_MODE="disabled"):
        train_quickly(small_betons, folder, *OPTIONS, "--epochs", "2")
    return folder


def only_board(folder):
    """The only W&B run in the folder of a run."""
    (found,) = folder.glob("wandb/offline-run-*")
    return Board(found)


@pytest.fixture(scope="module")
def board(folder):
    return only_board(folder)


def names_of(run):
    """What W&B's file calls a run."""
    names = (run.project, run.entity, run.run_group, run.display_name, run.job_type)
    return (*names, list(run.tags), run.notes)


def test_options_win_over_variables(board):
    assert names_of(board.run) == ("p", "e", "g", "n", "j", ["a", "b"], "n: o")


def test_variables_reach_the_wandb_file(small_betons, tmp_path):
    """With a key `auto` would be online; WANDB_DIR alone does not count."""
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    mode = {"WANDB_MODE": "offline", "WANDB_API_KEY": "0" * 40, "WANDB_DIR": elsewhere}
    with environment(**VARIABLES, **mode):
        train_quickly(small_betons, folder, "--epochs", "1", wandb="auto")
    run = only_board(folder).run
    names = ("project-v", "entity-v", "group-v", "name-v", "job-v", ["c", "d"], "notes: v")
    assert names_of(run) == names
    assert not list(elsewhere.iterdir())


def test_config_is_resolved_and_tells_where_the_run_comes_from(board, folder):
    chosen = yaml.safe_load((folder / "config.yaml").read_text())
    resolved = helpers.read_summary(folder)
    for key in ("feed", "step", "precision", "data_sha256", "git_commit", "world_size"):
        assert board.config[key] == resolved[key]
    assert board.config["feed"] == "resident" != chosen["feed"]
    assert board.config["learning_rate"] == 0.1
    assert board.config["slurm"] == {"slurm_job_id": "77", "slurm_restart_count": "2"}


def test_history_is_metrics_jsonl(board, folder):
    epochs = [line for line in board.history if "train_loss" in line]
    records = helpers.read_records(folder)
    assert len(epochs) == len(records) == 2
    for line, record in zip(epochs, records, strict=True):
        numbers = {k: v for k, v in record.items() if not isinstance(v, str)}
        assert {k: v for k, v in line.items() if not k.startswith("_")} == numbers
        assert record["gradient_norm"] > 0


def test_steps_and_summaries_are_defined(board):
    metrics = {m.name or m.glob_name: m for m in board.all("metric")}
    assert metrics["*"].step_metric == metrics["test_accuracy"].step_metric == "epoch"
    assert metrics["learning_rate"].step_metric == "global_step"
    for name in SUMMARISED:
        wanted = metrics[name].summary
        assert (wanted.min, wanted.max, wanted.last) == (True, True, True), name


def extremes(values):
    return {"min": min(values), "max": max(values), "last": values[-1]}


def test_summary_has_min_max_and_last_beside_summary_json(board, folder):
    records, summary = helpers.read_records(folder), helpers.read_summary(folder)
    assert len({record["images_per_second"] for record in records}) == 2
    for name in SUMMARISED:
        assert board.summary[name] == extremes([record[name] for record in records]), name
    for key, value in summary.items():
        if not isinstance(value, dict):
            assert board.summary[f"final/{key}" if key in SUMMARISED else key] == value, key
    assert board.summary["test_accuracy"]["last"] == summary["test_accuracy"]


def test_layers_add_up(board):
    table = board.table("layers")
    counts = [row[table["columns"].index("parameters")] for row in table["data"]]
    assert sum(counts) == 7640


def test_confusion_matrix_counts_every_test_image(board):
    table = board.table("confusion_matrix_table")
    count = table["columns"].index("nPredictions")
    actual, predicted = table["columns"].index("Actual"), table["columns"].index("Predicted")
    assert sum(row[count] for row in table["data"]) == 360
    right = sum(row[count] for row in table["data"] if row[actual] == row[predicted])
    assert 100 * right / 360 == pytest.approx(board.summary["test_accuracy"]["last"])


def test_misread_digits_have_image_label_prediction_and_probability(board):
    table = board.table("misread")
    assert table["columns"] == ["position", "image", "label", "prediction", "probability"]
    wrong = 360 - round(3.6 * board.summary["test_accuracy"]["last"])
    assert len(table["data"]) == min(wrong, 100)
    for _, _, label, prediction, probability in table["data"]:
        assert label != prediction
        assert 0.1 <= probability <= 1
    assert [row[4] for row in table["data"]] == sorted((r[4] for r in table["data"]), reverse=True)
    ((_, _, files),) = [found for found in board.artifacts() if found[1].endswith("-misread")]
    images = [file for path, file in files.items() if path.endswith(".png")]
    assert 0 < len(images) <= len(table["data"])  # equal images are kept once
    with Image.open(images[0]) as image:
        assert image.size == (28, 28)


def test_an_augmented_batch_is_shown_before_training(board):
    image = board.logged("augmented_batch")
    assert (image["width"], image["height"]) == (8 * 29 - 1, 4 * 29 - 1)
    first = next(i for i, line in enumerate(board.history) if "train_loss" in line)
    assert any("augmented_batch" in line for line in board.history[:first])


def test_artifacts_hold_the_data_the_checkpoints_and_the_weights(board, folder):
    artifacts = {}
    for kind, name, files in board.artifacts():
        artifacts.setdefault(kind, []).append((name, files))
        # all that `wandb sync` needs lies with the run
        assert all(file.is_relative_to(folder) for file in files.values())
    (data,) = artifacts["dataset"]
    assert data[0] == "digits-betons"
    assert set(data[1]) == {"manifest.json"}
    assert len(artifacts["checkpoint"]) == 2
    ((name, files),) = artifacts["model"]
    assert name == f"model-{board.run.run_id}"
    kept = files["weights.safetensors"].read_bytes()
    assert kept == (folder / "weights.safetensors").read_bytes()


def test_the_same_run_goes_on_after_a_resume(small_betons, tmp_path):
    options = ("--recipe", "notebook", "--batch_size", "256")  # its schedule can be prolonged
    train_quickly(small_betons, tmp_path, *options, "--epochs", "1")
    (first,) = tmp_path.glob("wandb/offline-run-*")
    train_quickly(small_betons, tmp_path, *options, "--epochs", "2")
    (second,) = set(tmp_path.glob("wandb/offline-run-*")) - {first}
    ours, theirs = Board(first), Board(second)
    assert ours.run.run_id == theirs.run.run_id
    epochs = [[h["epoch"] for h in b.history if "train_loss" in h] for b in (ours, theirs)]
    assert epochs == [[1], [2]]
    rates = [record["images_per_second"] for record in helpers.read_records(tmp_path)]
    assert theirs.summary["images_per_second"] == extremes(rates)  # of both parts


# Without a run: a tracker whose W&B is a stand-in


class StandIn:
    """Records what a W&B run is asked for."""

    def __init__(self):
        self.alerts = []

    def log(self, step, values):
        pass

    def show(self, action):
        action(None, self)

    def alert(self, title, text, failed):
        self.alerts.append((title, text, failed))


@pytest.fixture
def tracker(runtime, tmp_path):
    tracker = Tracker(Config(wandb="disabled"), runtime, tmp_path)
    tracker.start({}, [], None)
    tracker._wandb = StandIn()
    return tracker


def test_one_alert_when_the_target_is_passed(tracker):
    for epoch, accuracy in enumerate([99.39, 99.4, 99.3, 99.5], start=1):
        tracker.log_epoch({"epoch": epoch, "test_accuracy": accuracy})
    ((title, text, _),) = tracker._wandb.alerts
    assert "99.4 %" in title
    assert "99.40 % in epoch 2" in text


def test_no_alert_for_other_data(tracker):
    tracker.log_epoch({"epoch": 1, "dataset": "digits", "test_accuracy": 99.9})
    assert tracker._wandb.alerts == []


def test_no_second_alert_after_a_requeue(tracker):
    tracker.start({}, [{"epoch": 1, "test_accuracy": 99.45}], None)
    tracker.log_epoch({"epoch": 2, "test_accuracy": 99.5})
    assert tracker._wandb.alerts == []


def test_a_loss_that_is_not_finite_alerts(small_betons, tmp_path):
    options = ("--learning_rate", "1000", "--schedule", "constant", "--epochs", "3")
    with pytest.raises(RunError, match="the loss is"):
        train_quickly(small_betons, tmp_path / "run", *options)
    (alert,) = only_board(tmp_path / "run").all("alert")
    assert (alert.title, alert.level) == ("Loss is not finite", "ERROR")


def test_a_folder_that_wandb_cannot_write_does_not_stop_the_run(runtime, tmp_path, capsys):
    (tmp_path / "wandb").write_text("a file where W&B wants a folder")
    tracker = Tracker(Config(wandb="offline"), runtime, tmp_path)
    tracker.start({}, [], None)
    tracker.log_epoch({"epoch": 1, "test_accuracy": 50.0})
    tracker.finish({"test_accuracy": 50.0})
    assert helpers.read_summary(tmp_path) == {"test_accuracy": 50.0}


# The sweep


@pytest.fixture
def trial():
    """What `wandb agent` would start for a trial: the command, its arguments filled in."""
    sweep = yaml.safe_load((helpers.ROOT / "sweep.yaml").read_text())
    low = {
        k: {"value": p.get("min", p.get("values", [None])[0])}
        for k, p in sweep["parameters"].items()
    }
    arguments = create_sweep_command_args({"args": low})["args"]
    filled = {"${env}": ["/usr/bin/env"]}
    filled |= {"${program}": [str(helpers.ROOT / sweep["program"])], "${args}": arguments}
    parts = create_sweep_command(sweep["command"])
    return sweep, [word for part in parts for word in filled.get(part, [part])]


def test_the_sweep_starts_accelerate_with_valid_options(trial):
    sweep, command = trial
    program = command.index(str(helpers.TRAIN))
    assert command[program - 2 : program] == ["accelerate", "launch"]
    config = load(command[program + 1 :])
    assert config.validation_split == 5000
    assert config.learning_rate == 0.03
    assert sweep["metric"] == {"name": "validation_accuracy", "goal": "maximize"}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_trial_of_the_sweep_runs(trial, processes, small_betons, tmp_path):
    """By accelerate as it stands; two processes on CPUs by torchrun, with the same options."""
    _, command = trial
    program = command.index(str(helpers.TRAIN))
    quick = ("--dataset", "digits", "--data_dir", small_betons, "--epochs", "1")
    quick += ("--step", "eager", "--precision", "no", "--validation_split", "200")
    quick += ("--run_dir", tmp_path / "run")
    agents = {"WANDB_MODE": "offline", "WANDB_SWEEP_ID": "s1", "WANDB_RUN_ID": "trial1"}
    if processes == 1:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = agents | {"PATH": path}
        done = helpers.launch(*command, *quick, cwd=tmp_path, timeout=200, environment=environment)
    else:
        done = helpers.torchrun(
            2, *command[program:], *quick, cwd=tmp_path, timeout=200, environment=agents
        )
    assert done.returncode == 0, done.stderr
    summary, board = helpers.read_summary(tmp_path / "run"), only_board(tmp_path / "run")
    assert summary["world_size"] == processes
    assert (board.run.run_id, board.config["learning_rate"]) == ("trial1", 0.03)
    assert board.summary["validation_accuracy"] == summary["validation_accuracy"]
    assert not (tmp_path / "wandb").exists()  # no other process started a run of its own
