"""Whole runs in this process, on the digits: what they leave, and what they depend on."""

import dataclasses
import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from helpers import (
    QUICK,
    RECORD_KEYS,
    SUMMARY_KEYS,
    read_records,
    read_summary,
    single_process,
)
from safetensors import safe_open
from safetensors.torch import load_file

from data_prep.sources import load_digits
from mnist_fast import checkpoint, datasets, loop
from mnist_fast import config as config_module
from mnist_fast.augment import augment, derive_key
from mnist_fast.cli import load
from mnist_fast.data import epoch_order
from mnist_fast.errors import InputError, RunError
from mnist_fast.figures import NAMES as figure_names
from mnist_fast.loop import train
from mnist_fast.model import build_network
from mnist_fast.records import Evaluation
from mnist_fast.runtime import set_threads
from mnist_fast.schedule import learning_rate


def run(betons, folder, *options, figures=False):
    """Trains on the digits; later options win."""
    arguments = [*QUICK, "--data_dir", betons, "--run_dir", folder, "--epochs", 2, *options]
    with single_process(figures):
        return train(load([str(word) for word in arguments]))


@pytest.fixture(scope="module")
def finished(small_betons, tmp_path_factory):
    """A run that learns the digits, its folder and its summary."""
    folder = tmp_path_factory.mktemp("runs") / "learns"
    return folder, run(small_betons, folder, "--epochs", 8, "--batch_size", 64, figures=True)


@pytest.fixture(scope="module")
def short(small_betons, tmp_path_factory):
    """Folder of a run of two epochs with everything random: augmentation and dropout."""
    folder = tmp_path_factory.mktemp("runs") / "short"
    run(small_betons, folder, "--recipe", "notebook", "--learning_rate", 0.1)
    return folder


def weights_of(folder):
    return load_file(folder / "weights.safetensors")


def same_weights(one, other):
    one, other = weights_of(one), weights_of(other)
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# What a run leaves


def test_it_learns(finished):
    summary = finished[1]
    assert summary["test_accuracy"] > 85
    assert summary["test_images"] == 360


def test_the_summary_is_the_contracts(finished):
    folder, summary = finished
    assert read_summary(folder) == summary
    assert summary.keys() >= SUMMARY_KEYS
    expected = {"recipe": "fast", "dataset": "digits", "parameters": 7640, "seed": 1, "epochs": 8}
    expected |= {"world_size": 1, "precision": "no", "feed": "resident", "step": "eager"}
    assert {key: summary[key] for key in expected} == expected
    assert {"python", "torch", "accelerate", "ffcv"} <= summary["versions"].keys()
    assert summary["versions"]["torch"] == torch.__version__.split("+")[0]
    assert len(summary["data_sha256"]) == 64


def test_the_summary_follows_from_the_records(finished):
    folder, summary = finished
    records = read_records(folder)
    accuracies = [record["test_accuracy"] for record in records]
    assert summary["test_accuracy"] == accuracies[-1]
    assert summary["best_test_accuracy"] == max(accuracies)
    assert summary["best_epoch"] == accuracies.index(max(accuracies)) + 1
    seconds = [record["epoch_seconds"] for record in records]
    assert summary["train_seconds"] == pytest.approx(sum(seconds))
    assert summary["images_per_second"] == pytest.approx(8 * 1_408 / sum(seconds))
    assert summary["startup_seconds"] > 0


def test_the_last_epoch_and_the_best_are_told_apart(small_betons, tmp_path, monkeypatch):
    results = iter([Evaluation(0.5, accuracy, 360) for accuracy in (50.0, 90.0, 70.0)])
    monkeypatch.setattr(datasets, "evaluate", lambda *_: next(results))
    summary = run(small_betons, tmp_path, "--epochs", 3)
    assert summary["test_accuracy"] == 70
    assert (summary["best_test_accuracy"], summary["best_epoch"]) == (90, 2)


