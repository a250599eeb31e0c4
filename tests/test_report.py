"""A run's pictures and words, and the page that compares runs, seen in a real browser."""

import json
import os
import re
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mnist_fast import report
from mnist_fast.cli import dump, read_recipe
from mnist_fast.config import Config
from mnist_fast.errors import InputError
from mnist_fast.evaluate import Outcome, inspect
from mnist_fast.model import build_network

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
# without a network of its own, and without asking for one
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


def make_records(accuracies, held_out="test"):
    return [
        {
            "epoch": epoch,
            "global_step": 100 * epoch,
            "dataset": "mnist",
            "train_loss": 1 / epoch,
            "train_accuracy": accuracy - 0.5,
            f"{held_out}_loss": 0.5 / epoch,
            f"{held_out}_accuracy": accuracy,
            "learning_rate": 0.1,
            "epoch_seconds": 2.0,
            "images_per_second": 30_000.0,
        }
        for epoch, accuracy in enumerate(accuracies, start=1)
    ]


def make_summary(config, records):
    accuracies = [record["test_accuracy"] for record in records]
    return {
        "dataset": "mnist",
        "recipe": config.recipe,
        "seed": config.seed,
        "epochs": len(records),
        "parameters": 7640,
        "world_size": 1,
        "device": "a <b>CPU</b>",
        "precision": "no",
        "test_accuracy": accuracies[-1],
        "best_test_accuracy": max(accuracies),
        "best_epoch": accuracies.index(max(accuracies)) + 1,
        "test_images": 10_000,
        "train_seconds": 30.0,
        "startup_seconds": 8.0,
        "images_per_second": 30_000.0,
        "git_commit": "0123456789abcdef",
    }


def make_run(folder, accuracies=(98.0, 99.1, 99.5), finished=True, recorded="mnist", **choices):
    folder.mkdir(parents=True)
    recipe = choices.get("recipe", "fast")
    config = Config(**(read_recipe(recipe) | {"recipe": recipe, "run_dir": str(folder)} | choices))
    (folder / "config.yaml").write_text(dump(config))
    records = [record | {"dataset": recorded} for record in make_records(accuracies)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines)
    if finished:
        summary = make_summary(config, records)
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def make_outcome(count=500, wrong=30):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (count,), generator=generator)
    predictions = labels.clone()
    predictions[:wrong] = (labels[:wrong] + 1) % 10
    images = torch.randint(256, (wrong, 28, 28), dtype=torch.uint8, generator=generator)
    return Outcome(labels, predictions, torch.arange(wrong), images, torch.linspace(1, 0.2, wrong))


def colours_in(path):
    with Image.open(path) as image:
        return len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)), image.size


# Pictures


@pytest.mark.parametrize("wrong", [pytest.param(0, marks=pytest.mark.slow), 30])
def test_every_figure_is_drawn_and_shows_something(tmp_path, wrong):
    samples = torch.randint(256, (2, 32, 28, 28), dtype=torch.uint8)
    records = make_records([98.0, 99.1, 99.5])
    report.draw_run(
        tmp_path, Config(schedule="onecycle"), records, make_outcome(wrong=wrong), samples
    )
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {f"{name}.png" for name in report.FIGURES}
    for name in names:
        colours, (width, height) = colours_in(tmp_path / "figures" / name)
        assert colours > 20 or (name == "misread.png" and wrong == 0)
        assert 500 < width < 2000
        assert 100 < height < 2000


def test_curves_show_both_splits_and_the_target():
    figure = report.curves(make_records([97.0, 99.0, 99.5]), "a run")
    accuracy, loss = figure.axes
    lines = {line.get_label(): list(line.get_ydata()) for line in accuracy.lines}
    assert lines["test"] == [97.0, 99.0, 99.5]
    assert lines["train"] == [96.5, 98.5, 99.0]
    assert set(lines["target 99.4 %"]) == {99.4}
    assert (accuracy.get_ylabel(), accuracy.get_xlabel()) == ("accuracy (%)", "epoch")
    assert loss.get_ylabel() == "loss (nats)"


