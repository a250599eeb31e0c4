"""benchmarks/search.py: what is searched, how, and that the test images stay unseen."""

import dataclasses
import json
import sys

import numpy as np
import optuna
import pytest
from idx_files import TEST_LABELS, idx_labels, make_samples, write_idx_files

from benchmarks import search, seeds
from mnist_fast import data
from mnist_fast.config import Config, load
from mnist_fast.errors import InputError, Stopped
from mnist_fast.evaluate import evaluate
from mnist_fast.loop import Training
from mnist_fast.many import train_many

HELD_OUT = 100


@pytest.fixture(scope="module")
def two_test_sets(tmp_path_factory):
    """Folders of betons that differ in nothing but the test labels."""
    from data_prep.betons import prepare

    folders = []
    for shift in (0, 1):
        source = write_idx_files(tmp_path_factory.mktemp("idx"), train=300, test=50)
        labels = (make_samples(50, 1000)[1] + shift) % 10
        (source / TEST_LABELS).write_bytes(idx_labels(labels.astype(np.uint8)))
        folders.append(tmp_path_factory.mktemp("betons"))
        prepare("mnist", source, folders[-1], progress=False)
    return folders


def run_loop(config):
    """The evaluation of a short single run, and its weights."""
    training = Training(config)
    training.train_epoch()
    images, labels, count = training.evaluation_set
    network = training.step.best_network()
    found = evaluate(network, images, labels, training.runtime, count)
    return dataclasses.astuple(found), network.state_dict()


def run_many(config):
    """The same of a run side by side."""
    summaries, together = train_many(config, [1, 2])
    return [list(s["records"][0].values()) for s in summaries], together.network.state_dict()


@pytest.mark.parametrize("run", [run_loop, run_many])
def test_test_labels_change_nothing(run, two_test_sets, in_process, tmp_path, monkeypatch):
    """With a validation split the test images are not opened, whatever they hold.

    Without one, the same runs tell the two test sets apart: so this test could fail.
    """
    opened, open_loader = [], data.open_loader
    monkeypatch.setattr(
        data,
        "open_loader",
        lambda path, *rest: opened.append(path.name) or open_loader(path, *rest),
    )
    results = {}
    for held_out in (HELD_OUT, 0):
        opened.clear()
        for number, folder in enumerate(two_test_sets):
            config = Config(
                data_dir=str(folder),
                run_dir=str(tmp_path / f"{held_out}-{number}"),
                validation_split=held_out,
                epochs=1,
                batch_size=50,
                precision="no",
                step="eager",
                feed="resident",
                wandb="disabled",
                dropout=0.0,
            )
            results[held_out, number] = run(config)
        assert ("test.beton" in opened) == (held_out == 0)
    assert results[HELD_OUT, 0][0] == results[HELD_OUT, 1][0]
    assert results[0, 0][0] != results[0, 1][0]
    for held_out in (HELD_OUT, 0):  # and the weights never depend on them
        first, second = (results[held_out, number][1] for number in (0, 1))
        assert all(bool((first[name] == second[name]).all()) for name in first)


@pytest.fixture
def run_search(tmp_path, monkeypatch):
    """Runs the program with a stand-in for training: accuracy by the trial's peak rate."""
    trained = []

    def stand_in(experiment, wanted, _side_by_side, _choices, watch):
        trained.append(experiment)
        config = experiment.config
        quality = 99.5 - abs(config.learning_rate - 0.1)
        for epoch in range(1, config.epochs + 1):
            for seed in wanted:
                folder = experiment.run_dir(seed)
                folder.mkdir(parents=True, exist_ok=True)
                record = {"epoch": epoch, "validation_accuracy": quality - 1 / epoch}
                with (folder / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps(record) + "\n")
            watch(None)
        for seed in wanted:
            summary = {"validation_accuracy": quality + seed % 2 / 10, "validation_loss": 0.02}
            (experiment.run_dir(seed) / "summary.json").write_text(json.dumps(summary))

    monkeypatch.setattr(search, "train_seeds", stand_in)
    monkeypatch.setattr(search, "count_gpus", lambda: 0)

    def run(*options):
        trained.clear()
        folders = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path)]
        arguments = ["search.py", *folders, "--sampler_seed", "1", "--epochs", "4", *options]
        monkeypatch.setattr(sys, "argv", arguments)
        assert search.main() == 0
        return list(trained)

    return run


