"""Pictures of a run, its result in words, and `python -m mnist_fast.report` to compare runs."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
import statistics
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnist_fast import timing
from mnist_fast.cli import read_recipe, read_yaml, recipe_names
from mnist_fast.config import TARGET_ACCURACY, Config, what_is_trained
from mnist_fast.errors import InputError, Parser, one_line, run_main, some_path
from mnist_fast.files import read_file
from mnist_fast.schedule import learning_rate

if TYPE_CHECKING:  # matplotlib and torch take seconds to load
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

    from mnist_fast.evaluate import Outcome

PROGRAM = "python -m mnist_fast.report"
HIGH_ACCURACY = 99.0  # percent; the notebook asks from which epoch on accuracy stays above it
# Okabe and Ito's colours, which colour-blind people can tell apart; lines differ in style as well
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
TEST, TRAIN = COLOURS[0], COLOURS[1]
DPI = 150
MISREAD_SHOWN = 40
MAX_FILE = 100_000_000  # bytes of a run's file that is read
LARGEST = 1e100  # of a metric that is read: pictures of more fail, as those of infinity do
LEGEND_WIDTH, LEGEND_CHARACTERS = 100, 250  # of a line and of a name, which is cut behind them

Records = Sequence[dict[str, Any]]


def held_out_of(record: dict[str, Any]) -> str:
    """What a record's run was evaluated on: `test` or `validation`."""
    return "test" if "test_accuracy" in record else "validation"


# One run: words


def describe_run(folder: Path, summary: dict[str, Any], records: Records) -> str:
    """A finished run's result as the notebook tells it, and a last line that says where it lies.

    Args:
        folder: the run's.
        summary: content of `summary.json`.
        records: lines of `metrics.jsonl`, at least one.
    """
    from mnist_fast.model import MAX_PARAMETERS

    held_out, last = held_out_of(records[-1]), records[-1]
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
    where = [f"  {'where the time went':<20}{timing.describe(summary['seconds'])}"]
    return "\n".join([head, *lines, *(where if "seconds" in summary else []), end])


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


# One run: pictures


