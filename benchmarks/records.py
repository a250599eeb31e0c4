"""What benchmarks share: a spread, and options, end and file of those that launch train.py."""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mnist_fast.errors import Parser, run_main

ROOT = Path(__file__).resolve().parent.parent
ABOUT = ("device", "dataset", "recipe", "epochs", "precision", "step", "git_commit", "versions")


def sd(values: list[float]) -> float | None:
    """Standard deviation of a sample, None where there are not two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def count(text: str) -> int:
    """An option's whole number of at least 1."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return number


def build_parser(description: str | None, rounds: int) -> Parser:
    """The options that all of them have; what it does not know is for train.py."""
    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--rounds", type=count, default=rounds, help=f"runs of each that count (default: {rounds})"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    return parser


def run(main: Callable[[], int], program: str) -> int:
    """Calls `main` and returns the exit status; where train.py failed, it is train.py's.

    train.py has said why.
    """
    try:
        return run_main(main, program)
    except subprocess.CalledProcessError as error:
        return max(error.returncode, 1)  # negative: it died of a signal


def write(
    name: str, options: argparse.Namespace, summary: dict[str, Any], results: dict[str, Any]
) -> None:
    """Writes NAME.json to the folder of results.

    Args:
        name: of the benchmark.
        options: the benchmark's.
        summary: `summary.json` of its last run, which tells hardware, versions and choices.
        results: what was measured.
    """
    record = {
        "command": " ".join(["python", f"benchmarks/{name}.py", *sys.argv[1:]]),
        "n": options.rounds,
        **{key: summary[key] for key in ABOUT},
        **results,
        "load_average_after": os.getloadavg()[0],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1) + "\n"
    (options.out / f"{name}.json").write_text(text, encoding="utf-8")
