"""Seeds, throughput and start-up on one GPU, in under nine minutes: `make bench-gpu`.

    python benchmarks/gpu.py [--minutes 9] [--out FOLDER] [NAME ...]

Runs the other benchmarks one after another, each with its own time limit, and leaves their records
in the folder of results. What the time does not suffice for is listed at the end. The device's name
and the versions stand in every record.
"""

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.records import ROOT, add_out, duration, launch, run
from mnist_fast.errors import InputError, Parser
from mnist_fast.run_folder import make_writable


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One benchmark: its name here, its command line, and the seconds that it may take."""

    name: str
    words: tuple[str, ...]
    seconds: float


def seeds(name: str, count: int, *options: str) -> Measurement:
    """Runs of a recipe with some seeds, one after another in one program."""
    words = ("seeds.py", "--name", f"{name}-gpu", "--seeds", str(count), *options)
    return Measurement(name, words, 120.0)  # what is compiled for the first time takes a minute


def measurements() -> list[Measurement]:
    """What is measured, the most important first."""
    bf16 = ("--precision", "bf16", "--step", "captured")
    return [
        seeds("fast-captured-bf16", 5, *bf16),
        seeds("fast", 20),
        Measurement("throughput", ("throughput.py", "--minutes", "3", "--rounds", "3"), 240.0),
        seeds("fast-muon", 20, "--optimizer", "muon", "--learning_rate", "0.05"),
        seeds("scale-captured-bf16", 5, "--recipe", "scale", *bf16),
        Measurement("startup", ("startup.py", "--rounds", "2"), 120.0),
        seeds("fast-captured-float32", 3, "--precision", "no", "--step", "captured"),
    ]


def measure(one: Measurement, out: Path, seconds: float) -> bool:
    """Runs a benchmark for so many seconds at most; whether it came to its end."""
    folder = "--results" if one.words[0] == "seeds.py" else "--out"
    command = [sys.executable, str(ROOT / "benchmarks" / one.words[0]), *one.words[1:]]
    print(f"{one.name}: {' '.join(one.words)}", flush=True)
    with launch([*command, folder, str(out)]) as process:
        try:
            return process.wait(seconds) == 0
        except subprocess.TimeoutExpired:
            return False


def main() -> int:
    """Measures in turn until the time is over."""
    parser = Parser(prog="benchmarks/gpu.py", description=main.__doc__)
    parser.add_argument("--minutes", type=duration, default=9.0, help="in all (default: 9)")
    parser.add_argument("names", nargs="*", help="some of them (default: all)")
    add_out(parser)
    options = parser.parse_args()
    make_writable(options.out, "--out")
    known = {one.name: one for one in measurements()}
    for name in options.names:
        if name not in known:
            raise InputError(f"{name}: unknown, the measurements are {', '.join(known)}")
    deadline = time.monotonic() + 60 * options.minutes
    missing = []
    for name in options.names or known:
        left = deadline - time.monotonic()
        done = left > 10 and measure(known[name], options.out, min(left, known[name].seconds))
        if not done:
            missing.append(name)
    for name in missing:
        print(f"not measured: {name}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(run(main, "benchmarks/gpu.py"))