def test_each_epoch_has_one_record(finished):
    folder, _ = finished
    records = read_records(folder)
    assert [record["epoch"] for record in records] == list(range(1, 9))
    for record in records:
        assert record.keys() >= RECORD_KEYS
        assert record["dataset"] == "digits"
        assert 0 <= record["train_accuracy"] <= 100
        # of 1,437 images 22 batches of 64 are trained on
        assert record["images_per_second"] * record["epoch_seconds"] == pytest.approx(1_408)
        hits = record["test_accuracy"] / 100 * 360
        assert hits == pytest.approx(round(hits), abs=1e-6)


def test_the_learning_rate_is_that_of_each_epochs_last_step(finished):
    chosen = load(["--config", str(finished[0] / "config.yaml")])
    for record in read_records(finished[0]):
        expected = learning_rate(chosen, record["epoch"] * 22 - 1, 22)
        assert record["learning_rate"] == pytest.approx(expected)
        assert record["global_step"] == record["epoch"] * 22


def test_the_weights_alone_give_the_accuracy(finished):
    """Evaluated here by a plain forward pass over the images that were written."""
    folder, summary = finished
    network = build_network("notebook")
    network.load_state_dict(weights_of(folder))
    source = load_digits()
    images = (torch.from_numpy(source.test_images).unsqueeze(1).float() / 255 - 0.1307) / 0.3081
    labels = torch.from_numpy(source.test_labels).long()
    with torch.no_grad():
        scores = network.eval()(images)
    hits = (scores.argmax(1) == labels).sum().item()
    assert 100 * hits / 360 == summary["test_accuracy"]
    assert F.nll_loss(scores, labels).item() == pytest.approx(summary["test_loss"], rel=1e-4)
    with safe_open(folder / "weights.safetensors", "pt") as file:
        checksum = checkpoint.digest(weights_of(folder))
        expected = {"network": "notebook", "dataset": "digits", "sha256": checksum}
        assert file.metadata() == expected


def test_the_resolved_configuration_lies_with_the_run(finished):
    chosen = yaml.safe_load((finished[0] / "config.yaml").read_text())
    assert list(chosen) == [field.name for field in dataclasses.fields(config_module.Config)]
    assert (chosen["epochs"], chosen["batch_size"], chosen["schedule"]) == (8, 64, "onecycle")


def test_checkpoints_and_figures_lie_with_the_run(finished):
    folder = finished[0]
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {
        "step-00000154",
        "step-00000176",
    }
    assert any((folder / "figures").iterdir())
    assert not list(folder.glob(".*tmp*"))


def test_a_finished_run_is_left_as_it_is(finished, small_betons, capsys):
    folder, summary = finished
    before = {path: path.read_bytes() for path in folder.rglob("*.json*")}
    again = run(small_betons, folder, "--epochs", 8, "--batch_size", 64)
    assert again == summary
    assert "nothing to do" in capsys.readouterr().out
    kept = {path: before[path] for path in before if path.name != "status.json"}
    assert {path: path.read_bytes() for path in kept} == kept


@pytest.mark.parametrize(
    "name, content",
    [
        ("summary.json", "{cut"),
        ("summary.json", '{"epochs": 2, "test_accuracy": 1.0}'),  # written before W&B's end
        ("summary.json", None),
        ("weights.safetensors", None),
    ],
)
def test_an_end_that_is_damaged_is_made_again(short, small_betons, tmp_path, name, content):
    folder = tmp_path / "run"
    shutil.copytree(short, folder)
    (folder / name).unlink() if content is None else (folder / name).write_text(content)
    run(small_betons, folder, "--recipe", "notebook", "--learning_rate", 0.1)
    summary = read_summary(folder)
    assert summary["seconds"]
    assert summary["test_accuracy"] == read_summary(short)["test_accuracy"]
    assert same_weights(short, folder)


