"""Images per second of 1 to N processes that train together on one machine.

    python benchmarks/scaling.py                                    1, 2, 4, ... processes
    python benchmarks/scaling.py --processes 1 2 --batch_size 512 --rounds 5

A process has one GPU, or its share of the CPUs. Strong scaling keeps the global batch, which is
--batch_size. Weak scaling gives that many images to each process. Processes exchange gradients
over NCCL on GPUs and over gloo on CPUs. Each round also trains as many programs that know nothing
of each other, with the same images per step and the same kind of step. What the processes that
train together are slower than these is the exchange and the waiting for each other. The first
epoch of a run does not count. Options that are not listed here are handed on to train.py. Results:
a table, benchmarks/results/scaling-cpu.json or scaling-gpu.json, and a figure beside it.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.seeds import count_gpus, gpu_slots
from mnist_fast.errors import InputError, RunError

ROOT = records.ROOT
EPOCHS_ON_CPU, EPOCHS_ON_GPU = 2, 15  # fewer on a GPU would not be captured by `--step auto`


@dataclasses.dataclass(frozen=True)
class Case:
    """Processes that train together.

    Attributes:
        scaling: strong, weak, or single for one process, which both compare with.
        batch_size: global.
    """

    scaling: str
    processes: int
    batch_size: int

    @property
    def share(self) -> int:
        """Images per step of each process."""
        return self.batch_size // self.processes


@dataclasses.dataclass
class Speeds:
    """Images per second of a case, one number per round, and of as many programs apart."""

    together: list[float] = dataclasses.field(default_factory=list)
    apart: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Machine:
    """What the runs of one benchmark have in common.

    Attributes:
        gpus: that are used; 0 trains on the CPUs.
        choices: options for train.py.
        timeout: seconds for one case.
    """

    gpus: int
    choices: list[str]
    timeout: float

    def train_together(self, case: Case) -> tuple[float, dict[str, Any]]:
        """Images per second of a case, and its `summary.json`."""
        launcher = ["-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc_per_node", str(case.processes)]
        words = [*(launcher if case.processes > 1 else []), *self._train(case.batch_size)]
        speed, summary = self._run([words], [{}])
        if summary["world_size"] != case.processes:
            fault = f"{summary['world_size']} processes trained in place of {case.processes}"
            raise RunError(f"{fault}: unset WORLD_SIZE and RANK")
        return speed, summary

    def train_apart(self, case: Case, like: dict[str, Any]) -> float:
        """Images per second of as many programs at once, summed.

        Args:
            case: how many, and their images per step.
            like: the summary of the processes together, whose kind of step they are to have.
        """
        same = ["--step", like["step"], "--precision", like["precision"]]
        words = [*self._train(case.share), *same]
        slots = gpu_slots(case.processes) if self.gpus else [{}] * case.processes
        return self._run([words] * case.processes, slots)[0]

    def _train(self, batch_size: int) -> list[str]:
        script = str(ROOT / "train.py")
        return [script, "--wandb", "disabled", *self.choices, "--batch_size", str(batch_size)]

    def _run(
        self, programs: Sequence[list[str]], slots: Sequence[dict[str, str]]
    ) -> tuple[float, dict[str, Any]]:
        """Runs programs at once; sum of their images per second, and the first one's summary.

        Raises:
            CalledProcessError: a run failed; it has told why.
        """
        common = dict(os.environ) if self.gpus else os.environ | {"ACCELERATE_USE_CPU": "true"}
        with tempfile.TemporaryDirectory() as folder:
            runs = [Path(folder) / str(number) for number in range(len(programs))]
            with records.time_limit(self.timeout), contextlib.ExitStack() as stack:
                launched = []
                for words, slot, run in zip(programs, slots, runs, strict=True):
                    command = [sys.executable, *words, "--run_dir", str(run)]
                    launched.append(stack.enter_context(records.launch(command, common | slot)))
                for process in launched:
                    if code := process.wait():
                        raise subprocess.CalledProcessError(code, process.args)
            summary = json.loads((runs[0] / "summary.json").read_text("utf-8"))
            return sum(read_speed(run / "metrics.jsonl") for run in runs), summary


def read_speed(metrics: Path) -> float:
    """Images per second over all epochs of a run but the first."""
    _, *epochs = map(json.loads, metrics.read_text("utf-8").splitlines())
    seconds = [epoch["epoch_seconds"] for epoch in epochs]
    images = [epoch["images_per_second"] * epoch["epoch_seconds"] for epoch in epochs]
    return sum(images) / sum(seconds)


def list_cases(processes: Sequence[int], batch_size: int) -> list[Case]:
    """The cases in the order in which they are measured.

    Raises:
        InputError: the processes cannot share the batch.
    """
    cases = [Case("single", 1, batch_size)]
    for count in sorted({*processes} - {1}):
        if batch_size % count:
            fault = f"--batch_size {batch_size} is not divisible by {count} processes"
            raise InputError(f"{fault}: choose a multiple, for instance {batch_size * count}")
        cases += [Case("strong", count, batch_size), Case("weak", count, batch_size * count)]
    return cases


def describe(case: Case, step: str, speeds: Speeds, single: Speeds) -> dict[str, Any]:
    """A case's numbers; ratios compare medians.

    `speedup` is against one process, `efficiency` is that per process, and `exchange_share` is the
    part of the time that the same programs apart do not need; None for one process.
    """
    median, one = statistics.median(speeds.together), statistics.median(single.together)
    apart = statistics.median(speeds.apart) if speeds.apart else None
    return dataclasses.asdict(case) | {
        "images_per_process": case.share,
        "step": step,
        "images_per_second": speeds.together,
        "median_images_per_second": median,
        "sd_images_per_second": records.sd(speeds.together),
        "images_per_second_apart": speeds.apart,
        "median_images_per_second_apart": apart,
        "speedup": median / one,
        "efficiency": median / one / case.processes,
        "exchange_share": None if apart is None else 1 - median / apart,
    }


def format_table(rows: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| scaling | processes | batch | images per process | step | images/s (median, min-max) "
        "| speedup | efficiency | apart, images/s | exchange |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        speeds, apart = row["images_per_second"], row["median_images_per_second_apart"]
        span = f"{min(speeds):,.0f}-{max(speeds):,.0f}"
        cells = [
            *(row["scaling"], str(row["processes"]), f"{row['batch_size']:,}"),
            *(f"{row['images_per_process']:,}", row["step"]),
            f"{row['median_images_per_second']:,.0f} ({span})",
            *(f"{row['speedup']:.2f}", f"{row['efficiency']:.0%}"),
            *(("", "") if apart is None else (f"{apart:,.0f}", f"{row['exchange_share']:.0%}")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """A figure: speed with its range and the ideal, and efficiency, over the processes."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    counts = sorted({row["processes"] for row in rows})
    one = rows[0]["median_images_per_second"]
    left.plot(counts, [one * count for count in counts], "--", color="grey", label="ideal")
    for scaling in ("strong", "weak"):
        own = [row for row in rows if row["scaling"] in ("single", scaling)]
        x, y = ([row[key] for row in own] for key in ("processes", "median_images_per_second"))
        low = [m - min(row["images_per_second"]) for m, row in zip(y, own, strict=True)]
        high = [max(row["images_per_second"]) - m for m, row in zip(y, own, strict=True)]
        what = "images in a batch" if scaling == "strong" else "images per process"
        label = f"{scaling}: {rows[0]['batch_size']:,} {what}"
        left.errorbar(x, y, yerr=[low, high], marker="o", capsize=3, label=label)
        right.plot(x, [100 * row["efficiency"] for row in own], "o-", label=scaling)
    left.set(xlabel="processes", ylabel="images per second", ylim=(0, None))
    right.set(xlabel="processes", ylabel="efficiency, %", ylim=(0, 115))
    for axes in (left, right):
        axes.set_xticks(counts)
        axes.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def default_counts(available: int, batch_size: int) -> list[int]:
    """1, 2, 4, ... processes and as many as there are GPUs or CPUs, where they share the batch."""
    powers = {2**power for power in range(available.bit_length())}
    return sorted(count for count in powers | {available} if batch_size % count == 0)


