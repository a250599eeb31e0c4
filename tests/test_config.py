"""Choices: which layer wins, and what is refused with which message."""

import ast
import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
import yaml
from helpers import ROOT, TRAIN, train_script

from mnist_fast import cli, config
from mnist_fast.cli import build_parser, dump, load, read_recipe, recipe_names
from mnist_fast.config import Config
from mnist_fast.errors import InputError

FIELDS = {field.name: field for field in dataclasses.fields(Config)}


@pytest.fixture
def write(tmp_path):
    """Writes a configuration file and returns its path."""

    def write_file(text):
        path = tmp_path / "choices.yaml"
        path.write_text(text)
        return str(path)

    return write_file


def refusal(*arguments):
    with pytest.raises(InputError) as caught:
        load(arguments)
    return str(caught.value)


# Who wins


def test_a_recipe_overrides_the_defaults_and_leaves_the_rest():
    chosen = load(["--recipe", "notebook"])
    recipe = yaml.safe_load((cli.RECIPES / "notebook.yaml").read_text())
    for name, field in FIELDS.items():
        expected = "notebook" if name == "recipe" else recipe.get(name, field.default)
        assert getattr(chosen, name) == expected, name
    assert recipe["fill"] != Config.fill  # else this would show nothing


def test_a_file_overrides_the_recipe_and_an_option_the_file(write):
    file = write("learning_rate: 0.3\nepochs: 4\nrotation: 2\n")
    chosen = load(["--learning_rate", "0.5", "--config", file, "--recipe", "notebook"])
    assert (chosen.learning_rate, chosen.epochs, chosen.rotation) == (0.5, 4, 2)
    assert (chosen.recipe, chosen.shear) == ("notebook", 10)


def test_a_file_names_the_recipe_unless_an_option_does(write):
    file = write("recipe: notebook\nepochs: 4\n")
    assert load(["--config", file]) == load(["--recipe", "notebook", "--epochs", "4"])
    assert load(["--config", file, "--recipe", "fast"]) == load(["--epochs", "4"])


def test_the_default_recipe_is_fast():
    assert load([]) == load(["--recipe", "fast"])
    assert load([]).schedule == "onecycle"


def test_an_option_may_state_the_default_against_the_recipe():
    assert load(["--recipe", "notebook"]).drop_last is False
    assert load(["--recipe", "fast"]).drop_last is True
    assert load(["--recipe", "fast", "--drop_last", "false"]).drop_last is False
    assert load(["--recipe", "fast", "--learning_rate", "0.01"]).learning_rate == 0.01


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_and_states_what_it_is(name):
    recipe = yaml.safe_load((cli.RECIPES / f"{name}.yaml").read_text())
    chosen = load(["--recipe", name]).as_dict()
    assert chosen["recipe"] == name
    assert {key: chosen[key] for key in recipe} == recipe


def test_scale_is_fast_with_a_batch_for_eight_gpus():
    fast, scale = read_recipe("fast"), read_recipe("scale")
    changed = {key for key in scale if scale[key] != fast.get(key)}
    assert changed == {"batch_size", "optimizer", "learning_rate"}
    assert not fast.keys() - scale.keys()
    assert scale["batch_size"] == 8 * fast["batch_size"]


def test_the_resolved_choices_come_back_through_config(tmp_path):
    options = ["--recipe", "notebook", "--epochs", "3", "--learning_rate", "1e-3"]
    options += ["--precision", "no", "--run_dir", "runs/no", "--drop_last", "true"]
    chosen = load(options)
    (tmp_path / "config.yaml").write_text(dump(chosen))
    assert load(["--config", str(tmp_path / "config.yaml")]) == chosen
    assert list(yaml.safe_load((tmp_path / "config.yaml").read_text())) == list(FIELDS)


def test_no_is_a_precision_and_a_truth_value(write):
    config = load(["--config", write("precision: no\nnesterov: no\nprofile: yes")])
    assert (config.precision, config.nesterov, config.profile) == ("no", False, True)


def test_numbers_may_be_written_as_people_write_them(write):
    assert load(["--config", write("learning_rate: 1e-3\nrotation: 7\n")]).learning_rate == 1e-3
    assert isinstance(load(["--rotation", "7"]).rotation, float)


def test_the_choices_cannot_be_changed_later():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load([]).epochs = 3