def test_an_end_that_failed_is_not_taken_for_the_earlier_one(
    short, small_betons, tmp_path, monkeypatch
):
    """A run was finished, went on for another epoch, and failed when it wrote its results."""
    folder, options = tmp_path / "run", ("--recipe", "notebook", "--learning_rate", 0.1)
    options = (*options, "--epochs", 3)
    shutil.copytree(short, folder)

    def fill_disk(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_weights", fill_disk)
        with pytest.raises(RunError, match=f"No space left.*: free space.* --run_dir {folder}"):
            run(small_betons, folder, *options)
    assert run(small_betons, folder, *options)["epochs"] == 3
    run(small_betons, tmp_path / "whole", *options)
    assert same_weights(tmp_path / "whole", folder)


def test_each_run_of_a_program_has_the_threads_that_were_asked_for(
    small_betons, tmp_path, monkeypatch
):
    """Native steps leave torch a single one."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    for name in ("one", "two"):
        summary = run(small_betons, tmp_path / name, "--step", "native", "--threads", 0)
        assert summary["device"].endswith("2 threads")


@pytest.mark.parametrize("asked", ["0", "2147483648", "many", "", "9999"])
def test_threads_that_cannot_be_had_are_not_taken(monkeypatch, asked):
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    before = torch.get_num_threads()
    try:
        set_threads(0)
        assert torch.get_num_threads() == len(os.sched_getaffinity(0))
    finally:
        torch.set_num_threads(before)


def test_a_run_from_another_folders_checkpoint_has_all_pictures(short, small_betons, tmp_path):
    """Also one whose pictures were deleted."""
    (first, *_) = sorted((short / "checkpoints").iterdir())
    options = ("--recipe", "notebook", "--learning_rate", 0.1, "--resume", first)
    run(small_betons, tmp_path / "run", *options, figures=True)
    drawn = {path.stem for path in (tmp_path / "run" / "figures").iterdir()}
    assert drawn == set(figure_names)


# What a run depends on


def test_the_feed_does_not_matter(short, small_betons, tmp_path):
    options = ("--recipe", "notebook", "--learning_rate", 0.1, "--feed", "stream")
    assert run(small_betons, tmp_path, *options)["feed"] == "stream"
    assert same_weights(short, tmp_path)
    for one, other in zip(read_records(short), read_records(tmp_path), strict=True):
        for key in RECORD_KEYS - {"epoch_seconds", "images_per_second"}:
            assert one[key] == other[key], key


def test_the_seed_matters(short, small_betons, tmp_path):
    run(small_betons, tmp_path, "--recipe", "notebook", "--learning_rate", 0.1, "--seed", 2)
    assert not same_weights(short, tmp_path)


def test_a_run_is_the_loop_of_a_text_book(small_betons, tmp_path):
    """Weights after two epochs, trained here from the seed on with torch alone."""
    options = ("--recipe", "fast", "--schedule", "step", "--step_epochs", 1, "--drop_last", "false")
    options += ("--learning_rate", 0.004, "--seed", 5, "--ema_decay", 0.9)
    run(small_betons, tmp_path, *options)
    chosen = load(["--config", str(tmp_path / "config.yaml")])
    source = load_digits()
    images = torch.from_numpy(source.train_images).unsqueeze(1)
    labels = torch.from_numpy(source.train_labels).long()
    torch.manual_seed(derive_key(5, 0, "weights"))
    network = build_network("notebook").to(memory_format=torch.channels_last)
    averaged = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = torch.optim.SGD(network.parameters(), 0.004, momentum=0.9, nesterov=True)
    for epoch in range(2):
        optimizer.param_groups[0]["lr"] = 0.004 * 0.1**epoch
        key = torch.tensor(derive_key(5, epoch, "augment"))
        for positions in torch.arange(1_437).split(128):
            rows = epoch_order(5, epoch, 1_437)[positions]
            optimizer.zero_grad()
            inputs = augment(chosen, images[rows], positions, key)
            F.cross_entropy(network.logits(inputs), labels[rows]).backward()
            optimizer.step()
            for name, value in network.state_dict().items():
                if value.is_floating_point():
                    averaged[name] = 0.9 * averaged[name] + 0.1 * value
    for name, value in weights_of(tmp_path).items():
        if value.is_floating_point():
            difference = (value - averaged[name]).norm() / averaged[name].norm()
            assert difference < 1e-3, name


def test_held_out_images_take_the_place_of_the_test_set(small_betons, tmp_path, monkeypatch):
    opened = []
    read_all = datasets.read_all
    monkeypatch.setattr(datasets, "read_all", lambda *a: opened.append(a[:2]) or read_all(*a))
    summary = run(small_betons, tmp_path, "--validation_split", 337)
    train_beton = small_betons / "train.beton"
    assert opened == [(train_beton, range(1_100)), (train_beton, range(1_100, 1_437))]
    assert summary["validation_images"] == 337
    for values in (summary, *read_records(tmp_path)):
        assert "validation_accuracy" in values
        assert not [key for key in values if key.startswith("test_")]


# Folders


def test_new_runs_get_new_folders_named_for_the_data_set(small_betons, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        arguments = [*QUICK, "--data_dir", str(small_betons), "--epochs", "1", "--seed", "4"]
        with single_process():
            train(load(arguments))
    folders = sorted((tmp_path / "runs").iterdir())
    assert len(folders) == 2
    for folder in folders:
        assert folder.name.startswith("fast-digits-seed4-")
        assert len(read_records(folder)) == 1


# What is refused before anything is trained


@pytest.fixture
def damaged(small_betons, tmp_path):
    """A copy of the betons to damage."""
    return shutil.copytree(small_betons, tmp_path / "betons")


def truncate(folder):
    path = folder / "train.beton"
    path.write_bytes(path.read_bytes()[:-1])


def flip(folder):
    path = folder / "test.beton"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def swap(folder):
    (folder / "train.beton").rename(folder / "x")
    (folder / "test.beton").rename(folder / "train.beton")
    (folder / "x").rename(folder / "test.beton")


def lose(folder):
    (folder / "test.beton").unlink()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (truncate, "train.beton has .* bytes but"),
        (flip, "test.beton .* sha256 differs"),
        (swap, "train.beton has .* bytes but"),
        (lose, "test.beton is missing"),
    ],
)
def test_damaged_betons_are_refused(damaged, tmp_path, damage, named):
    damage(damaged)
    with pytest.raises(InputError, match=named):
        run(damaged, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--batch_size", 2_000), "batch_size 2000 is larger than the 1437 training images"),
        (("--batch_size", 1_436, "--drop_last", "false"), "the last batch of 1 images"),
        (("--validation_split", 1_437), "validation_split 1437 leaves 0 of 1437 .*: hold out"),
        (("--validation_split", 1_436), "validation_split 1436 leaves 1 of 1437 .*: hold out"),
        (("--precision", "fp16"), "fp16 needs a GPU"),
        (("--step", "captured"), "captured: it needs a GPU"),
        (("--step", "other"), "--step other: unknown, the modes are auto, eager, .*, fused"),
        (("--network", "other"), "network other: unknown, the networks are notebook, record"),
        (("--resume", "absent"), "--resume: .*absent"),
    ],
)
def test_choices_that_do_not_fit_are_refused(small_betons, tmp_path, options, named):
    if "GPU" in named and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(InputError, match=named):
        run(small_betons, tmp_path, *options)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_the_folder_of_the_betons_names_the_data_set(small_betons, tmp_path):
    """Not --dataset, which need not be given with it: what is judged as MNIST is MNIST."""
    from data_prep.betons import load_manifest

    folder = Path(shutil.copytree(small_betons, tmp_path / "betons"))
    mine = dataclasses.replace(load_manifest(folder), dataset="my-digits")
    (folder / "manifest.json").write_text(mine.to_json())
    summary = run(folder, tmp_path / "run", "--dataset", "mnist")
    assert summary["dataset"] == "my-digits"
    assert read_records(tmp_path / "run")[-1]["dataset"] == "my-digits"


def test_a_runs_folder_is_no_checkpoint(short, small_betons, tmp_path):
    """Nothing is made for the run that was to go on from it."""
    newest = max((short / "checkpoints").iterdir())
    with pytest.raises(InputError, match=f"is a run's folder: name a checkpoint, such as {newest}"):
        run(small_betons, tmp_path / "run", "--resume", short)
    assert not (tmp_path / "run").exists()


def test_data_that_was_missing_is_named_with_its_folder(tmp_path, capsys):
    """A misspelt --data_dir would train on something else without a word."""
    run(tmp_path / "betons", tmp_path / "run", "--dataset", "digits", "--epochs", 1)
    said = f"data: {tmp_path / 'betons'} had no manifest.json, so digits was prepared there"
    assert said in capsys.readouterr().out


def test_a_file_in_the_checkpoints_place_is_refused(small_betons, tmp_path):
    (tmp_path / "checkpoints").write_text("mine")
    with pytest.raises(InputError, match="checkpoints: not a folder: move it away"):
        run(small_betons, tmp_path)
    assert (tmp_path / "checkpoints").read_text() == "mine"


@pytest.mark.parametrize(
    ("names", "options", "named"),
    [
        (("config.yaml",), (), "holds a run with .*, this one has .*: choose another --run_dir"),
        (("metrics.jsonl",), (), "metrics.jsonl: not of this run"),
        (("summary.json", "weights.safetensors"), (), "summary.json: not of this run"),
        (None, ("--seed", 2), "holds a run with seed 1, this one has 2"),
        (None, ("--seed", 2, "--resume", "never"), "holds a run with seed 1, this one has 2"),
    ],
)
def test_what_another_run_left_is_not_replaced(
    short, small_betons, tmp_path, names, options, named
):
    """Also where that one's checkpoints are gone."""
    folder = tmp_path / "run"
    if names is None:
        shutil.copytree(short, folder, ignore=shutil.ignore_patterns("checkpoints"))
    for name in names or ():
        folder.mkdir(exist_ok=True)
        (folder / name).write_text("precious: 1")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=named):
        run(small_betons, folder, "--recipe", "notebook", "--learning_rate", 0.1, *options)
    after = {path: path.read_bytes() for path in before}
    assert after == before