def parse() -> tuple[argparse.Namespace, list[str]]:
    """The options, the defaults that depend on the machine filled in, and train.py's options."""
    parser = records.build_parser(__doc__, rounds=3)
    add, count = parser.add_argument, records.count
    add("--processes", type=count, nargs="+", help="(default: 1, 2, 4, ... and one per GPU or CPU)")
    add("--batch_size", type=count, default=512, help="of one process (default: 512)")
    epochs = f"of each run (default: {EPOCHS_ON_CPU}, on GPUs {EPOCHS_ON_GPU})"
    add("--epochs", type=count, help=epochs)
    options, choices = records.parse(parser)
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    options.gpus = 0 if on_cpu else count_gpus()
    cpus = len(os.sched_getaffinity(0))
    available = options.gpus or cpus
    options.processes = options.processes or default_counts(available, options.batch_size)
    options.epochs = options.epochs or (EPOCHS_ON_GPU if options.gpus else EPOCHS_ON_CPU)
    if options.epochs < 2:
        raise InputError("--epochs is 1: give at least 2, of which the first does not count")
    if options.gpus and max(options.processes) > options.gpus:
        fault = f"--processes {max(options.processes)}: there is a GPU for {options.gpus} of them"
        raise InputError(f"{fault}: give at most so many")
    choices = ["--epochs", str(options.epochs), *choices]
    if not options.gpus:  # the same for every case, so that a process has as much as another
        choices = ["--threads", str(max(1, cpus // max(options.processes))), *choices]
    return options, choices


def main() -> int:
    """Measures, prints, writes."""
    options, choices = parse()
    cases = list_cases(options.processes, options.batch_size)
    machine = Machine(options.gpus, choices, options.run_timeout)
    speeds = {case: Speeds() for case in cases}
    steps: dict[Case, str] = {}
    for _ in range(options.rounds):
        for case, found in speeds.items():
            speed, summary = machine.train_together(case)
            found.together.append(speed)
            steps[case] = summary["step"]
            if case.processes > 1:
                found.apart.append(machine.train_apart(case, summary))
            told = "".join(f", apart {speed:,.0f}" for speed in found.apart[-1:])
            print(f"{case}: {found.together[-1]:,.0f} images/s{told}", flush=True)
    rows = [describe(case, steps[case], speeds[case], speeds[cases[0]]) for case in cases]
    print(format_table(rows))
    kind = "gpu" if options.gpus else "cpu"
    results = {"backend": "nccl" if options.gpus else "gloo", "results": rows}
    records.write("scaling", options, summary, results, kind)
    draw(rows, summary["device"], options.out / f"scaling-{kind}.png")
    return 0


if __name__ == "__main__":
    sys.exit(records.run(main, "benchmarks/scaling.py"))
