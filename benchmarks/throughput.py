"""Seconds per epoch of every way to train, side by side with the notebook's own pipeline.

    make bench                                       or: python benchmarks/throughput.py
    python benchmarks/throughput.py --minutes 5 --recipe notebook

All ways are set up first and then measured in turns, so that whatever else the machine does meets
all of them. A turn trains some steps (whole epochs on a GPU); its time is scaled to an epoch of the
data set. What does not fit into --minutes is left out and listed. Prints one table and writes
throughput-DEVICE.json and .png to benchmarks/results.
"""

import argparse
import copy
import dataclasses
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.notebook_baseline import RUN_AHEAD, Baseline, endless, notebook_network, open_loader
from benchmarks.records import add_out, count, duration, sd
from data_prep import betons
from mnist_fast import figures, steps
from mnist_fast.augment import MEAN, SD
from mnist_fast.cli import load, read_recipe
from mnist_fast.config import Config
from mnist_fast.data import Batch, ResidentFeed, Sharding, StreamFeed, read_all
from mnist_fast.errors import InputError, Parser, run_main
from mnist_fast.kernels import hopper
from mnist_fast.model import build_network
from mnist_fast.provenance import device_name, versions
from mnist_fast.run_folder import make_writable
from mnist_fast.runtime import Runtime
from mnist_fast.steps import Settings, TrainState

ROOT = Path(__file__).resolve().parent.parent


BASELINE, STREAM, LOADER = "notebook pipeline", "FFCV stream alone", "DataLoader alone"
torch._dynamo.config.cache_size_limit = 256  # every case compiles the same functions anew
BASELINE_STEPS = 30  # of 128 images: a second and more on any machine
RAW = argparse.RawDescriptionHelpFormatter


@dataclasses.dataclass
class Case:
    """One way to train, or to load.

    Attributes:
        run: takes that many steps.
        steps: measured in a turn; 0: as many as the other cases.
        unmeasured: steps before them, in each turn.
        seconds: measured, per epoch.
        threads: torch's.
        cpu_seconds: processor time of this process and its workers, per epoch: what to compare on a
            machine that is shared with others.
    """

    name: str
    recipe: str
    feed: str
    step: str
    batch_size: int
    precision: str
    run: Callable[[int], None]
    steps: int = 0
    unmeasured: int = 2
    setup_seconds: float = 0.0
    peak_bytes: int | None = None
    threads: int = 1
    seconds: list[float] = dataclasses.field(default_factory=list)
    cpu_seconds: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all cases share."""

    folder: Path
    images: Tensor
    labels: Tensor
    runtime: Runtime

    @property
    def device(self) -> torch.device:
        """Where networks are trained."""
        return self.runtime.device


def load_images(folder: Path) -> tuple[Tensor, Tensor]:
    """The training images uint8 (n, 1, 28, 28) and labels int64 (n,) of prepared data, on the CPU.

    Raises:
        InputError: no data there, or damaged data.
    """
    if not (folder / "manifest.json").exists():
        raise InputError(f"{folder}: no prepared data: run python -m data_prep, or give --data_dir")
    manifest = betons.check(folder)
    rows = range(manifest.train.samples)
    return read_all(folder / manifest.train.file, rows, torch.device("cpu"))


# The cases


def our_case(bench: Bench, recipe: str, feed: str, mode: str, size: int, precision: str) -> Case:
    """Our own training in one setting, compiled and captured before it returns."""
    choices = ("--recipe", recipe, "--step", mode, "--batch_size", str(size), "--drop_last", "true")
    config = load([*choices, "--precision", precision])
    runtime = copy.copy(bench.runtime)  # Accelerate's state cannot change its precision
    runtime.precision = precision
    sharding = Sharding(len(bench.labels), size, drop_last=True)
    source: ResidentFeed | StreamFeed
    if feed == "resident":
        images, labels = bench.images.to(bench.device), bench.labels.to(bench.device)
        source = ResidentFeed(images, labels, sharding, 1)
    else:
        source = StreamFeed(bench.folder / "train.beton", sharding, 1, bench.device)
    network = build_network(config.network, config.dropout)
    plan = steps.plan(config, network, runtime, sharding)
    step = plan.build(TrainState(config, network, bench.device), runtime)
    step.warm_up(source.example())
    batches, settings = endless_epochs(source), Settings.of_epoch(config, 0).at(0.01)

    def run(count: int) -> None:
        for _ in range(count):
            step.run(next(batches), settings)

    return Case(f"ours, {recipe}", recipe, feed, mode, size, precision, run)


def endless_epochs(feed: ResidentFeed | StreamFeed) -> Iterator[Batch]:
    """Batches of epoch after epoch."""
    epoch = 0
    while True:
        yield from feed.epoch(epoch)
        epoch += 1


def baseline_case(bench: Bench) -> Case:
    """The notebook's pipeline."""
    run = Baseline(bench.images, bench.labels, bench.device).run
    setting = (BASELINE, "notebook", "DataLoader", "eager", 128, "no")
    return Case(*setting, run, BASELINE_STEPS, RUN_AHEAD)