# What is refused


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--precision", "fp8"), "precision fp8: unknown, the choices are auto, no, bf16, fp16"),
        (("--epochs", "many"), "epochs many: it must be a whole number"),
        (("--learning_rate", "fast"), "learning_rate fast: it must be a number"),
        (("--nesterov", "maybe"), "nesterov maybe: it must be true or false"),
        (("--batch-size", "1"), "did you mean --batch_size?"),
        (("--epoch", "1"), "did you mean --epochs?"),
        (("--bogus", "1"), "unrecognized arguments: --bogus 1; see"),
    ],
)
def test_a_refusal_is_in_words_for_people(arguments, said):
    assert said in refusal(*arguments)


def test_what_options_come_to_is_printed(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["cli", "--recipe", "notebook", "--epochs", "3"])
    assert cli.main() == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed == load(["--recipe", "notebook", "--epochs", "3"]).as_dict()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--bogus", "1"),
        ("--epoch", "1"),  # no abbreviations: a later option could change their meaning
        ("stray",),
        ("--epochs",),
        ("--epochs", "1.5"),
        ("--epochs", "many"),
        ("--epochs", "null"),
        ("--learning_rate", "fast"),
        ("--learning_rate", "nan"),
        ("--learning_rate", "inf"),
        ("--drop_last", "maybe"),
        ("--precision", "fp8"),
        ("--schedule", "cosine"),
        ("--recipe", "absent"),
        ("--recipe", "../recipes/fast"),
    ],
)
def test_a_bad_option_is_refused_and_named(arguments):
    message = refusal(*arguments)
    assert arguments[0].removeprefix("--") in message
    assert "train.py --help" in message or ", ".join(recipe_names()) in message


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("epoch: 3", "unknown key 'epoch' (did you mean --epochs?)"),
        ("config: other.yaml", "unknown key 'config'"),
        ("epochs: 1.5", "epochs"),
        ("epochs: true", "epochs"),
        ("epochs: [1]", "epochs"),
        ("epochs: {a: 1}", "epochs"),
        ("epochs:", "epochs has no value"),
        ("learning_rate: high", "learning_rate"),
        ("drop_last: 1", "drop_last"),
        ("precision: fp8", "precision"),
        ("data_dir: 3", "data_dir"),
        ("recipe: absent", "recipe absent: unknown"),
        ("- epochs", "option: value"),
        ("1: 2", "option: value"),
        ("just words", "option: value"),
        ("epochs: 3: 4", "not valid YAML"),
        ("epochs: [3", "not valid YAML"),
        ("epochs: !!python/object:os.system {}", "not valid YAML"),
        ("\x00", "not valid YAML"),
        ("a: " + 5000 * "[", "nested too deeply"),
        ("epochs: 1\nepochs: 2", "duplicate key 'epochs'"),
        ("epochs: 010", "010 is not a decimal whole number"),  # 8 in YAML 1.1
        ("epochs: 1:30", "1:30 is not a decimal whole number"),  # 90
        ("wandb_name: 2020-02-31", "not valid YAML"),
        ("&a {epochs: *a}", "aliases (*name) are not supported"),
        ("epochs: 1 #" + 100_000 * "x", "more than 100,000 bytes"),
        ("recipe:", "recipe has no value"),
        ("run_dir: ''", "run_dir is empty"),
    ],
)
def test_a_bad_file_is_refused_and_named(write, text, named):
    message = refusal("--config", write(text))
    assert named in message
    assert "choices.yaml" in message or "recipe" in named or "is empty" in named


@pytest.mark.parametrize("name", ["recipe", "config", "data_dir", "run_dir", "resume"])
def test_an_empty_value_is_not_taken_for_none(name):
    """A shell variable that is not set must not train another recipe, or elsewhere."""
    assert refusal(f"--{name}", "")


@pytest.mark.parametrize("name", ["config", "epochs", "wandb", "momentum"])
def test_a_variable_that_is_not_set_is_named(name):
    assert f"{name} is empty: give it a value" in refusal(f"--{name}=")


@pytest.mark.parametrize("module", ["cli", "model"])
def test_a_full_disk_for_what_is_printed_is_one_line(module):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", f"mnist_fast.{module}"],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=100,
        )
    line = "standard output: No space left on device: going on without it\n"
    assert (done.returncode, done.stderr) == (0, line)


def test_null_on_the_command_line_clears_what_a_file_says(write):
    assert load(["--config", write("run_dir: runs/a"), "--run_dir", "null"]).run_dir is None


