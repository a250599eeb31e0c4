"""`--profile`: a trace of a few training steps, and the operations that cost most."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

SKIPPED, WARM_UP, STEPS = 3, 2, 8  # steps before the trace, the profiler's own, and in the trace
ROWS = 10


@contextlib.contextmanager
def profile(
    folder: Path | None, device: torch.device, say: Callable[[str], None]
) -> Iterator[Callable[[], None]]:
    """Profiles the steps taken inside the block; yields a function to call after each step.

    Writes `trace.json`, which https://ui.perfetto.dev and chrome://tracing open, and
    `operations.txt`, the ten costliest operations by their own time on the device.

    Args:
        folder: where the files go; None: nothing is profiled.
        device: that the run computes on.
        say: prints the table.
    """
    if folder is None:
        yield lambda: None
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    on_gpu = device.type == "cuda"
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    written = False

    def write(profiler: Any) -> None:
        nonlocal written
        written = True
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / "trace.json"))
        averages = profiler.key_averages()
        averages[:] = [row for row in averages if not row.key.startswith("ProfilerStep")]
        table = averages.table(
            sort_by=f"self_{'device' if on_gpu else 'cpu'}_time_total", row_limit=ROWS
        )
        (folder / "operations.txt").write_text(table, encoding="utf-8")
        say(f"{table}\nprofile of {STEPS} steps: {folder}")

    plan = torch.profiler.schedule(wait=SKIPPED, warmup=WARM_UP, active=STEPS, repeat=1)
    with torch.profiler.profile(activities=activities, schedule=plan, on_trace_ready=write) as run:
        yield run.step
    if not written:
        say(f"no profile: it needs {SKIPPED + WARM_UP + STEPS} steps")