def test_the_epochs_of_a_single_one_are_whole_numbers():
    figure = report.curves(make_records([97.0]), "a run")
    figure.draw_without_rendering()
    for axes in figure.axes:
        low, high = axes.get_xlim()
        assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [1]


def test_the_learning_rate_is_that_of_every_step():
    config = Config(schedule="onecycle", epochs=3, learning_rate=0.2)
    (line,) = report.rates(config, make_records([97.0, 99.0, 99.5])).axes[0].lines
    assert max(line.get_ydata()) == pytest.approx(0.2, rel=1e-3)
    assert len(line.get_ydata()) == 300


def test_the_confusion_matrix_counts_by_label_and_prediction():
    outcome = make_outcome()
    texts = {
        t.get_position(): t.get_text() for t in report.confusion(outcome, "test").axes[0].texts
    }
    matrix = outcome.confusion()
    assert sum(map(int, texts.values())) == matrix.sum() == 500
    assert texts[(1, 0)] == str(int(matrix[0, 1]))  # label 0 read as 1: row 0, column 1


def test_a_fault_in_a_picture_is_one_line_and_no_error(tmp_path, capsys):
    report.draw_run(tmp_path / "missing", Config(), make_records([99.0]), make_outcome(), None)
    assert re.fullmatch(r"report: no figures: .*\n", capsys.readouterr().err)


# Words


def describe(accuracies):
    records = make_records(accuracies)
    return report.describe_run("runs/x", make_summary(Config(), records), records)


def test_the_result_in_words():
    text = describe([98.0, 99.2, 98.9, 99.1, 99.55, 99.5])
    assert "99.50 % of 10,000 images in the last epoch, 6; target 99.40 %: reached" in text
    assert "99.55 % in epoch 5" in text
    assert re.search(r"above 99 % +from epoch 4 on", text)
    assert "test is 0.50 points higher" in text
    assert "7,640; the limit is fewer than 8,000" in text
    last = text.splitlines()[-1]
    assert last.startswith("finished: 99.50 % test accuracy")
    assert last.endswith("runs/x")


@pytest.mark.parametrize(
    "accuracies, above, verdict",
    [
        ([99.0, 99.41], "from epoch 1 on", "reached"),
        ([99.5, 98.0], "not at the end", "missed by 1.40"),
    ],
)
def test_epochs_above_99_and_the_verdict(accuracies, above, verdict):
    assert re.search(rf"above 99 % +{above}\n", describe(accuracies))
    assert f"target 99.40 %: {verdict}\n" in describe(accuracies)


def test_other_data_is_not_judged_by_mnists_goal():
    records = [record | {"dataset": "digits"} for record in make_records([98.0, 99.5])]
    summary = make_summary(Config(), records) | {"dataset": "digits"}
    assert "no target: 99.40 % is MNIST's\n" in report.describe_run("runs/x", summary, records)
    labels = [line.get_label() for line in report.curves(records, "x").axes[0].lines]
    assert labels == ["test", "train"]


# Groups


def test_runs_that_differ_only_in_seed_and_place_are_one_group(tmp_path):
    folders = [
        make_run(tmp_path / "a", seed=1, learning_rate=0.1),
        make_run(tmp_path / "b", seed=2, wandb="disabled", data_dir="x", profile=True),
        make_run(tmp_path / "c", seed=1, learning_rate=0.2),
    ]
    groups = report.group_runs([report.read_run(folder) for folder in folders])
    assert {k: [r.folder.name for r in v] for k, v in groups.items()} == {
        "recipe fast": ["a", "b"],
        "recipe fast, learning_rate 0.2": ["c"],
    }


