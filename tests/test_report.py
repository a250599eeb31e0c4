"""A run's result in words, and the page that compares runs, seen in a real browser."""

import json
import os
import re
import shutil
import subprocess

import pytest
import torch
from made_runs import colours_in, make_outcome, make_records, make_run, make_summary

from mnist_fast import figures, report
from mnist_fast.cli import read_recipe
from mnist_fast.config import Config
from mnist_fast.errors import InputError

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
# without a network of its own, and without asking for one
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--disable-dev-shm-usage",
)


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
    figures.draw_samples(runs[1], samples)
    figures.draw_results(runs[1], Config(), 100, records, make_outcome())
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
    assert len(seen["images"]) == 1 + len(figures.NAMES)
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


@pytest.mark.parametrize("name", [b"caf\xe9", "café: a=b".encode(), b"x$\\frac$"])
def test_names_of_any_bytes_and_values_that_are_no_text(tmp_path, name):
    folder = make_run(tmp_path / os.fsdecode(name), recorded="\ud800")
    assert report.main([str(folder), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    assert f"<td>{name.decode(errors='replace')}</td><td>\\ud800</td>" in page


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