def batched_case(bench: Bench) -> Case:
    """torchvision's v2 transforms on whole batches (one draw per batch), otherwise the notebook."""
    from torchvision.transforms import v2

    transforms = v2.Compose(
        [
            v2.RandomRotation(7, fill=1),
            v2.RandomAffine(7, shear=10, translate=(0.1, 0.1), scale=(0.8, 1.2)),
            v2.ColorJitter(brightness=0.4, contrast=0.4),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([MEAN], [SD]),
        ]
    )
    images, labels = bench.images.to(bench.device), bench.labels.to(bench.device)
    network = notebook_network().to(bench.device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)

    def run(steps: int) -> None:
        for _ in range(steps):
            rows = torch.randint(len(labels), (128,), device=bench.device)
            optimizer.zero_grad()
            F.nll_loss(network(transforms(images[rows])), labels[rows]).backward()
            optimizer.step()

    return Case("torchvision v2 on batches", "notebook", "resident", "eager", 128, "no", run)


def loader_cases(bench: Bench) -> list[Callable[[], Case]]:
    """Loading alone: FFCV's stream, and the notebook's DataLoader with its transforms."""
    sharding = Sharding(len(bench.labels), 128, drop_last=True)

    def take(batches: Iterator[Any]) -> Callable[[int], None]:
        def run(steps: int) -> None:
            for _ in range(steps):
                next(batches)

        return run

    def stream() -> Case:
        feed = StreamFeed(bench.folder / "train.beton", sharding, 1, bench.device)
        run = take(endless_epochs(feed))
        return Case(STREAM, "", "stream", "", 128, "", run, sharding.steps)

    def theirs() -> Case:
        loader = open_loader(bench.images, bench.labels, 128, bench.device.type == "cuda")
        run = take(endless(loader))
        return Case(LOADER, "notebook", "DataLoader", "", 128, "", run, BASELINE_STEPS, RUN_AHEAD)

    return [stream, theirs]


def our_settings(on_gpu: bool, recipe: str) -> Iterator[tuple[str, str, str, int, str]]:
    """Recipe, feed, step mode, batch size and precision of our cases, those that matter first."""
    best, usual = ("captured", "bf16") if on_gpu else ("native", "no")
    other = "notebook" if recipe == "fast" else "fast"
    fuses = on_gpu and hopper.unsupported_gpu(torch.device("cuda"), 128, 50_000) is None
    first = [(name, "resident", "fused", 128, "no") for name in (recipe, other) if fuses]
    first += [
        (recipe, "resident", best, 128, usual),
        (recipe, "resident", "eager", 128, usual),
        (other, "resident", best, 128, usual),
        (recipe, "stream", best, 128, usual),
    ]
    yield from first
    for precision in (usual, "no" if usual == "bf16" else "bf16"):
        for size in (128, 512, 1024, 4096):
            for mode in (best, "compiled", "eager"):
                for feed in ("resident", "stream"):
                    setting = (recipe, feed, mode, size, precision)
                    if setting not in first and (mode, precision) != ("native", "bf16"):
                        yield setting


