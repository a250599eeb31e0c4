"""What benchmarks share: options, launching and stopping of other programs, the file of results."""

import argparse
import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mnist_fast.errors import InputError, Parser, RunError, Stopped, run_main, some_path
from mnist_fast.run_folder import make_writable

ROOT = Path(__file__).resolve().parent.parent
GRACE = 60.0  # seconds that a program has to end when it is asked to stop
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


def duration(text: str) -> float:
    """An option's time: a finite number of at least 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of at least 0")
    return number


def build_parser(description: str | None, rounds: int) -> Parser:
    """The options that all of them have; what it does not know is for train.py."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=count, default=rounds, help=f"runs of each that count (default: {rounds})"
    )
    parser.add_argument(
        "--run_timeout", type=duration, default=3600, help="seconds for one run (default: 3600)"
    )
    add_out(parser)
    return parser


def add_out(parser: Parser) -> None:
    """The option for the folder of results."""
    parser.add_argument("--out", type=some_path, default=ROOT / "benchmarks/results")


def parse(parser: Parser) -> tuple[argparse.Namespace, list[str]]:
    """The options of a parser of `build_parser`, and the words for train.py.

    Raises:
        InputError: nothing can be written to --out, or a word chooses the run's folder.
    """
    options, choices = parser.parse_known_args()
    refuse(choices, ("run_dir", "resume"))
    make_writable(options.out, "--out")
    return options, choices


def refuse(choices: Sequence[str], names: Sequence[str], source: str = "") -> None:
    """Refuses options of train.py that the benchmark chooses itself, and says from what."""
    for name in names:
        if any(word == f"--{name}" or word.startswith(f"--{name}=") for word in choices):
            raise InputError(f"--{name} is chosen here{source}: leave it out")


@contextlib.contextmanager
def launch(
    command: Sequence[str], environment: dict[str, str] | None = None
) -> Iterator["subprocess.Popen[bytes]"]:
    """Starts a program without output, which ends with the block at the latest."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield process
    finally:
        stop(process)


def stop(process: "subprocess.Popen[bytes]") -> None:
    """Asks a program that leads its process group to end, and kills the group if it does not."""
    if process.poll() is not None:
        return
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Ends the block with a `RunError` when it takes too long; for the main thread.

    Args:
        seconds: what `--run_timeout` says.
    """

    def give_up(_number: int, _frame: object) -> NoReturn:
        raise RunError(f"a run was not finished after {seconds:g} s: see --run_timeout")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))  # 0 would be no limit at all
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _stop_on_request(number: int, _frame: object) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # a second one must not interrupt the way out
    raise Stopped(f"stopped by {signal.Signals(number).name}")


def run(main: Callable[[], int], program: str) -> int:
    """Calls `main` and returns the exit status; where train.py failed, it is train.py's.

    train.py has said why. Requests to stop end what was launched.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop_on_request)
    try:
        return run_main(main, program)
    except subprocess.CalledProcessError as error:
        return max(error.returncode, 1)  # negative: it died of a signal


def write(
    name: str,
    options: argparse.Namespace,
    summary: dict[str, Any],
    results: dict[str, Any],
    suffix: str = "",
) -> None:
    """Writes NAME.json, or NAME-SUFFIX.json, to the folder of results.

    Args:
        name: of the benchmark.
        options: the benchmark's.
        summary: `summary.json` of its last run, which tells hardware, versions and choices.
        results: what was measured.
        suffix: tells records of one benchmark apart.
    """
    record = {
        "command": " ".join(["python", f"benchmarks/{name}.py", *sys.argv[1:]]),
        "n": options.rounds,
        **{key: summary[key] for key in ABOUT},
        **results,
        "load_average_after": os.getloadavg()[0],
    }
    text = json.dumps(record, indent=1) + "\n"
    file = f"{name}-{suffix}.json" if suffix else f"{name}.json"
    (options.out / file).write_text(text, encoding="utf-8")
