"""The bar that a terminal shows while an epoch is trained."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import Tensor
from tqdm import tqdm

from mnist_fast.data import Batch

INTERVAL = 1.0  # seconds between two updates: each waits for the device
FORMAT = "{percentage:3.0f} % |{bar:20}| {desc}"


def show_epoch(
    batches: Iterator[Batch], epoch: int, epochs: int, steps: range, totals: Tensor, active: bool
) -> Iterator[Batch]:
    """Hands on the rest of an epoch's batches, with a bar where standard error is a terminal.

    Args:
        batches: the rest.
        epoch: its number, from 0.
        epochs: of the run.
        steps: first step and number of steps of the epoch.
        totals: sum of losses, correct predictions and images so far.
        active: false on all processes but the main one, where there is no bar.
    """
    if not (active and sys.stderr.isatty()):
        return batches
    later = (epochs - epoch - 1) * steps.stop
    return show(batches, f"epoch {epoch + 1}/{epochs}", steps, later, totals.tolist)


def show(
    batches: Iterable[Batch],
    label: str,
    steps: range,
    later_steps: int,
    read_totals: Callable[[], Sequence[float]],
) -> Iterator[Batch]:
    """Hands on an epoch's batches and shows how far they have come, about once a second.

    Loss and accuracy are those of this process's share of the images; speed and time left are
    those of the whole run.

    Args:
        batches: the epoch's, or its rest.
        label: what is being done.
        steps: first step and number of steps of the epoch.
        later_steps: steps of the epochs to come.
        read_totals: returns the epoch's sum of losses, correct predictions and images so far.
    """
    started = shown = time.monotonic()
    images = 0
    bar = tqdm(
        total=steps.stop,
        initial=steps.start,
        desc=label,
        leave=False,
        bar_format=FORMAT,
        dynamic_ncols=True,
    )
    with bar:
        for done, batch in enumerate(batches, start=1):
            yield batch  # it is trained on here
            images += batch.global_size
            if time.monotonic() - shown < INTERVAL:
                continue
            totals = read_totals()
            shown = time.monotonic()
            seconds = shown - started
            left = (len(steps) - done + later_steps) * seconds / done
            bar.n = steps.start + done
            bar.set_description_str(f"{label}: {describe(totals, images / seconds, left)}")


def describe(totals: Sequence[float], speed: float, left: float) -> str:
    """The bar's text; speed in images per second, time left in seconds."""
    loss, hits, count = totals[:3]
    accuracy = f"loss {loss / count:.4f}, accuracy {100 * hits / count:.2f} %, " if count else ""
    return f"{accuracy}{speed:,.0f} images/s, {tqdm.format_interval(left)} left"