# Ceilings and floor


def best_seconds(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """The shortest of some measurements of a piece of work."""
    times = []
    for _ in range(repeats + 1):  # the first is a warm-up
        times.append(timed(work, device))
    return min(times[1:])


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of a piece of work, until the device is done with it."""
    synchronise(device)
    started = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - started


def processor_seconds() -> float:
    """Processor time so far of this process and those that it started and that still run."""
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(found.user + found.system for found in times)


def synchronise(device: torch.device) -> None:
    """Waits until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_ceilings(device: torch.device, quick: bool) -> dict[str, float]:
    """What the machine does at most: copied bytes per second (read and written), and FLOP/s."""
    on_gpu = device.type == "cuda"
    quick = quick and not on_gpu  # where it takes a second anyhow
    size = (2**28 if on_gpu else 2**26) >> (6 * quick)
    source = torch.ones(size, device=device)
    target = torch.empty_like(source)
    seconds = best_seconds(lambda: target.copy_(source), device)
    found = {"bytes_per_second": 2 * 4 * size / seconds}
    side = (8192 if on_gpu else 2048) >> (3 * quick)
    found["flops_no"] = matrix_flops(device, side, torch.float32)
    # a small product first: without units for bf16 a large one takes minutes
    found["flops_bf16"] = matrix_flops(device, side // 8, torch.bfloat16)
    if on_gpu or found["flops_bf16"] > found["flops_no"] / 8:
        found["flops_bf16"] = matrix_flops(device, side, torch.bfloat16)
    return found


def matrix_flops(device: torch.device, side: int, dtype: torch.dtype) -> float:
    """FLOP/s of a product of square matrices."""
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side**3 / best_seconds(lambda: matrix @ matrix, device)


def work_per_image() -> dict[str, float]:
    """FLOPs of a training step per image, counted by torch, and the activations it must move.

    Each convolution's output is written and read forward; backward it is read once more, and its
    gradient is written and read: five accesses. Everything between two convolutions is taken as
    fused into these, weights as staying in the cache.
    """
    from torch.utils.flop_counter import FlopCounterMode

    network, sizes = build_network(), []
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda _m, _i, output: sizes.append(output[0].numel()))
    with FlopCounterMode(display=False) as counter:
        network(torch.randn(2, 1, 28, 28)).sum().backward()
    return {"flops": counter.get_total_flops() / 2, "accesses": 5.0 * sum(sizes), "bytes": 784.0}


def floor_seconds(images: int, precision: str, ceilings: dict[str, float]) -> float:
    """The least time of an epoch: computing or moving, whichever takes longer."""
    work = work_per_image()
    moved = work["accesses"] * (2 if precision == "bf16" else 4) + work["bytes"]
    # without units for bf16 float32 is faster, and torch may take it inside
    computing = work["flops"] / max(ceilings[f"flops_{precision}"], ceilings["flops_no"])
    return images * max(computing, moved / ceilings["bytes_per_second"])


# Measuring


def set_up(
    bench: Bench, options: argparse.Namespace, deadline: float
) -> tuple[list[Case], list[str]]:
    """Builds the cases in order of importance until the time for it is over; what was left out."""
    makers: list[tuple[str, Callable[[], Case]]] = [(BASELINE, lambda: baseline_case(bench))]
    for maker in loader_cases(bench):
        makers.append((maker.__name__, maker))
    settings = list(our_settings(bench.device.type == "cuda", options.recipe))
    for setting in settings[:2] if options.quick else settings:
        if setting[3] <= len(bench.labels):
            maker = lambda setting=setting: our_case(bench, *setting)  # type: ignore[misc] # noqa: E731
            makers.append((" ".join(map(str, setting)), maker))
    makers.insert(5, ("torchvision v2 on batches", lambda: batched_case(bench)))
    cases, left_out, threads = [], [], torch.get_num_threads()
    for name, maker in makers:
        if time.monotonic() > deadline:
            left_out.append(name)
            continue
        started = time.perf_counter()
        torch.set_num_threads(threads)
        case = maker()
        case.threads = torch.get_num_threads()  # the native step leaves torch one
        case.run(2)
        synchronise(bench.device)
        case.setup_seconds = time.perf_counter() - started
        cases.append(case)
        print(f"set up in {case.setup_seconds:5.1f} s: {name}", file=sys.stderr, flush=True)
    return cases, left_out


def measure(
    bench: Bench, cases: list[Case], options: argparse.Namespace, deadline: float
) -> list[str]:
    """Gives every case its turns, again and again, until the rounds or the time are over.

    Returns:
        The cases that had no turn in that time; what others are compared with has one anyhow.
    """
    for _ in range(options.rounds):
        for case in cases:
            needed = case.name in (BASELINE, LOADER) and not case.seconds
            if time.monotonic() > deadline and not needed:
                continue
            steps = case.steps or max(2, options.images // case.batch_size)
            torch.set_num_threads(case.threads)
            case.run(case.unmeasured)
            if bench.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            epochs = steps * case.batch_size / len(bench.labels)
            used = processor_seconds()
            seconds = timed(lambda case=case, n=steps: case.run(n), bench.device)  # type: ignore[misc]
            case.cpu_seconds.append((processor_seconds() - used) / epochs)
            case.seconds.append(seconds / epochs)
            if bench.device.type == "cuda":
                case.peak_bytes = torch.cuda.max_memory_allocated()
    return [
        f"{case.name}: {case.feed} {case.step} {case.batch_size} {case.precision}"
        for case in cases
        if not case.seconds
    ]


def describe(
    case: Case, cases: list[Case], floors: dict[str, float], images: int
) -> dict[str, Any]:
    """A case's numbers; ratios compare medians."""
    median = statistics.median(case.seconds)
    reference = LOADER if case.name in (STREAM, LOADER) else BASELINE
    other = next(case for case in cases if case.name == reference)
    baseline, processor = statistics.median(other.seconds), statistics.median(case.cpu_seconds)
    floor = floors.get(case.precision)
    kept = {
        field.name: getattr(case, field.name)
        for field in dataclasses.fields(Case)
        if field.name not in ("run", "steps", "unmeasured")
    }
    return kept | {
        "n": len(case.seconds),
        "median_seconds": median,
        "mean_seconds": statistics.fmean(case.seconds),
        "sd_seconds": sd(case.seconds),
        "images_per_second": images / median,
        "times_faster_than_baseline": baseline / median,
        "median_cpu_seconds": processor,
        "times_less_cpu_than_baseline": statistics.median(other.cpu_seconds) / processor
        if processor
        else None,
        "times_the_floor": median / floor if floor else None,
    }


def format_table(rows: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| what | feed | step | batch | precision | s/epoch (median, min-max, n) | images/s "
        "| x baseline | CPU s/epoch | x floor | peak MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        low, high = min(row["seconds"]), max(row["seconds"])
        floor, peak = row["times_the_floor"], row["peak_bytes"]
        cells = [
            *(row["name"], row["feed"], row["step"], str(row["batch_size"]), row["precision"]),
            f"{row['median_seconds']:.3g} ({low:.3g}-{high:.3g}, {row['n']})",
            f"{row['images_per_second']:,.0f}",
            f"{row['times_faster_than_baseline']:.1f}",
            f"{row['median_cpu_seconds']:.3g}",
            f"{floor:.1f}" if floor else "",
            f"{peak / 1e6:.0f}" if peak else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """One bar per training case, on a logarithmic axis, with the range of its turns."""
    rows = sorted((r for r in rows if r["step"]), key=lambda row: -row["median_seconds"])
    names = [
        f"{r['name']}: {r['feed']}, {r['step']}, {r['batch_size']}, {r['precision']}" for r in rows
    ]
    medians = [row["median_seconds"] for row in rows]
    spans = [
        [m - min(row["seconds"]) for m, row in zip(medians, rows, strict=True)],
        [max(row["seconds"]) - m for m, row in zip(medians, rows, strict=True)],
    ]
    colours = [figures.TEST if row["name"].startswith("ours") else "0.6" for row in rows]
    with figures.style():
        figure, (axes,) = figures.new_figure(9, 1.2 + 0.28 * len(rows))
        axes.barh(names, medians, xerr=spans, color=colours, ecolor="black", capsize=2)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("seconds per epoch (bar: median, whisker: range)")
        axes.set_title(title)
        path.write_bytes(figures.as_png(figure))


def hardware(device: torch.device) -> dict[str, Any]:
    """The machine, as far as it matters to a speed."""
    return {
        "device": device_name(device),
        "cpus": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load_average_before": os.getloadavg()[0],
        "max_rss_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=RAW)
    parser.add_argument("--data_dir", type=Path, default=ROOT / "data/betons/mnist")
    add_out(parser)
    parser.add_argument("--recipe", default="fast", help="of our cases (default: fast)")
    parser.add_argument("--minutes", type=duration, default=12.0, help="in all (default: 12)")
    parser.add_argument("--rounds", type=count, default=5, help="turns of each case (default: 5)")
    parser.add_argument(
        "--images", type=count, help="in a turn (default: an epoch; 7,680 on a CPU)"
    )
    parser.add_argument("--quick", action="store_true", help="two of our cases and small ceilings")
    options = parser.parse_args(arguments)
    read_recipe(options.recipe)
    make_writable(options.out, "--out")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints, writes."""
    options = parse(arguments)
    started = time.monotonic()
    runtime = Runtime(Config(precision="no"))
    runtime.set_precision("no")
    on_gpu = runtime.device.type == "cuda"
    facts = hardware(runtime.device)
    images, labels = load_images(options.data_dir)
    options.images = options.images or (len(labels) if on_gpu else 7_680)
    bench = Bench(options.data_dir, images, labels, runtime)
    ceilings = measure_ceilings(runtime.device, options.quick)
    floors = {p: floor_seconds(len(labels), p, ceilings) for p in ("bf16", "no")}
    cases, left_out = set_up(bench, options, started + 60 * options.minutes * 0.6)
    left_out += measure(bench, cases, options, started + 60 * options.minutes)
    rows = [describe(case, cases, floors, len(labels)) for case in cases if case.seconds]
    print(format_table(rows))
    floor_text = f"{floors['bf16']:.3g} s in bf16, {floors['no']:.3g} s in float32"
    print(f"floor of an epoch of {len(labels):,} images: {floor_text}; ceilings: {ceilings}")
    for name in left_out:
        print(f"left out for lack of time: {name}")
    record = {
        "command": " ".join(["python", "benchmarks/throughput.py", *(arguments or sys.argv[1:])]),
        "hardware": facts | {"max_rss_bytes": hardware(runtime.device)["max_rss_bytes"]},
        "versions": versions(),
        "epoch_images": len(labels),
        "images_per_turn": options.images,
        "ceilings": ceilings,
        "work_per_image": work_per_image(),
        "floor_seconds": floors,
        "left_out": left_out,
        "results": rows,
    }
    path = options.out / f"throughput-{'gpu' if on_gpu else 'cpu'}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draw(rows, facts["device"], path.with_suffix(".png"))
    print(f"written: {path}")
    runtime.close()
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, "benchmarks/throughput.py"))
