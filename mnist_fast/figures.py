"""Pictures of one run, and the style that all pictures of the suite share."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mnist_fast.config import TARGET_ACCURACY, Config
from mnist_fast.errors import one_line
from mnist_fast.files import write_atomically
from mnist_fast.pages import DPI, before_and_after, compress, misread
from mnist_fast.records import split_in
from mnist_fast.schedule import learning_rate

if TYPE_CHECKING:  # matplotlib and torch take long to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

    from mnist_fast.evaluate import Outcome

SAMPLES = "samples"  # drawn before the first step
RESULTS = ("curves", "confusion_matrix", "misread", "learning_rate")  # drawn after the last one
NAMES = (*RESULTS, SAMPLES)
# Okabe and Ito's colours, which colour-blind people can tell apart; lines differ in style as well
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
TEST, TRAIN = COLOURS[0], COLOURS[1]
STYLE: dict[str, Any] = {
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.dpi": DPI,
    "grid.color": "0.9",
    "text.parse_math": False,  # a run's name may hold a dollar sign
}
TITLE_LENGTH = 100  # characters of a run's name that fit above the curves

Records = Sequence[dict[str, Any]]


# The pictures of a run


def samples_missing(folder: Path) -> bool:
    """Whether the picture that `draw_samples` draws is missing in a run's folder."""
    return not _path(folder, SAMPLES).is_file()


def draw_samples(folder: Path, samples: Tensor) -> None:
    """Draws what training sees; a fault is told and does not end the run.

    Args:
        folder: the run's.
        samples: uint8 (2, n, 28, 28) on the CPU, training images before and after augmentation.
    """
    _draw(folder, {SAMPLES: lambda: before_and_after(samples.numpy()).png()})


def draw_results(
    folder: Path, config: Config, steps_per_epoch: int, records: Records, outcome: Outcome
) -> None:
    """Draws the pictures of a whole run; a fault is told and does not end the run.

    Args:
        folder: the run's.
        config: its choices.
        steps_per_epoch: optimisation steps of one epoch.
        records: lines of `metrics.jsonl`, at least one.
        outcome: what the network makes of the evaluation images.
    """
    name = split_in(records[-1])
    pictures = {
        "curves": lambda: diagram(curves, records, readable(folder.name)),
        "confusion_matrix": lambda: diagram(confusion, outcome, name),
        "misread": lambda: misread(outcome, name).png(),
        "learning_rate": lambda: diagram(rates, config, steps_per_epoch),
    }
    with no_garbage_collection():
        _draw(folder, pictures)


def _draw(folder: Path, pictures: dict[str, Callable[[], bytes]]) -> None:
    """Draws pictures, by name, into a run's folder."""
    for name, draw in pictures.items():
        try:
            path = _path(folder, name)
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, draw())
        except Exception as error:  # the training is worth more than its pictures
            fault = f"{type(error).__name__}: {one_line(error)[:300]}"
            with contextlib.suppress(OSError):
                print(f"figures: {name} not drawn: {fault}", file=sys.stderr, flush=True)
            if isinstance(error, OSError):  # the others would meet the same full disk
                return


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Importing matplotlib takes two thirds of the time inside.

    Its many new objects make the collector search all of torch's, again and again.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _path(folder: Path, name: str) -> Path:
    return folder / "figures" / f"{name}.png"


# The style


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Pictures drawn inside look the same whatever the user's matplotlibrc says."""
    import matplotlib

    settings = dict[Any, Any](matplotlib.rcParamsDefault) | STYLE
    del settings["backend"]  # the one that rc_context would not put back
    with matplotlib.rc_context(settings):
        yield


def new_figure(
    width: float, height: float, columns: int = 1, margins: dict[str, float] | None = None
) -> tuple[Figure, Any]:
    """A figure and its row of axes; needs no display and keeps no global state.

    Args:
        width, height: of the figure, in inches.
        columns: number of axes side by side.
        margins: as `Figure.subplots_adjust` takes them, in fractions of the figure. They halve the
            time that a layout computed from the sizes of all labels takes; None computes it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=None if margins else "constrained")
    if margins:
        figure.subplots_adjust(**margins)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def diagram(draw: Callable[..., Figure], *arguments: Any) -> bytes:
    """What a function draws, in this style, as a PNG file."""
    with style():
        return as_png(draw(*arguments))


def as_png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return compress(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))


def readable(name: str) -> str:
    """A file's name as it was typed, whatever the locale; bytes that are not UTF-8 become U+FFFD.

    Under `LC_ALL=C` Python may hold a name's bytes above 127 as lone surrogates, which neither
    fonts nor files of text can take.
    """
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def drawable(text: str) -> str:
    """The text with U+FFFD in place of characters that the font lacks."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("DejaVu Sans"))
    return "".join(c if font.get_char_index(ord(c)) else "\ufffd" for c in text)


