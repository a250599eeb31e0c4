"""A run's result in words, and `python -m mnist_fast.report` to compare runs."""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnist_fast import figures
from mnist_fast.cli import read_recipe, read_yaml, recipe_names
from mnist_fast.config import TARGET_ACCURACY, Config, what_is_trained
from mnist_fast.errors import InputError, Parser, one_line, run_main, some_path
from mnist_fast.figures import Records
from mnist_fast.files import read_file, say
from mnist_fast.records import split_in

if TYPE_CHECKING:  # matplotlib takes long to import
    from matplotlib.figure import Figure

PROGRAM = "python -m mnist_fast.report"
HIGH_ACCURACY = 99.0  # percent; the notebook asks from which epoch on accuracy stays above it
MAX_FILE = 100_000_000  # bytes of a run's file that is read
LARGEST = 1e100  # of a metric that is read: pictures of more fail, as those of infinity do
LEGEND_WIDTH, LEGEND_CHARACTERS = 100, 250  # of a line and of a name, which is cut behind them

# One run


def describe_run(folder: Path, summary: dict[str, Any], records: Records) -> str:
    """A finished run's result as the notebook tells it, and a last line that says where it lies.

    Args:
        folder: the run's.
        summary: content of `summary.json`.
        records: lines of `metrics.jsonl`, at least one.
    """
    from mnist_fast.model import MAX_PARAMETERS

    held_out, last = split_in(records[-1]), records[-1]
    accuracy, best = summary[f"{held_out}_accuracy"], summary[f"best_{held_out}_accuracy"]
    images, gap = summary[f"{held_out}_images"], accuracy - last["train_accuracy"]
    rows = {
        f"{held_out} accuracy": f"{accuracy:.2f} % of {images:,} images in the last epoch, "
        f"{summary['epochs']}; {_verdict(summary['dataset'], accuracy)}",
        "best epoch": f"{best:.2f} % in epoch {summary['best_epoch']}",
        f"above {HIGH_ACCURACY:g} %": _above(records, f"{held_out}_accuracy"),
        "train accuracy": f"{last['train_accuracy']:.2f} % in the last epoch, while it learned: "
        f"{held_out} is {abs(gap):.2f} points {'higher' if gap >= 0 else 'lower'}",
        "parameters": f"{summary['parameters']:,}; the limit is fewer than {MAX_PARAMETERS:,}",
        "time": f"{summary['train_seconds']:.1f} s of training, "
        f"{summary['images_per_second']:,.0f} images/s; {summary['startup_seconds']:.1f} s before",
    }
    lines = [f"  {name:<20}{text}" for name, text in rows.items()]
    head = f"{summary['dataset']}, recipe {summary['recipe']}, seed {summary['seed']}"
    end = (
        f"finished: {accuracy:.2f} % {held_out} accuracy; weights.safetensors, summary.json, "
        f"metrics.jsonl and figures/ lie in {folder}"
    )
    return "\n".join([head, *lines, end])


def _verdict(dataset: str, accuracy: float) -> str:
    """Whether the goal was reached, in words."""
    if dataset != "mnist":
        return f"no target: {TARGET_ACCURACY:.2f} % is MNIST's"
    missing = TARGET_ACCURACY - accuracy
    verdict = "reached" if missing <= 0 else f"missed by {missing:.2f}"
    return f"target {TARGET_ACCURACY:.2f} %: {verdict}"


def _above(records: Records, key: str) -> str:
    """From which epoch on accuracy stayed above 99 %, in words."""
    below = [record["epoch"] for record in records if record[key] < HIGH_ACCURACY]
    if not below:
        return f"from epoch {records[0]['epoch']} on"
    if below[-1] == records[-1]["epoch"]:
        return "not at the end"
    return f"from epoch {below[-1] + 1} on"