def test_search_goes_on_and_tells_the_best(run_search, tmp_path):
    assert len(run_search("--trials", "4", "--pruner", "none")) == 4
    experiments = run_search("--trials", "7", "--pruner", "none")
    assert len(experiments) == 3  # the first four are not repeated
    assert len(run_search("--trials", "7", "--pruner", "none")) == 0
    content = json.loads((tmp_path / "search-fast.json").read_text())
    assert len(content["trials"]) == 7
    first = content["trials"][0]  # the recipe as it stands
    assert (first["params"]["learning_rate"], first["params"]["batch_size"]) == (
        load([]).learning_rate,
        load([]).batch_size,
    )
    assert len(first["accuracies"]) == 3
    best = max(content["trials"], key=lambda trial: trial["value"])
    config = load(["--config", str(tmp_path / "search-fast-best.yaml")])
    assert config.learning_rate == pytest.approx(best["params"]["learning_rate"])
    assert config.brightness == config.contrast == pytest.approx(best["params"]["jitter"])


def test_every_trial_holds_out_5000_training_images(run_search):
    experiments = run_search("--trials", "3", "--batch_size", "64")
    assert all(experiment.config.validation_split == 5_000 for experiment in experiments)
    assert all(experiment.config.batch_size == 64 for experiment in experiments)


def test_bad_trials_are_given_up(run_search, tmp_path):
    run_search("--trials", "12", "--pruner", "median")
    trials = json.loads((tmp_path / "search-fast.json").read_text())["trials"]
    pruned = [trial for trial in trials if trial["state"] == "PRUNED"]
    assert pruned
    assert all(trial["epochs_reported"] < 4 for trial in pruned)


def test_a_test_accuracy_is_not_taken(run_search, monkeypatch, tmp_path):
    """A summary that holds a test accuracy alone cannot be searched on."""

    def on_test_images(experiment, wanted, *_):
        for seed in wanted:
            folder = experiment.run_dir(seed)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "summary.json").write_text(json.dumps({"test_accuracy": 99.9}))

    monkeypatch.setattr(search, "train_seeds", on_test_images)
    with pytest.raises(KeyError, match="validation_accuracy"):
        run_search("--trials", "1")


def test_a_stopped_trial_is_taken_up_again(run_search, monkeypatch, tmp_path):
    stopped = []

    def interrupted(experiment, *_):
        stopped.append(experiment)
        raise Stopped("time is over")

    with monkeypatch.context() as patch:
        patch.setattr(search, "train_seeds", interrupted)
        with pytest.raises(Stopped):
            run_search("--trials", "1")
    again = run_search("--trials", "1")
    assert [experiment.folder for experiment in again] == [stopped[0].folder]


def test_the_split_cannot_be_chosen(run_search):
    with pytest.raises(InputError, match="5000 in every search"):
        run_search("--trials", "1", "--validation_split", "0")


@pytest.mark.parametrize("name", ["fast", "record"])
def test_all_of_a_space_can_be_trained(name, tmp_path):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    space = search.build_space(name)
    for _ in range(10):
        values = study.ask(space).params
        options = search.words(search.to_options(values))
        config = seeds.open_experiment(["--recipe", name, *options], tmp_path).config
        assert config.weight_decay == values["weight_decay"]
    own = search.from_config(load(["--recipe", name]), space)
    assert own.keys() == space.keys()
