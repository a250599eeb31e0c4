"""Trains a recipe with many seeds and reports mean, spread and confidence interval.

    python benchmarks/seeds.py --recipe fast --seeds 10
    python benchmarks/seeds.py --recipe fast --seeds 3 --batch_size 64 --validation_split 5000

Other options are handed on to train.py. Seeds that are finished are not trained again, and one
that was cut short goes on from its checkpoint. On a CPU as many seeds are trained at a time as
there are cores, each on one thread; on several GPUs one seed per GPU; on one GPU all of them one
after another in one program (--one_program). Results: a table, benchmarks/results/seeds-NAME.json
and a figure beside it.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import records
from mnist_fast import figures, signals
from mnist_fast.cli import load
from mnist_fast.config import Config, what_is_trained
from mnist_fast.errors import InputError, Parser, RunError, Stopped, run_main
from mnist_fast.records import accuracy_in, split_in
from mnist_fast.run_folder import make_writable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass
class Job:
    """A program that trains some seeds, and the environment that gives it its share."""

    seeds: list[int]
    command: list[str]
    log: Path
    timeout: float
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0

    def start(self) -> None:
        """Starts the program in its own process group, its output in the log."""
        make_writable(self.log.parent, "--runs")
        environment = os.environ | self.environment
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
        self.started = time.monotonic()

    def seconds(self) -> float:
        """Wall clock time since the start."""
        return time.monotonic() - self.started

    def failure(self) -> str | None:
        """None while it runs and after success, otherwise the end of its log.

        Raises:
            InputError: it refused its input.
        """
        assert self.process is not None
        if self.seconds() > self.timeout and self.process.poll() is None:
            self.stop()
            return f"seeds {self.seeds}: not finished after {self.timeout:.0f} s, see {self.log}"
        if not self.process.poll():
            return None
        lines = self.log.read_text(errors="replace").splitlines()[-5:]
        if self.process.returncode == 2:  # bad input: its one line says what is wrong
            told = [line.split(": error: ", 1)[1] for line in lines if ": error: " in line]
            raise InputError(f"seeds {self.seeds}: {(told or lines or ['see its log'])[-1]}")
        return f"seeds {self.seeds}: exit status {self.process.returncode}: {' / '.join(lines)}"

    def stop(self) -> None:
        """Asks for a checkpoint, and kills the whole group when none comes in time."""
        if self.process is not None:
            records.stop(self.process)


def run_jobs(
    jobs: Sequence[Job],
    slots: Sequence[dict[str, str]],
    deadline: float,
    watch: Callable[[Job], None] = lambda job: None,
) -> list[str]:
    """Runs jobs, one per slot at a time.

    Args:
        jobs: what to run, in order.
        slots: the environment that each slot gives to its job.
        deadline: `time.monotonic()` after which jobs are stopped and none is started.
        watch: is called with each running job about twice a second; what it raises stops all.

    Returns:
        What failed, one line per job.

    Raises:
        InputError: a job refused its input, as the others would; they are stopped.
        Stopped: the deadline passed, or this process was asked to stop.
    """
    waiting, failures = list(jobs), []
    free = list(slots)
    running: dict[int, tuple[Job, dict[str, str]]] = {}
    try:
        while waiting or running:
            while waiting and free:
                job, slot = waiting.pop(0), free.pop(0)
                job.environment = job.environment | slot
                job.start()
                running[id(job)] = (job, slot)
            time.sleep(0.2)
            if time.monotonic() > deadline or signals.requested() is not None:
                raise Stopped("stopped by request or time limit; the same command goes on")
            for job, slot in list(running.values()):
                watch(job)
                fault = job.failure()
                if fault:
                    failures.append(fault)
                if fault or (job.process and job.process.poll() is not None):
                    del running[id(job)]
                    free.append(slot)
                    note_time(job)
    finally:
        for job, _ in running.values():
            job.stop()
            note_time(job)
    return failures


def note_time(job: Job) -> None:
    """Adds the job's wall clock time to the file beside its log: a resumed run took all of it."""
    path = job.log.with_suffix(".seconds")
    before = float(path.read_text()) if path.exists() else 0.0
    path.write_text(f"{before + job.seconds():.3f}\n")