# Several runs


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as its folder tells it.

    Attributes:
        folder: where it lies.
        config: its choices, by name.
        records: lines of `metrics.jsonl`, one per epoch, at least one.
        summary: content of `summary.json`; empty where the run has not finished.
    """

    folder: Path
    config: dict[str, Any]
    records: list[dict[str, Any]]
    summary: dict[str, Any]

    @property
    def name(self) -> str:
        """Its folder's name, whatever the locale."""
        return figures.readable(self.folder.name)

    @property
    def held_out(self) -> str:
        """What it was evaluated on."""
        return split_in(self.records[-1])

    def accuracies(self) -> list[float]:
        """Held-out accuracy of each epoch, in percent."""
        return [record[f"{self.held_out}_accuracy"] for record in self.records]

    def choices(self) -> dict[str, Any]:
        """What was trained, whatever the seed."""
        return what_is_trained(self.config) | {"dataset": self.records[-1].get("dataset")}


def read_run(folder: Path) -> Run:
    """Reads a run's folder.

    Raises:
        InputError: it does not hold a run with at least one finished epoch, or a file is damaged.
    """
    metrics = folder / "metrics.jsonl"
    try:
        lines = read_file(metrics, MAX_FILE).splitlines()
        records = [json.loads(line) for line in lines]
        file = folder / "summary.json"
        summary = json.loads(read_file(file, MAX_FILE)) if file.exists() else {}
        for record in records:
            _check_record(record)
        if len({split_in(record) for record in records}) > 1:
            raise ValueError("metrics.jsonl has epochs of test and of validation images")
        if not isinstance(summary, dict):
            raise ValueError("summary.json does not hold an object")
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}: is {folder} a run?") from error
    except (ValueError, RecursionError) as error:  # JSON's and Unicode's errors too
        fault = f"{folder} does not hold a readable run: {one_line(error)}"
        raise InputError(f"{fault}: leave it out, or put its files back") from error
    if not records:
        raise InputError(f"{metrics} has no finished epoch yet")
    return Run(folder, read_yaml(folder / "config.yaml"), records, summary)


def _check_record(record: Any) -> None:
    if not isinstance(record, dict):
        raise ValueError("a line of metrics.jsonl is not an object")
    name = split_in(record)
    keys = ("epoch", "train_accuracy", "train_loss", f"{name}_accuracy", f"{name}_loss")
    for key in keys:
        value = record.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"metrics.jsonl has a line without the number {key}")
        if not 0 <= value < LARGEST:
            raise ValueError(f"metrics.jsonl has a line whose {key} is {value}")


def group_runs(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ only in their seed together, under a name that tells the groups apart.

    The name is that of the recipe, with the values that are not the recipe's own; those that every
    group has in the same way are left out.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(run.choices(), sort_keys=True, default=str), []).append(run)
    changes = [_changes(members[0].choices()) for members in groups.values()]
    shared = [item for item in changes[0].items() if all(item in some.items() for some in changes)]
    named: dict[str, list[Run]] = {}
    for some, members in zip(changes, groups.values(), strict=True):
        parts = [f"recipe {members[0].config.get('recipe')}"]
        parts += [f"{key} {value}" for key, value in some.items() if (key, value) not in shared]
        named.setdefault(", ".join(parts), []).extend(members)  # 1 and 1.0 are the same
    return named


def _changes(choices: dict[str, Any]) -> dict[str, Any]:
    """The choices that are not those of their recipe."""
    recipe = choices.get("recipe")
    own = {field.name: field.default for field in dataclasses.fields(Config)} | {"recipe": recipe}
    own |= read_recipe(recipe) if recipe in recipe_names() else {}
    missing = object()  # None is a value
    return {key: value for key, value in choices.items() if own.get(key, missing) != value}


def _legend_label(title: str, runs: Sequence[Run]) -> str:
    """A group's name as it fits below the axes; the page has it whole."""
    short = textwrap.shorten(figures.drawable(title), LEGEND_CHARACTERS, placeholder=" ...")
    return textwrap.fill(f"{short} ({_seeds(len(runs))})", LEGEND_WIDTH)


