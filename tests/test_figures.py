"""The pictures of one run."""

import gc
import os
import re
import subprocess
import sys

import matplotlib.font_manager  # looks for fonts once, and warns if that takes long
import pytest
import torch
from helpers import ROOT
from made_runs import colours_in, make_outcome, make_records

from mnist_fast import figures
from mnist_fast.config import Config


def make_samples(count=32):
    return torch.randint(256, (2, count, 28, 28), dtype=torch.uint8)


def draw_results(folder, records, outcome):
    figures.draw_results(folder, Config(schedule="onecycle"), 100, records, outcome)


# All of a run


@pytest.mark.parametrize("wrong", [0, 30])
def test_every_figure_is_drawn_and_shows_something(tmp_path, wrong):
    assert figures.samples_missing(tmp_path)
    figures.draw_samples(tmp_path, make_samples())
    assert not figures.samples_missing(tmp_path)
    draw_results(tmp_path, make_records([98.0, 99.1, 99.5]), make_outcome(wrong=wrong))
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {f"{name}.png" for name in figures.NAMES}
    for name in names:
        colours, (width, height) = colours_in(tmp_path / "figures" / name)
        assert colours > 20
        assert 500 < width < 2000
        assert 100 < height < 2000


# As a file system hands them over; the second is "é" as Python reads it in an ASCII locale
NAMES = ["café: a=b", "caf\udcc3\udca9", "caf\udce9", "$x$ $\\frac$", "a\tb\nc", "数字", 200 * "x"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_run_of_any_name(tmp_path, name, capfd):
    folder = tmp_path / name
    folder.mkdir()
    draw_results(folder, make_records([98.0, 99.1]), make_outcome())
    assert {path.stem for path in (folder / "figures").iterdir()} == set(figures.RESULTS)
    assert capfd.readouterr().err == ""


DRAW = """
import sys; from pathlib import Path
from made_runs import make_outcome, make_records
from test_figures import draw_results
draw_results(Path(sys.argv[1]), make_records([98.0, 99.1]), make_outcome())
"""


def test_an_ascii_locale_and_a_users_own_style(tmp_path):
    """Also a matplotlibrc that needs LaTeX: pictures have a style of their own."""
    folder = tmp_path / "é: a=b"
    folder.mkdir()
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.family: Nowhere\n")
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment |= {"MATPLOTLIBRC": str(tmp_path), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, "-c", DRAW, str(folder)],
        env=environment,
        capture_output=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert {path.stem for path in (folder / "figures").iterdir()} == set(figures.RESULTS)


def test_one_picture_at_fault_costs_no_other(tmp_path, capsys):
    records = make_records([98.0, 99.1])
    del records[0]["train_loss"]
    draw_results(tmp_path, records, make_outcome())
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {
        "confusion_matrix",
        "misread",
        "learning_rate",
    }
    assert re.fullmatch(r"figures: curves not drawn: KeyError: .*\n", capsys.readouterr().err)


def test_a_folder_that_cannot_be_written_is_one_line_and_no_error(tmp_path, capsys):
    draw_results(tmp_path / "missing", make_records([99.0]), make_outcome())
    assert re.fullmatch(r"figures: .* not drawn: .*\n", capsys.readouterr().err)


def test_nothing_is_left_changed(tmp_path):
    before = dict(matplotlib.rcParams)
    draw_results(tmp_path, make_records([99.0]), make_outcome())
    assert len(list((tmp_path / "figures").iterdir())) == len(figures.RESULTS)
    assert gc.isenabled()
    assert dict(matplotlib.rcParams) == before


# Each


def test_curves_show_both_splits_and_the_target():
    figure = figures.curves(make_records([97.0, 99.0, 99.5]), "a run")
    accuracy, loss = figure.axes
    lines = {line.get_label(): list(line.get_ydata()) for line in accuracy.lines}
    assert lines["test"] == [97.0, 99.0, 99.5]
    assert lines["train"] == [96.5, 98.5, 99.0]
    assert set(lines["target 99.4 %"]) == {99.4}
    assert (accuracy.get_ylabel(), accuracy.get_xlabel()) == ("accuracy (%)", "epoch")
    assert loss.get_ylabel() == "loss (nats)"


def test_other_data_has_no_target():
    records = [record | {"dataset": "digits"} for record in make_records([98.0, 99.5])]
    labels = [line.get_label() for line in figures.curves(records, "x").axes[0].lines]
    assert labels == ["test", "train"]


def test_the_epochs_of_a_single_one_are_whole_numbers():
    figure = figures.curves(make_records([97.0]), "a run")
    figure.draw_without_rendering()
    for axes in figure.axes:
        low, high = axes.get_xlim()
        assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [1]


EXTREMES = {
    "one epoch": lambda: figures.curves(make_records([9.8]), 100 * "x"),
    "a wide range": lambda: figures.curves(make_records([12.0, 55.0, 90.0]), "a run"),
    "a narrow range": lambda: figures.curves(make_records([99.47, 99.471, 99.472]), 200 * "i"),
    "a small rate": lambda: figures.rates(Config(learning_rate=0.0003), 468),
    "many epochs": lambda: figures.rates(Config(learning_rate=20, epochs=1000), 468),
    "many images": lambda: figures.confusion(make_outcome(60_000, 60), "validation"),
}


@pytest.mark.parametrize("draw", EXTREMES.values(), ids=EXTREMES)
def test_all_labels_lie_within_the_picture(draw):
    with figures.style():
        figure = draw()
        figure.draw_without_rendering()
        box, whole = figure.get_tightbbox(), figure.bbox_inches
    assert 0 <= box.x0 < box.x1 <= whole.x1
    assert 0 <= box.y0 < box.y1 <= whole.y1


def test_the_learning_rate_is_that_of_every_step():
    config = Config(schedule="onecycle", epochs=3, learning_rate=0.2)
    (line,) = figures.rates(config, 100).axes[0].lines
    assert max(line.get_ydata()) == pytest.approx(0.2, rel=1e-3)
    assert len(line.get_ydata()) == 300


def test_the_confusion_matrix_counts_by_label_and_prediction():
    outcome = make_outcome()
    axes = figures.confusion(outcome, "test").axes[0]
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    matrix = outcome.confusion()
    assert sum(map(int, texts.values())) == matrix.sum() == 500
    assert texts[(1, 0)] == str(int(matrix[0, 1]))  # label 0 read as 1: row 0, column 1


def test_a_long_title_keeps_both_ends():
    assert figures.shorten("a" * 60 + "b" * 60, 11) == "aaaa...bbbb"
    assert figures.shorten("short", 11) == "short"