def cpu_slots(parallel: int | None) -> list[dict[str, str]]:
    """One slot per core, or `parallel` slots that share the cores."""
    cores = len(os.sched_getaffinity(0))
    parallel = parallel or cores
    return [{"OMP_NUM_THREADS": str(max(1, cores // parallel))}] * parallel


def gpu_slots(count: int) -> list[dict[str, str]]:
    """One slot per GPU that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(count)]
    return [{"CUDA_VISIBLE_DEVICES": name} for name in names[:count]]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A configuration, and the folder with one run per seed."""

    config: Config
    options: list[str]  # for train.py, without seed and folder
    folder: Path

    def run_dir(self, seed: int) -> Path:
        """Where a seed's run lies."""
        return self.folder / f"seed-{seed}"

    def summary(self, seed: int) -> dict[str, Any] | None:
        """The summary of a finished seed, otherwise None."""
        path = self.run_dir(seed) / "summary.json"
        try:
            return json.loads(path.read_text()) if path.exists() else None
        except ValueError as error:
            fault = f"{path}: damaged: remove it, and the same command ends that run again"
            raise InputError(fault) from error

    def single(self, seed: int, timeout: float) -> Job:
        """The job that trains one seed."""
        own = ["--seed", str(seed), "--run_dir", str(self.run_dir(seed))]
        command = [sys.executable, str(ROOT / "train.py"), *self.options, *own]
        return Job([seed], command, self.folder / f"seed-{seed}.log", timeout)

    def together(self, seeds: Sequence[int], timeout: float) -> Job:
        """The job that trains seeds in one program."""
        worker = ["--worker", str(self.folder), *map(str, seeds), "--", *self.options]
        command = [sys.executable, str(Path(__file__).resolve()), *worker]
        name = f"seeds-{'-'.join(map(str, seeds))}.log"
        return Job(list(seeds), command, self.folder / name, timeout)

    def wall_seconds(self) -> float:
        """Wall clock time of all jobs so far, start-up included."""
        return sum(float(path.read_text()) for path in self.folder.glob("*.seconds"))


def open_experiment(options: Sequence[str], runs: Path, prefix: str = "") -> Experiment:
    """The experiment of some options; the same ones have the same folder.

    Raises:
        InputError: options that train.py would refuse, or that choose the seed or the folder.
    """
    records.refuse(options, ("seed", "run_dir", "resume"), ", from --first and --runs")
    config = load(options)
    if not any(word.split("=")[0] == "--wandb" for word in options):
        options = [*options, "--wandb", "disabled"]
    key = json.dumps(what_is_trained(config.as_dict()))
    digest = hashlib.sha256(key.encode()).hexdigest()[:8]
    folder = runs / f"{prefix}{config.recipe}-{digest}"
    return Experiment(config, list(options), folder.resolve())


def train_seeds(
    experiment: Experiment,
    seeds: Sequence[int],
    in_one: bool,
    choices: argparse.Namespace,
    watch: Callable[[Job], None] | None = None,
) -> None:
    """Trains the seeds that are not finished.

    Args:
        experiment: what is trained.
        seeds: all that are wanted.
        in_one: whether one program trains them all.
        choices: parallel, seed_timeout and time_limit, as `build_parser` names them.
        watch: see `run_jobs`; by default finished seeds are told.

    Raises:
        InputError: one refused its input.
        RunError: some failed.
        Stopped: there was no time for all of them.
    """
    missing = [seed for seed in seeds if experiment.summary(seed) is None]
    gpus = count_gpus()
    if in_one:
        jobs = [experiment.together(missing, choices.seed_timeout)] if missing else []
        slots = gpu_slots(gpus) if gpus else cpu_slots(1)
    else:
        jobs = [experiment.single(seed, choices.seed_timeout) for seed in missing]
        slots = gpu_slots(gpus) if gpus else cpu_slots(choices.parallel)
    if missing:
        print(f"{len(missing)} of {len(seeds)} seeds to train, logs in {experiment.folder}")
    shown: set[int] = set()

    def tell(_job: Job) -> None:
        for seed in missing:
            summary = None if seed in shown else experiment.summary(seed)
            if summary is not None:
                shown.add(seed)
                print(f"seed {seed}: {accuracy_in(summary):.2f} %", flush=True)

    deadline = time.monotonic() + choices.time_limit
    failures = run_jobs(jobs, slots, deadline, watch or tell)
    if failures:
        raise RunError("; ".join(failures))


def count_gpus() -> int:
    """GPUs that this process may use."""
    import torch

    return torch.cuda.device_count()


def work(folder: Path, seeds: Sequence[int], options: Sequence[str]) -> None:
    """Trains seeds in this process, one after another; writes their summaries."""
    from benchmarks.in_turn import train_in_turn
    from mnist_fast.files import write_atomically

    def run_dir(seed: int) -> Path:
        return folder / f"seed-{seed}"

    def note(record: dict[str, Any]) -> None:
        if signals.requested() is not None:
            raise Stopped("stopped on request")
        with (run_dir(record["seed"]) / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    for seed in seeds:
        run_dir(seed).mkdir(parents=True, exist_ok=True)
        (run_dir(seed) / "metrics.jsonl").unlink(missing_ok=True)
    for summary in train_in_turn(load(options), seeds, note):
        del summary["records"]
        text = json.dumps(summary, indent=2) + "\n"
        write_atomically(run_dir(summary["seed"]) / "summary.json", text)


def statistics(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation, 95 % confidence interval of the mean, minimum and maximum.

    The deviation has n - 1 degrees of freedom and the interval is Student's. One value has
    neither: both are None.
    """
    from scipy.stats import t

    n = len(values)
    mean = sum(values) / n
    found: dict[str, Any] = {"n": n, "mean": mean, "sd": None, "ci95": None}
    found |= {"min": min(values), "max": max(values)}
    if n > 1:
        sd = (sum((value - mean) ** 2 for value in values) / (n - 1)) ** 0.5
        half = float(t.ppf(0.975, n - 1)) * sd / n**0.5
        found |= {"sd": sd, "ci95": [mean - half, mean + half]}
    return found


def make_report(experiment: Experiment, seeds: Sequence[int]) -> dict[str, Any]:
    """What the finished seeds say together; no path of this machine is in it."""
    found = {seed: experiment.summary(seed) for seed in seeds}
    summaries = [summary for summary in found.values() if summary is not None]
    if not summaries:
        raise RunError("no seed is finished")
    first = summaries[0]
    split = split_in(first)
    accuracy, loss = f"{split}_accuracy", f"{split}_loss"
    commits = {str(summary["git_commit"]) for summary in summaries if summary.get("git_commit")}
    translated = f"{accuracy}_tta"
    apart = {}
    if translated in first:  # never mixed with the plain forward pass
        apart["accuracy_tta"] = statistics([summary[translated] for summary in summaries])
    return {
        "config": what_is_trained(experiment.config.as_dict()),
        "dataset": first["dataset"],
        "parameters": first["parameters"],
        "device": first["device"],
        "precision": first["precision"],
        "step": first.get("step"),
        "git_commits": sorted(commits),
        "versions": first.get("versions"),
        "evaluated_on": split,
        "accuracy": statistics([summary[accuracy] for summary in summaries]),
        "loss": statistics([summary[loss] for summary in summaries]),
        "train_seconds": statistics([s["train_seconds"] for s in summaries]),
        **apart,
        "wall_seconds_of_all": experiment.wall_seconds(),
        "runs": [
            {"seed": s["seed"], "accuracy": s[accuracy], "loss": s[loss]}
            | {"best_epoch": s["best_epoch"], "train_seconds": s["train_seconds"]}
            for s in summaries
        ],
    }


def format_report(report: dict[str, Any]) -> str:
    """The report as a table."""
    rows = [f"{'':24}{'mean':>10}{'sd':>10}{'95 % interval':>26}{'min':>10}{'max':>10}"]
    names = {
        "accuracy": f"{report['evaluated_on']} accuracy, %",
        "loss": f"{report['evaluated_on']} loss",
        "train_seconds": "training per seed, s",
        "accuracy_tta": "  with translations, %",
    }
    for key, name in names.items():
        if key not in report:
            continue
        s = report[key]
        sd = "" if s["sd"] is None else f"{s['sd']:.4f}"
        interval = "" if s["ci95"] is None else "{:.4f} to {:.4f}".format(*s["ci95"])
        row = f"{name:24}{s['mean']:>10.4f}{sd:>10}{interval:>26}{s['min']:>10.4f}{s['max']:>10.4f}"
        rows.append(row)
    config = report["config"]
    head = f"recipe {config['recipe']} on {report['dataset']}, network {config['network']} "
    head += f"({report['parameters']:,} parameters), {config['epochs']} epochs, "
    head += f"n = {report['accuracy']['n']} seeds, last epoch"
    precision = "float32" if report["precision"] == "no" else report["precision"]
    foot = f"{report['device']}, {precision}; "
    foot += f"wall clock of all runs {report['wall_seconds_of_all']:.0f} s"
    return "\n".join([head, *rows, foot])


def draw(report: dict[str, Any], experiment: Experiment, path: Path) -> None:
    """A figure: each seed's accuracy with mean and interval, and its way through the epochs."""
    with figures.style():
        figure, (left, right) = figures.new_figure(10, 4, columns=2)
        draw_seeds(left, report)
        for run in report["runs"]:
            epochs, values = zip(*read_curve(experiment.run_dir(run["seed"])), strict=True)
            right.plot(epochs, [100 - value for value in values], linewidth=0.8)
        figures.label_axes(right, f"{report['evaluated_on']} error (%)")
        figures.logarithmic(right)
        path.write_bytes(figures.as_png(figure))


def draw_seeds(axes: "Axes", report: dict[str, Any]) -> None:
    """Each seed's accuracy of the last epoch, their mean and its interval."""
    s, runs = report["accuracy"], report["runs"]
    accuracies = [run["accuracy"] for run in runs]
    axes.plot([run["seed"] for run in runs], accuracies, "o", color=figures.TEST, label="seed")
    axes.axhline(s["mean"], color="black", label=f"mean {s['mean']:.3f}, n = {s['n']}")
    if s["ci95"]:
        axes.axhspan(*s["ci95"], color=figures.TEST, alpha=0.2, label="95 % interval of the mean")
    figures.label_axes(axes, f"{report['evaluated_on']} accuracy of the last epoch (%)", "seed")
    axes.legend()


def read_curve(run_dir: Path) -> Iterator[tuple[int, float]]:
    """Epoch and evaluated accuracy of the epochs that a run has done."""
    path = run_dir / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # a line that is just being written
            record = json.loads(line)
            yield record["epoch"], accuracy_in(record)


def save(report: dict[str, Any], path: Path) -> None:
    """Writes a report as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written: {path}")


def check(choices: argparse.Namespace) -> None:
    """Refuses, before anything is trained, what no run could go by; makes the folders.

    Args:
        choices: what this program or search.py was given, of which they have not all.
    """
    given = {name: value for name, value in vars(choices).items() if value is not None}
    for name in ("seeds", "trials", "seeds_per_trial", "parallel"):
        if given.get(name, 1) < 1:
            raise InputError(f"--{name} is {given[name]}: it must be at least 1")
    if choices.first < 0:
        raise InputError(f"--first is {choices.first}: it must be at least 0")
    for name in ("seed_timeout", "time_limit"):
        if not given[name] > 0:
            raise InputError(f"--{name} is {given[name]}: it must be above 0 seconds")
    for name in ("name", "study"):  # part of a file's name
        if not re.fullmatch(r"\w[\w.-]*", given.get(name, "x")):
            raise InputError(f"--{name} {given[name]}: give letters, digits, '_', '.', '-' alone")
    make_writable(choices.runs, "--runs")
    make_writable(choices.results, "--results")


def build_parser() -> Parser:
    """The options of this program; others are train.py's."""
    parser = Parser(
        prog="benchmarks/seeds.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--recipe", default=Config.recipe, help="recipe to start from (default %(default)s)")
    add("--seeds", type=int, default=10, help="number of seeds (default %(default)s)")
    add("--first", type=int, default=1, help="the first seed (default %(default)s)")
    add(
        "--one_program",
        choices=["auto", "true", "false"],
        default="auto",
        help="all seeds one after another in one program; auto: on one GPU (default %(default)s)",
    )
    add("--parallel", type=int, help="runs at a time on a CPU (default: one per core)")
    add("--seed_timeout", type=float, default=7200.0, help="seconds for a run (%(default)s)")
    add("--time_limit", type=float, default=86400.0, help="seconds for all of it (%(default)s)")
    add("--runs", type=Path, default=ROOT / "runs" / "seeds", help="folder of the runs")
    add("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of results")
    add("--name", help="name of the results (default: the recipe and a digest of all options)")
    return parser


def main() -> int:
    """Trains, and reports what is finished, also when the time was too short for all."""
    if sys.argv[1:2] == ["--worker"]:
        split = sys.argv.index("--")
        work(Path(sys.argv[2]), [int(seed) for seed in sys.argv[3:split]], sys.argv[split + 1 :])
        return 0
    choices, rest = build_parser().parse_known_args()
    check(choices)
    options = ["--recipe", choices.recipe, *rest]
    seeds = list(range(choices.first, choices.first + choices.seeds))
    experiment = open_experiment(options, choices.runs)
    wanted = choices.one_program
    in_one = wanted == "true" or (wanted == "auto" and count_gpus() == 1 and len(seeds) > 1)
    try:
        train_seeds(experiment, seeds, in_one, choices)
    finally:
        if any(experiment.summary(seed) for seed in seeds):
            report = make_report(experiment, seeds)
            print(format_report(report))
            path = choices.results / f"seeds-{choices.name or experiment.folder.name}.json"
            save(report, path)
            draw(report, experiment, path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    signals.install()
    sys.exit(run_main(main, "benchmarks/seeds.py"))
