"""A watched child cannot hang its caller and leaves no process and no shared memory behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import shared_memory
from pathlib import Path

import pytest

from data_prep.watched import Limits, Report, WorkFailed, run_watched

pytestmark = pytest.mark.timeout(60)


def run(name: str, *arguments: str, limit: float = 30.0, on_report: Report = print) -> object:
    return run_watched(f"{__name__}:{name}", arguments, Limits(30.0, limit), on_report)


# What the children do.


def add(report: Report, *numbers: str) -> dict[str, float]:
    for number in numbers:
        report(int(number))
    return {"sum": sum(map(int, numbers)), "third": 1 / 3}


def raises(report: Report) -> None:
    raise ValueError("no such thing")


def thread_raises(report: Report) -> None:
    threading.Thread(target=lambda: [][0]).start()
    time.sleep(60)


def exits(report: Report) -> None:
    print("Traceback\nOSError: [Errno 28] No space left on device\nbye", file=sys.stderr)
    os._exit(3)


def is_killed(report: Report) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def floods(report: Report) -> int:
    sys.stderr.write("x" * 1_000_000)
    return 7


def hangs(report: Report, folder: str, grandchild_is: str) -> None:
    """Never ends, like FFCV: with a process of its own and with shared memory, both told."""
    memory = shared_memory.SharedMemory(create=True, size=1000)
    grandchild = os.fork()
    if grandchild == 0:
        if grandchild_is == "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        elif grandchild_is == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(600)
    Path(folder, "told.part").write_text(f"{os.getpid()} {grandchild} {memory.name}")
    Path(folder, "told.part").rename(Path(folder, "told"))
    report(0)
    time.sleep(600)


def told(folder: Path) -> tuple[list[int], Path]:
    """The processes and the shared memory of `hangs`."""
    deadline = time.monotonic() + 20
    while not (folder / "told").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child, grandchild, name = (folder / "told").read_text().split()
    return [int(child), int(grandchild)], Path("/dev/shm", name)


def ends(process: int, seconds: float = 0.0) -> bool:
    """Whether a process has ended or does so within some seconds."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":  # has ended, but nobody has asked how
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.05)


def test_result_and_reports_come_back() -> None:
    reports: list[int] = []
    assert run("add", "2", "3", on_report=reports.append) == {"sum": 5, "third": 1 / 3}
    assert reports == [2, 3]


def test_much_output_does_not_block() -> None:
    assert run("floods") == 7


@pytest.mark.parametrize(
    "name, words",
    [
        ("raises", "^no such thing$"),
        ("thread_raises", "list index out of range"),
        (
            "exits",
            r"^its process ended with status 3: OSError: \[Errno 28\] No space left on device$",
        ),
        ("is_killed", "ended with status -9"),
        ("missing", "has no attribute 'missing'"),
    ],
)
def test_failure_is_told_at_once(name: str, words: str) -> None:
    started = time.monotonic()
    with pytest.raises(WorkFailed, match=words):
        run(name)
    assert time.monotonic() - started < 40


@pytest.mark.parametrize("grandchild_is", ["asleep", "stopped", "deaf"])
def test_silence_ends_the_whole_group(grandchild_is: str, tmp_path: Path) -> None:
    with pytest.raises(WorkFailed, match="no progress for 2 seconds"):
        run("hangs", str(tmp_path), grandchild_is, limit=2.0)
    processes, memory = told(tmp_path)
    assert all(map(ends, processes))
    if grandchild_is == "deaf":  # one that has to be killed takes the resource tracker with it
        memory.unlink(missing_ok=True)
    assert not memory.exists()


def test_exception_in_the_caller_ends_the_group(tmp_path: Path) -> None:
    def interrupt(amount: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("hangs", str(tmp_path), "asleep", on_report=interrupt)
    assert all(map(ends, told(tmp_path)[0]))


def test_child_ends_with_a_killed_parent(tmp_path: Path) -> None:
    program = (
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "from data_prep.watched import Limits, run_watched\n"
        f"run_watched('{__name__}:hangs', [{str(tmp_path)!r}, 'asleep'], Limits(600.0, 600.0))"
    )
    parent = subprocess.Popen([sys.executable, "-c", program])
    processes, _ = told(tmp_path)
    parent.kill()
    parent.wait()
    assert all(ends(process, 10.0) for process in processes)
