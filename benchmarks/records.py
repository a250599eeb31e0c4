"""What benchmarks share: a spread, and the options and the file of those that launch train.py."""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ABOUT = ("device", "dataset", "recipe", "epochs", "precision", "step", "git_commit", "versions")


def sd(values: list[float]) -> float | None:
    """Standard deviation of a sample, None where there are not two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def build_parser(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options that all of them have; what it does not know is for train.py."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=rounds, help=f"runs of each that count (default: {rounds})"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    return parser


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