def test_home_is_found_where_the_shell_leaves_its_sign(write, monkeypatch):
    monkeypatch.setenv("HOME", "/mine")
    config = load(["--config", write("run_dir: ~/run"), "--data_dir=~/data"])
    assert (config.run_dir, config.data_dir) == ("/mine/run", "/mine/data")


def test_an_empty_file_changes_nothing(write):
    assert load(["--config", write("# nothing yet\n")]) == load([])


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    assert "No such file" in refusal("--config", str(tmp_path / "absent.yaml"))
    assert "Is a directory" in refusal("--config", str(tmp_path))
    os.mkfifo(tmp_path / "pipe")  # nobody writes: it would be waited for
    assert "not a regular file" in refusal("--config", str(tmp_path / "pipe"))
    assert "not a regular file" in refusal("--config", "/dev/zero")
    (tmp_path / "latin.yaml").write_bytes(b"recipe: \xe9t\xe9")
    assert "not valid YAML" in refusal("--config", str(tmp_path / "latin.yaml"))


@pytest.mark.parametrize("name", sorted(config.RANGES))
def test_every_range_is_held_at_both_ends(name):
    low, high = config.RANGES[name]
    for inside in (low, high):
        assert getattr(Config(**_valid(name, inside)), name) == inside
    for outside in (low - 1, high * 2 + 1, float("nan"), float("inf"), float("-inf")):
        with pytest.raises(InputError, match=f"^{name} is .*between .* and "):
            Config(**_valid(name, outside))


def _valid(name, value):
    """A value together with what must accompany it."""
    partner = {"scale_min": "scale_max", "scale_max": "scale_min"}.get(name)
    return {name: value} | ({partner: value} if partner and 0.1 <= value <= 10 else {})


def test_every_number_has_a_range():
    numbers = {name for name, field in FIELDS.items() if type(field.default) in (int, float)}
    assert numbers == set(config.RANGES)


def test_ranges_hold_in_files_too(write):
    assert "learning_rate is nan" in refusal("--config", write("learning_rate: .nan"))
    assert "dropout is inf" in refusal("--config", write("dropout: .inf"))
    assert "seed is" in refusal("--config", write("seed: 99999999999999999999"))


def test_averages_that_would_never_move_are_refused():
    assert "ema_decay is 1.0" in refusal("--ema_decay", "1")


def test_choices_that_exclude_each_other_are_refused():
    assert "scale_min 1.2 is larger" in refusal("--scale_min", "1.2")
    assert "momentum" in refusal("--nesterov", "true", "--momentum", "0")
    assert "nesterov" in refusal("--nesterov", "true", "--optimizer", "adamw")


# What the options are


def test_help_lists_every_option_with_its_default():
    text = " ".join(build_parser().format_help().split())
    recipe = read_recipe("fast")  # what a run without options takes
    for name, field in FIELDS.items():
        described = re.search(rf"--{name} \S.*?{re.escape(field.metadata['help'])}", text)
        assert described, name
        default = re.match(r" \(type: .*?default: (\S+)\)", text[described.end() :])
        assert default, name
        assert yaml.safe_load(default[1]) == yaml.safe_load(
            json.dumps(recipe.get(name, field.default))
        ), name


def test_every_choice_is_read_somewhere():
    read = set()
    for path in [TRAIN, *(ROOT / "mnist_fast").rglob("*.py")]:
        if path.name == "config.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and _is_config(node.value):
                read.add(node.attr)
    assert set(FIELDS) - read == set()


def _is_config(node):
    """Whether an expression is `config` or ends in `.config`."""
    return "config" in (getattr(node, "id", None), getattr(node, "attr", None))


@pytest.mark.timeout(60)
def test_bad_usage_exits_with_2_and_one_line(tmp_path, write):
    cases = {
        ("--bogus", "1"): "--bogus",
        ("--epochs", "0"): "epochs is 0: it must be between 1 and",
        ("--config", "absent.yaml"): "absent.yaml: No such file",
        ("--config", write("epochs: [3\nseed: 1")): "choices.yaml: not valid YAML",
    }
    for arguments, named in cases.items():
        done = train_script(*arguments, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert line.startswith("train.py: error: ")
        assert named in line


@pytest.mark.timeout(60)
def test_help_exits_with_0(tmp_path):
    done = train_script("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr == ""
    assert "--batch_size" in done.stdout
    assert list(tmp_path.iterdir()) == []