def test_a_group_is_named_by_its_recipe_and_what_was_changed_in_it(tmp_path):
    folders = [
        make_run(tmp_path / "a", epochs=3),
        make_run(tmp_path / "b", epochs=3, recorded="digits"),
        make_run(tmp_path / "c", epochs=3, recipe="notebook", learning_rate=0.1),
    ]
    groups = report.group_runs([report.read_run(folder) for folder in folders])
    assert list(groups) == [
        "recipe fast",
        "recipe fast, dataset digits",
        "recipe notebook, learning_rate 0.1",
    ]


def test_the_legend_fits_into_the_picture_whatever_was_changed(tmp_path):
    other = {key: value for key, value in read_recipe("notebook").items() if key != "epochs"}
    much = {"tta": 2, "ema_decay": 0.999, "label_smoothing": 0.1, "weight_decay": 1e-4}
    folders = [
        make_run(tmp_path / "a"),
        make_run(tmp_path / "b", **other),
        make_run(tmp_path / "c", **(other | much), optimizer="muon", threads=7, precision="bf16"),
    ]
    groups = report.group_runs([report.read_run(folder) for folder in folders])
    assert len(max(groups, key=len)) > report.LEGEND_CHARACTERS
    figure = report.compare(groups)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box, whole = legend.get_window_extent(), figure.bbox
    assert 0 <= box.x0 < box.x1 <= whole.x1
    assert 0 <= box.y0 < box.y1 < min(axes.get_window_extent().y0 for axes in figure.axes)
    assert min(axes.get_window_extent().height for axes in figure.axes) > 300
    assert len(legend.get_texts()) == len(groups) + 1  # and the target


def test_mean_and_sd_over_the_epochs_that_all_have_finished(tmp_path):
    runs = [
        report.read_run(make_run(tmp_path / "a", (98.0, 99.0, 99.5), seed=1)),
        report.read_run(make_run(tmp_path / "b", (97.0, 99.2), seed=2, finished=False)),
    ]
    epochs, mean, sd = report.over_seeds(runs, "accuracy")
    assert epochs == [1, 2]
    assert mean == pytest.approx([97.5, 99.1])
    assert sd == pytest.approx([0.7071, 0.1414], abs=1e-4)