def label_axes(axes: Axes, y_label: str, x_label: str = "epoch") -> None:
    """Labels both axes; the x axis, of epochs or seeds, has whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.set(xlabel=x_label, ylabel=y_label)
    # one tick is enough: to get two around a single epoch it would take fractions
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def zoom(axes: Axes, accuracies: Iterable[float]) -> None:
    """Limits an accuracy axis to where most of a run happens; early epochs may lie below it."""
    values = sorted(accuracies)
    low, high = values[len(values) // 10], values[-1]
    margin = max(0.1 * (high - low), 0.05)
    axes.set_ylim(low - 3 * margin, min(high + 2 * margin, 100 + margin))


def logarithmic(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def target_line(axes: Axes, datasets: Iterable[str | None]) -> list[float]:
    """Draws the line at 99.4 %, and returns it, where one of the data sets is MNIST."""
    if "mnist" not in datasets:
        return []
    label = f"target {TARGET_ACCURACY} %"
    axes.axhline(TARGET_ACCURACY, color="0.35", linestyle=":", linewidth=1.2, label=label)
    return [TARGET_ACCURACY]


# Diagrams


def curves(records: Records, title: str) -> Figure:
    """Train and held-out accuracy and loss over the epochs."""
    margins = {"left": 0.075, "right": 0.99, "bottom": 0.125, "top": 0.91, "wspace": 0.2}
    figure, (accuracy, loss) = new_figure(10, 4, 2, margins)
    name, epochs = split_in(records[-1]), [record["epoch"] for record in records]
    for axes, quantity in ((accuracy, "accuracy"), (loss, "loss")):
        for split, colour, line in ((name, TEST, "o-"), ("train", TRAIN, "s--")):
            values = [record[f"{split}_{quantity}"] for record in records]
            axes.plot(epochs, values, line, color=colour, label=split, markersize=4)
    label_axes(accuracy, "accuracy (%)")
    label_axes(loss, "loss (nats)")
    target = target_line(accuracy, [records[-1].get("dataset")])
    splits = (name, "train")
    zoom(accuracy, target + [record[f"{split}_accuracy"] for record in records for split in splits])
    logarithmic(loss)
    accuracy.legend(loc="lower right")
    loss.legend(loc="upper right")
    figure.suptitle(shorten(drawable(title), TITLE_LENGTH), size=11)
    return figure


def shorten(text: str, length: int) -> str:
    """The text without its middle where it is longer than so many characters."""
    half = (length - 3) // 2
    return text if len(text) <= length else f"{text[:half]}...{text[-half:]}"


def rates(config: Config, steps_per_epoch: int) -> Figure:
    """The learning rate of every step of the run, over the epochs."""
    margins = {"left": 0.15, "right": 0.98, "bottom": 0.14, "top": 0.98}
    figure, (axes,) = new_figure(6, 3.5, margins=margins)
    total = config.epochs * steps_per_epoch
    steps = range(0, total, max(1, total // 2000))
    values = [learning_rate(config, step, steps_per_epoch) for step in steps]
    axes.plot([step / steps_per_epoch for step in steps], values, color=TEST)
    axes.set_ylim(0, max(values) * 1.05 or 1)
    label_axes(axes, "learning rate", "epochs trained")
    return figure


def confusion(outcome: Outcome, name: str) -> Figure:
    """Images by label and prediction; the colour shows the errors, the diagonal has none."""
    matrix = outcome.confusion().numpy()
    errors = matrix.copy()
    np.fill_diagonal(errors, 0)
    highest = max(int(errors.max()), 1)
    margins = {"left": 0.08, "right": 0.98, "bottom": 0.08, "top": 0.95}
    figure, (axes,) = new_figure(6, 6, margins=margins)
    axes.imshow(errors, cmap="Blues", vmin=0, vmax=highest * 1.3)
    axes.grid(visible=False)
    for (label, guess), count in np.ndenumerate(matrix):
        dark = errors[label, guess] > 0.9 * highest  # lighter blues want black
        colour = "white" if dark else "0.45" if label == guess else "black"
        if count:
            axes.text(guess, label, str(count), ha="center", va="center", color=colour, size=9)
    axes.set(xlabel="prediction", ylabel="label", xticks=range(10), yticks=range(10))
    axes.spines[:].set_visible(True)
    total, wrong = len(outcome.labels), outcome.errors
    axes.set_title(f"{total:,} {name} images, {wrong:,} misread", fontsize=11)
    return figure
