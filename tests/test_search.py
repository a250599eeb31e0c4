"""benchmarks/search.py: what is searched, how, and that the test images stay unseen."""

import dataclasses
import json
import sys

import numpy as np
import optuna
import pytest
from idx_files import TEST_LABELS, idx_labels, make_samples, write_idx_files

from benchmarks import search, seeds
from benchmarks.in_turn import train_in_turn
from mnist_fast import data
from mnist_fast.cli import load
from mnist_fast.config import Config
from mnist_fast.errors import InputError, RunError, Stopped
from mnist_fast.loop import Run

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
    training = Run(config)
    training.train_epoch()
    return dataclasses.astuple(training.evaluate()), training.state.network.state_dict()


def run_in_turn(config):
    """The evaluations of two seeds in one program."""
    keys = ("train_loss", "validation_loss", "test_loss")
    summaries = list(train_in_turn(config, [1, 2]))
    return [[s["records"][0].get(key) for key in keys] for s in summaries], {}


@pytest.mark.parametrize("run", [run_loop, run_in_turn])
def test_test_labels_change_nothing(run, two_test_sets, in_process, tmp_path, monkeypatch):
    """With a validation split the test images are not opened, whatever they hold.

    Without one, the same runs tell the two test sets apart: so this test could fail.
    """
    opened, beton = [], data.Beton
    monkeypatch.setattr(data, "Beton", lambda path: opened.append(path.name) or beton(path))
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

    def stand_in(experiment, wanted, _in_one, _choices, watch):
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


def fail_with(monkeypatch, errors):
    """Lets training fail with one error after the other, and keeps what was tried."""
    tried, train = [], search.train_seeds

    def stand_in(experiment, *rest):
        tried.append(experiment.folder)
        if len(tried) <= len(errors) and errors[len(tried) - 1] is not None:
            raise errors[len(tried) - 1]
        train(experiment, *rest)

    monkeypatch.setattr(search, "train_seeds", stand_in)
    return tried


def test_bad_input_ends_the_search_at_once(run_search, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        tried = fail_with(patch, [InputError("no data there")] * 9)
        with pytest.raises(InputError, match=r"^no data there$"):
            run_search("--trials", "2")
    assert len(tried) == 1
    assert "Traceback" not in capfd.readouterr().err
    again = run_search("--trials", "1")  # the recipe as it stands is not lost
    assert [experiment.folder for experiment in again] == tried


def test_three_failures_in_a_row_end_the_search(run_search, monkeypatch, capfd):
    fault = RunError("the loss is not finite")
    tried = fail_with(monkeypatch, [fault, InputError("batch_size"), None, *[fault] * 9])
    # while none has succeeded, bad input is taken for that of all trials
    with pytest.raises(InputError, match=r"^2 trials in a row failed, the last so: batch_size"):
        run_search("--trials", "4", "--pruner", "none")
    with pytest.raises(RunError, match=r"^3 trials in a row failed, the last so: the loss"):
        run_search("--trials", "4", "--pruner", "none")
    assert len(tried) == 6
    assert "Traceback" not in capfd.readouterr().err


def test_failures_between_successes_are_left_out(run_search, monkeypatch):
    fault, refused = RunError("the loss is not finite"), InputError("batch_size")
    tried = fail_with(monkeypatch, [fault, fault, None, refused, refused, None])
    run_search("--trials", "3", "--pruner", "none")
    assert len(tried) == 7


def test_the_time_limit_is_for_the_whole_search(run_search, monkeypatch):
    tried = fail_with(monkeypatch, [])
    with pytest.raises(Stopped, match="the same command goes on"):
        run_search("--trials", "3", "--time_limit", "0.001")
    assert len(tried) == 1


def test_an_interrupted_trial_is_taken_up_again(run_search, monkeypatch):
    tried = fail_with(monkeypatch, [KeyboardInterrupt()])
    with pytest.raises(Stopped, match="interrupted"):
        run_search("--trials", "1")
    run_search("--trials", "1")
    assert tried[0] == tried[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--runs", "FILE"), "FILE: File exists: choose another --runs"),
        (("--results", "FILE"), "FILE: File exists: choose another --results"),
        (("--study", "a/b"), "--study a/b: "),
        (("--study", "damaged"), "damaged.db: cannot be used as a study (file is not a database)"),
        (("--study", "half"), "half.db: cannot be used as a study ("),
        (("--trials", "abc"), "--trials: invalid int value: 'abc'"),
        (("--seeds_per_trial", "0"), "--seeds_per_trial is 0: "),
        (("--seed", "1"), "--seed is chosen here"),
        (("--dataset", "digits"), "digits has no 5,000 images to hold out"),
    ],
)
def test_mistakes_are_one_line(options, message, run_search, tmp_path, monkeypatch, capfd):
    if options[1] == "half":
        run_search("--trials", "1", "--study", "half")
        file = tmp_path / "runs" / "half.db"
        content = file.read_bytes()
        file.write_bytes(content[:5000] + b"?" * (len(content) - 5000))
    (tmp_path / "runs").mkdir(exist_ok=True)
    (tmp_path / "runs" / "damaged.db").write_bytes(b"?" * 5000)
    (tmp_path / "FILE").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as refused:
        run_search("--trials", "1", *options)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert capfd.readouterr().err == ""


def test_a_recipes_choice_that_is_not_searched_is_left_out():
    config = load(["--batch_size", "100"])
    space = search.build_space("fast")
    assert space.keys() - search.from_config(config, space).keys() == {"batch_size"}


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
        assert config.optimizer == values["optimizer"]
    own = search.from_config(load(["--recipe", name]), space)
    assert own.keys() == space.keys()