# The page


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page about three runs: two seeds with a hostile name, and one unfinished run."""
    tmp_path = tmp_path_factory.mktemp("page")
    runs = [
        make_run(tmp_path / "one <img src=x> &", seed=1, recipe="fast"),
        make_run(tmp_path / "two", (98.2, 99.3, 99.45), seed=2, recipe="fast"),
        make_run(tmp_path / "three", (97.0, 98.0), finished=False, recipe="notebook"),
    ]
    samples = torch.randint(256, (2, 32, 28, 28), dtype=torch.uint8)
    records = make_records([98.0, 99.1])
    report.draw_run(runs[1], Config(), records, make_outcome(), samples)
    assert report.main([*map(str, runs), "--out", str(tmp_path / "out")]) == 0
    return tmp_path / "out" / "comparison.html"


def browse(page, *flags):
    if not CHROMIUM:
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    profile = page.parent / "profile"
    return subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )


PROBE = """<pre id="probe"></pre><script>
document.querySelectorAll("details").forEach(part => part.open = true);
window.onload = () => { document.getElementById("probe").textContent = JSON.stringify({
  images: [...document.images].map(image => [image.complete, image.naturalWidth]),
  overflow: document.documentElement.scrollWidth - innerWidth,
  requests: performance.getEntriesByType("resource").map(entry => entry.name)
    .filter(name => !name.startsWith("data:")),
  rows: [...document.querySelectorAll("tr")].map(row => [...row.cells].map(c => c.textContent)),
}) }
</script></body>"""


def test_the_page_in_a_browser(page):
    probed = page.with_name("probed.html")
    probed.write_text(page.read_text().replace("</body>", PROBE))
    done = browse(probed, "--virtual-time-budget=5000", "--dump-dom")
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr
    seen = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert len(seen["images"]) == 1 + len(report.FIGURES)
    assert all(complete and width > 500 for complete, width in seen["images"])
    assert seen["overflow"] <= 0
    assert seen["requests"] == []
    rows = {row[0]: row for row in seen["rows"]}
    assert rows["recipe fast"][1:] == ["2", "test, epoch 3", "99.475", "0.035", "99.475"]
    assert rows["one <img src=x> &"][2:6] == ["1", "3", "99.50", "99.50"]
    assert rows["three"][3] == "2 of 15"


def test_the_page_is_painted(page):
    picture = page.with_name("page.png")
    browse(page, f"--screenshot={picture}", "--window-size=1280,1000")
    assert colours_in(picture)[0] > 100


def test_the_comparison_is_told_and_drawn(page, tmp_path, capsys):
    runs = [str(page.parents[1] / name) for name in ("one <img src=x> &", "two")]
    assert report.main([*runs, "--out", str(tmp_path)]) == 0
    assert "recipe fast: test, epoch 3: 99.475 % sd 0.035, n = 2" in capsys.readouterr().out
    assert colours_in(tmp_path / "comparison.png")[0] > 50


def test_the_page_needs_nothing_else(page):
    text = page.read_text()
    assert "<script>" not in text
    assert not re.search(r'(src|href)="(?!data:)', text)


# Bad input

METRICS = (
    '{"epoch": 1, "train_accuracy": 1, "train_loss": 1, "test_loss": 1, "test_accuracy": %s}\n'
)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "No such file"),
        ("", "no finished epoch"),
        ("{", "does not hold a readable run"),
        (100_000 * "[", "does not hold a readable run"),
        ("[1]\n", "not an object"),
        ('{"epoch": 1, "test_accuracy": "high"}\n', "without the number"),
        (METRICS % "NaN", "readable run: .* whose test_accuracy is nan"),
        (METRICS % "1e400", "readable run: .* whose test_accuracy is inf"),
        (METRICS % ("9" * 400), "readable run: .* whose test_accuracy is 9"),
    ],
)
def test_a_folder_that_is_no_run(tmp_path, content, message):
    folder = tmp_path / "run"
    folder.mkdir()
    if content is not None:
        (folder / "metrics.jsonl").write_text(content)
    with pytest.raises(InputError, match=message):
        report.main([str(folder), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json"])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    folder = make_run(tmp_path / "run")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(InputError, match=f"{name}: not a regular file"):
        report.main([str(folder), "--out", str(tmp_path / "out")])


def test_runs_of_two_kinds_of_images_are_not_mixed(tmp_path):
    folder = make_run(tmp_path / "run")
    line = json.dumps(make_records([99.0], "validation")[0]) + "\n"
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(line)
    with pytest.raises(InputError, match="epochs of test and of validation images"):
        report.main([str(folder), "--out", str(tmp_path / "out")])


def test_no_runs_is_one_line():
    with pytest.raises(InputError, match="--help"):
        report.main([])


# The outcome that the pictures show


def test_the_outcome_is_the_same_from_several_processes():
    torch.manual_seed(0)
    network = build_network()
    images = torch.randint(256, (50, 1, 28, 28), dtype=torch.uint8)
    labels = torch.randint(10, (50,))
    alone = inspect(network, images, labels, SimpleNamespace(gather=lambda value: [value]))
    parts = []
    for start, stop in ((0, 20), (20, 20), (20, 50)):  # one process has no image
        runtime = SimpleNamespace(gather=lambda value: parts.append(value) or [value])
        inspect(network, images[start:stop], labels[start:stop], runtime)
    together = inspect(network, images[:20], labels[:20], SimpleNamespace(gather=lambda _: parts))
    for name in ("labels", "predictions", "misread", "images", "probabilities"):
        assert torch.equal(getattr(alone, name), getattr(together, name)), name
    assert alone.errors == int((alone.predictions != labels).sum()) > 20
    assert torch.equal(images[alone.misread, 0], alone.images)
    assert alone.probabilities.tolist() == sorted(alone.probabilities.tolist(), reverse=True)