def compare(groups: dict[str, list[Run]]) -> Figure:
    """Held-out accuracy and loss over the epochs: mean and, over seeds, standard deviation."""
    labels = [_legend_label(*group) for group in groups.items()]
    lines = sum(label.count("\n") + 1 for label in labels)
    figure, grid = figures.new_figure(11, 4.8 + 0.22 * lines, columns=2)
    held_out = "/".join(dict.fromkeys(runs[0].held_out for runs in groups.values()))
    for index, (label, runs) in enumerate(zip(labels, groups.values(), strict=True)):
        colour = figures.COLOURS[index % len(figures.COLOURS)]
        line = figures.STYLES[index % len(figures.STYLES)]
        for axes, quantity in zip(grid, ("accuracy", "loss"), strict=True):
            epochs, mean, sd = over_seeds(runs, quantity)
            axes.plot(epochs, mean, line, color=colour, label=label, marker="o", markersize=3)
            if len(runs) > 1:
                low = [m - s for m, s in zip(mean, sd, strict=True)]
                high = [m + s for m, s in zip(mean, sd, strict=True)]
                axes.fill_between(epochs, low, high, color=colour, alpha=0.18, linewidth=0)
    every = [run for runs in groups.values() for run in runs]
    accuracy, loss = grid
    target = figures.target_line(accuracy, [run.records[-1].get("dataset") for run in every])
    figures.zoom(accuracy, target + [value for run in every for value in run.accuracies()])
    figures.label_axes(accuracy, f"{held_out} accuracy (%)")
    figures.label_axes(loss, f"{held_out} loss (nats)")
    figures.logarithmic(loss)
    handles, names = accuracy.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=1, frameon=False)
    return figure


def over_seeds(runs: Sequence[Run], quantity: str) -> tuple[list[int], list[float], list[float]]:
    """Epochs that all runs have finished; mean and standard deviation over the runs at each."""
    shortest = min(len(run.records) for run in runs)
    values = [
        [run.records[index][f"{run.held_out}_{quantity}"] for run in runs]
        for index in range(shortest)
    ]
    epochs = [record["epoch"] for record in runs[0].records[:shortest]]
    means = [statistics.fmean(some) for some in values]
    return epochs, means, [statistics.stdev(some) if len(some) > 1 else 0.0 for some in values]


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds, mean and sd"


# The page

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
       max-width: 76rem; margin: 0 auto; padding: 1rem 1.5rem 4rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.5rem }
img { max-width: 100%; height: auto } .wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .5rem; border-bottom: 1px solid #ddd; text-align: right;
         vertical-align: bottom }