def test_a_try_without_a_checkpoint_is_begun_again(short, small_betons, tmp_path):
    """As after a power failure in the first epoch: the same command goes on."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(short / name, folder)
    (folder / "figures").mkdir()
    (folder / "figures" / "samples.png").write_bytes(b"drawn by the first try")
    run(small_betons, folder, "--recipe", "notebook", "--learning_rate", 0.1)
    assert same_weights(short, folder)
    assert len(read_records(folder)) == 2


def test_a_pipe_in_the_summarys_place_is_not_waited_for(short, small_betons, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(short, folder)
    (folder / "summary.json").unlink()
    os.mkfifo(folder / "summary.json")
    run(small_betons, folder, "--recipe", "notebook", "--learning_rate", 0.1)
    assert read_summary(folder)["epochs"] == 2


def test_a_loss_that_is_not_finite_ends_the_run(small_betons, tmp_path):
    options = ("--learning_rate", 1000, "--schedule", "constant", "--epochs", 5)
    with pytest.raises(RunError, match=r"the loss is (nan|inf) in epoch \d: lower --learning_rate"):
        run(small_betons, tmp_path, *options)
    assert not (tmp_path / "summary.json").exists()
    assert not (tmp_path / "weights.safetensors").exists()


def test_an_evaluation_that_is_not_finite_ends_the_run(small_betons, tmp_path, monkeypatch):
    """Where the last step of an epoch broke the weights, its own loss was still a number."""
    train_epoch = loop.Run.train_epoch

    def break_afterwards(self):
        result = train_epoch(self)
        self.state.network.layers[0].weight.data.fill_(float("nan"))
        return result

    monkeypatch.setattr(loop.Run, "train_epoch", break_afterwards)
    with pytest.raises(RunError, match="the loss is nan in epoch 1"):
        run(small_betons, tmp_path)
    assert read_records(tmp_path) == []


# The real thing


@pytest.mark.mnist
@pytest.mark.timeout(240)
def test_one_epoch_of_mnist_is_enough_for_97_percent(mnist_betons, tmp_path):
    options = ("--dataset", "mnist", "--epochs", 1, "--threads", 0, "--step", "auto")
    summary = run(mnist_betons, tmp_path, *options)
    assert summary["test_images"] == 10_000
    assert summary["dataset"] == "mnist"
    assert summary["test_accuracy"] > 97


@pytest.mark.mnist
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_default_recipe_reaches_its_accuracy(trained_on_mnist):
    summary = read_summary(trained_on_mnist)
    assert summary["epochs"] == 15
    assert summary["test_images"] == 10_000
    assert summary["test_accuracy"] >= 99.3