def draw_run(
    folder: Path, config: Config, records: Records, outcome: Outcome, samples: Tensor
) -> None:
    """Draws `figures/` of a run; a fault is told and does not end the run.

    Args:
        folder: the run's.
        config: its choices.
        records: lines of `metrics.jsonl`, at least one.
        outcome: what the network makes of the evaluation images.
        samples: uint8 (2, n, 28, 28), training images before and after augmentation.
    """
    name = held_out_of(records[-1])
    try:
        figures = {
            "curves": curves(records, folder.name),
            "learning_rate": rates(config, records),
            "confusion_matrix": confusion(outcome, name),
            "misread": misread(outcome, name),
            "samples": before_and_after(samples),
        }
        (folder / "figures").mkdir(exist_ok=True)
        for title, figure in figures.items():
            (folder / "figures" / f"{title}.png").write_bytes(as_png(figure))
    except Exception as error:  # the training is done, and worth more than its pictures
        print(f"report: no figures: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    """A figure, in inches, and its array of axes; needs no display and keeps no global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def as_png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()


def tidy(axes: Axes, y_label: str, x_label: str = "epoch") -> None:
    """Labels, a light grid, whole numbers on the x axis."""
    from matplotlib.ticker import MaxNLocator

    axes.set(xlabel=x_label, ylabel=y_label)
    # one tick is enough: to get two around a single epoch it would take fractions
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def zoom(axes: Axes, accuracies: Iterable[float]) -> None:
    """Limits an accuracy axis to where most of a run happens; early epochs may lie below it."""
    values = sorted(accuracies)
    low, high = values[len(values) // 10], values[-1]
    margin = max(0.1 * (high - low), 0.05)
    axes.set_ylim(low - 3 * margin, min(high + 2 * margin, 100 + margin))


def logarithmic(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def target_line(axes: Axes, datasets: Iterable[str | None]) -> list[float]:
    """Draws the line at 99.4 %, and returns it, where one of the data sets is MNIST."""
    if "mnist" not in datasets:
        return []
    label = f"target {TARGET_ACCURACY} %"
    axes.axhline(TARGET_ACCURACY, color="0.35", linestyle=":", linewidth=1.2, label=label)
    return [TARGET_ACCURACY]


def curves(records: Records, title: str) -> Figure:
    """Train and held-out accuracy and loss over the epochs."""
    figure, grid = new_figure(10, 4, columns=2)
    name, epochs = held_out_of(records[-1]), [record["epoch"] for record in records]
    for axes, quantity, unit in zip(
        grid[0], ("accuracy", "loss"), (" (%)", " (nats)"), strict=True
    ):
        for split, colour, style in ((name, TEST, "o-"), ("train", TRAIN, "s--")):
            values = [record[f"{split}_{quantity}"] for record in records]
            axes.plot(epochs, values, style, color=colour, label=split, markersize=4)
        tidy(axes, quantity + unit)
    target = target_line(grid[0, 0], [records[-1].get("dataset")])
    splits = (name, "train")
    accuracies = [record[f"{split}_accuracy"] for record in records for split in splits]
    zoom(grid[0, 0], accuracies + target)
    logarithmic(grid[0, 1])
    grid[0, 0].legend(loc="lower right")
    grid[0, 1].legend(loc="upper right")
    figure.suptitle(title)
    return figure


def rates(config: Config, records: Records) -> Figure:
    """The learning rate of every step, over the epochs."""
    figure, grid = new_figure(6, 3.5)
    steps_per_epoch = records[-1]["global_step"] // records[-1]["epoch"]
    total = records[-1]["global_step"]
    steps = range(0, total, max(1, total // 2000))
    values = [learning_rate(config, step, steps_per_epoch) for step in steps]
    grid[0, 0].plot([step / steps_per_epoch for step in steps], values, color=TEST)
    grid[0, 0].set_ylim(0, max(values) * 1.05 or 1)
    tidy(grid[0, 0], "learning rate", "epochs trained")
    return figure


def confusion(outcome: Outcome, name: str) -> Figure:
    """Images by label and prediction; the colour shows the errors, the diagonal has none."""
    matrix = outcome.confusion()
    errors = matrix.clone().fill_diagonal_(0)
    figure, grid = new_figure(6, 6)
    axes = grid[0, 0]
    highest = max(int(errors.max()), 1)
    axes.imshow(errors, cmap="Blues", vmin=0, vmax=highest * 1.3)
    for label in range(len(matrix)):
        for guess in range(len(matrix)):
            count, right = int(matrix[label, guess]), label == guess
            dark = int(errors[label, guess]) > 0.9 * highest  # lighter blues want black
            colour = "white" if dark else "0.45" if right else "black"
            if count:
                axes.text(guess, label, str(count), ha="center", va="center", color=colour, size=9)
    total, wrong = len(outcome.labels), outcome.errors
    axes.set(xlabel="prediction", ylabel="label", xticks=range(10), yticks=range(10))
    axes.set_title(f"{total:,} {name} images, {wrong:,} misread", fontsize=11)
    return figure


def misread(outcome: Outcome, name: str) -> Figure:
    """The surest of the misread digits, with label, prediction and its probability."""
    count, columns = min(len(outcome.images), MISREAD_SHOWN), 8
    rows = max(-(-count // columns), 1)
    figure, grid = new_figure(10, 1.62 * rows + 0.5, rows, columns)
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, position, probability in zip(
        grid.flat, outcome.images, outcome.misread, outcome.probabilities, strict=False
    ):
        label, guess = int(outcome.labels[position]), int(outcome.predictions[position])
        axes.imshow(image, cmap="gray_r", vmin=0, vmax=255)
        axes.set_anchor("N")  # next to its title
        axes.set_title(f"{label} read as {guess}\n{100 * float(probability):.0f} % sure", size=9)
    which = "all" if count == outcome.errors else f"the {count} surest"
    figure.suptitle(f"{outcome.errors:,} {name} images misread, shown: {which}")
    return figure


def before_and_after(samples: Tensor) -> Figure:
    """Training images above what augmentation makes of them."""
    columns = min(samples.shape[1], 12)
    figure, grid = new_figure(10, 2.3, 2, columns)
    for row, title in enumerate(("before", "after")):
        for column in range(columns):
            axes = grid[row, column]
            axes.imshow(samples[row, column], cmap="gray_r", vmin=0, vmax=255)
            axes.set(xticks=[], yticks=[])
        grid[row, 0].set_ylabel(title)
    figure.suptitle("training images before and after augmentation")
    return figure


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
    def held_out(self) -> str:
        """What it was evaluated on."""
        return held_out_of(self.records[-1])

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
        if len({held_out_of(record) for record in records}) > 1:
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
    name = held_out_of(record)
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
    short = textwrap.shorten(title, LEGEND_CHARACTERS, placeholder=" ...")
    return textwrap.fill(f"{short} ({_seeds(len(runs))})", LEGEND_WIDTH)


def compare(groups: dict[str, list[Run]]) -> Figure:
    """Held-out accuracy and loss over the epochs: mean and, over seeds, standard deviation."""
    labels = [_legend_label(*group) for group in groups.items()]
    lines = sum(label.count("\n") + 1 for label in labels)
    figure, grid = new_figure(11, 4.8 + 0.22 * lines, columns=2)
    held_out = "/".join(dict.fromkeys(runs[0].held_out for runs in groups.values()))
    for index, (label, runs) in enumerate(zip(labels, groups.values(), strict=True)):
        colour, style = COLOURS[index % len(COLOURS)], STYLES[index % len(STYLES)]
        for axes, quantity in zip(grid[0], ("accuracy", "loss"), strict=True):
            epochs, mean, sd = over_seeds(runs, quantity)
            axes.plot(epochs, mean, style, color=colour, label=label, marker="o", markersize=3)
            if len(runs) > 1:
                low = [m - s for m, s in zip(mean, sd, strict=True)]
                high = [m + s for m, s in zip(mean, sd, strict=True)]
                axes.fill_between(epochs, low, high, color=colour, alpha=0.18, linewidth=0)
    every = [run for runs in groups.values() for run in runs]
    target = target_line(grid[0, 0], [run.records[-1].get("dataset") for run in every])
    zoom(grid[0, 0], target + [accuracy for run in every for accuracy in run.accuracies()])
    tidy(grid[0, 0], f"{held_out} accuracy (%)")
    tidy(grid[0, 1], f"{held_out} loss (nats)")
    logarithmic(grid[0, 1])
    handles, names = grid[0, 0].get_legend_handles_labels()
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
FIGURES = ("curves", "confusion_matrix", "misread", "samples", "learning_rate")


def build_page(groups: dict[str, list[Run]], picture: bytes) -> str:
    """One HTML page that needs no other file and no network."""
    runs = [run for members in groups.values() for run in members]
    title = f"Comparison of {len(runs)} runs" if len(runs) > 1 else f"Run {runs[0].folder.name}"
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
        *(run.folder.name, str(last.get("dataset", "")), str(run.config.get("seed", "")), epochs),
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
    paths = [run.folder / "figures" / f"{name}.png" for name in FIGURES]
    images = [
        _image(read_file(path, MAX_FILE), f"{path.stem.replace('_', ' ')} of {run.folder.name}")
        for path in paths
        if path.is_file()
    ]
    content = "\n".join(images) or "<p>This run has no figures: it did not finish.</p>"
    name = html.escape(run.folder.name)
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
    picture = as_png(compare(groups))
    page = build_page(groups, picture)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "comparison.png").write_bytes(picture)
        (options.out / "comparison.html").write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--out {options.out}: {error.strerror}: choose another") from error
    for title, runs in groups.items():
        cells = _group_cells((title, runs))
        sd = f" sd {cells[4]}" if cells[4] else ""
        print(f"{title}: {cells[2]}: {cells[3]} %{sd}, n = {cells[1]}")
    print(f"written: {options.out / 'comparison.html'} and comparison.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main(main, PROGRAM))