th:first-child, td:first-child { text-align: left } th { border-bottom: 2px solid #888 }
summary { cursor: pointer; padding: .3rem 0 } .runs img { max-width: 46rem; display: block }
"""


def build_page(groups: dict[str, list[Run]], picture: bytes) -> str:
    """One HTML page that needs no other file and no network."""
    runs = [run for members in groups.values() for run in members]
    title = f"Comparison of {len(runs)} runs" if len(runs) > 1 else f"Run {runs[0].name}"
    escaped = html.escape(title)
    sections = [
        f"<h1>{escaped}</h1>",
        _image(picture, "Accuracy and loss over the epochs"),
        "<h2>Result by configuration</h2>",
        _table(map(_group_cells, groups.items()), GROUP_HEAD),
        "<h2>Runs</h2>",
        _table(map(_run_cells, runs), RUN_HEAD),
        "<h2>Pictures of each run</h2>",
        *map(_run_pictures, runs),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escaped}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


GROUP_HEAD = ("configuration", "runs", "on", "last epoch, mean (%)", "sd", "best epoch, mean (%)")


def _group_cells(item: tuple[str, list[Run]]) -> list[str]:
    """A group's row; accuracy of the last epoch that every run finished."""
    title, runs = item
    epochs, mean, sd = over_seeds(runs, "accuracy")
    best = statistics.fmean(max(run.accuracies()) for run in runs)
    spread = f"{sd[-1]:.3f}" if len(runs) > 1 else ""
    where = f"{runs[0].held_out}, epoch {epochs[-1]}"
    return [title, str(len(runs)), where, f"{mean[-1]:.3f}", spread, f"{best:.3f}"]


RUN_HEAD = (
    *("run", "data set", "seed", "epochs", "last (%)", "best (%)", "in epoch", "train (%)"),
    *("parameters", "train (s)", "images/s", "processes", "precision", "device", "code"),
)


def _run_cells(run: Run) -> list[str]:
    accuracies, last, summary = run.accuracies(), run.records[-1], run.summary
    best = max(accuracies)
    epochs = str(last["epoch"]) if summary else f"{last['epoch']} of {run.config.get('epochs')}"
    return [
        *(run.name, str(last.get("dataset", "")), str(run.config.get("seed", "")), epochs),
        *(f"{accuracies[-1]:.2f}", f"{best:.2f}"),
        *(str(run.records[accuracies.index(best)]["epoch"]), f"{last['train_accuracy']:.2f}"),
        *(_number(summary.get(key)) for key in ("parameters", "train_seconds")),
        *(_number(summary.get(key)) for key in ("images_per_second", "world_size")),
        *(str(summary.get(key) or "") for key in ("precision", "device")),
        str(summary.get("git_commit") or "")[:10],
    ]


def _number(value: Any) -> str:
    if not isinstance(value, int | float):
        return ""
    return f"{value:,.1f}" if value < 1000 and isinstance(value, float) else f"{value:,.0f}"


def _table(rows: Iterable[Sequence[str]], head: Sequence[str]) -> str:
    lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table>\n{body}\n</table></div>'


def _run_pictures(run: Run) -> str:
    paths = [run.folder / "figures" / f"{name}.png" for name in figures.NAMES]
    images = [
        _image(read_file(path, MAX_FILE), f"{path.stem.replace('_', ' ')} of {run.name}")
        for path in paths
        if path.is_file()
    ]
    content = "\n".join(images) or "<p>This run has no figures: it did not finish.</p>"
    name = html.escape(run.name)
    return f'<details class="runs"><summary>{name}</summary>\n{content}\n</details>'


def _image(content: bytes, text: str) -> str:
    data = base64.b64encode(content).decode()
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{data}">'


def main(arguments: Sequence[str] | None = None) -> int:
    """Compares the runs named on the command line."""
    parser = Parser(
        prog=PROGRAM,
        description="Compares runs in one HTML page and one PNG. Runs that differ only in their "
        "seed are drawn as mean and standard deviation.",
    )
    parser.add_argument("runs", nargs="+", type=some_path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--out",
        type=some_path,
        default=Path("runs/comparison"),
        metavar="DIR",
        help="folder of comparison.html and comparison.png (default: runs/comparison)",
    )
    options = parser.parse_args(arguments)
    folders = dict.fromkeys(folder.resolve() for folder in options.runs)  # each once
    groups = group_runs([read_run(folder) for folder in folders])
    picture = figures.diagram(compare, groups)
    page = build_page(groups, picture).encode("utf-8", "backslashreplace")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "comparison.png").write_bytes(picture)
        (options.out / "comparison.html").write_bytes(page)
    except OSError as error:
        raise InputError(f"--out {options.out}: {error.strerror}: choose another") from error
    for title, runs in groups.items():
        cells = _group_cells((title, runs))
        sd = f" sd {cells[4]}" if cells[4] else ""
        say(f"{title}: {cells[2]}: {cells[3]} %{sd}, n = {cells[1]}")
    say(f"written: {options.out / 'comparison.html'} and comparison.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main(main, PROGRAM))
