"""Where the time of a run goes, and how a process leaves."""

import sys
import time

import helpers

from mnist_fast import timing

PROGRAM = """
import time
time.sleep(0.3)
from mnist_fast.timing import seconds_since_start
print(seconds_since_start())
"""


def test_seconds_count_from_the_start_of_the_process(tmp_path):
    started = time.monotonic()
    done = helpers.launch(sys.executable, "-c", PROGRAM, cwd=tmp_path, timeout=60)
    elapsed = time.monotonic() - started
    assert 0.3 <= float(done.stdout) <= elapsed + 0.02


def test_parts_add_up_to_all_the_time():
    parts = timing.Parts()
    for part in ("imports", "training"):
        parts.end(part)
    before = timing.seconds_since_start()
    parts.end("imports")
    after = timing.seconds_since_start()
    found = parts.seconds()
    assert before - 0.02 <= sum(found.values()) <= after + 0.02
    assert list(found) == list(timing.PARTS)


def test_the_longest_parts_come_first():
    line = timing.describe({"imports": 1.26, "data": 0.01, "training": 3.0})
    assert line == "4.3 s in all: training 3.0, imports 1.3"


LEAVING = """
import atexit, sys, threading, time
from mnist_fast.errors import leave
atexit.register(lambda: print("handler"))
threading.Thread(target=time.sleep, args=(600,)).start()  # Python would wait for it
print("text without a line break", end="")
leave(3)
"""


def test_a_settled_process_waits_for_nobody_and_loses_no_output(tmp_path):
    done = helpers.launch(sys.executable, "-c", LEAVING, cwd=tmp_path, timeout=60)
    assert done.returncode == 3
    assert done.stdout == "text without a line breakhandler\n"


def test_the_summary_tells_where_the_time_went(small_betons, tmp_path):
    options = (*helpers.QUICK, "--data_dir", small_betons, "--run_dir", tmp_path, "--epochs", "1")
    started = time.monotonic()
    done = helpers.train_script(*options, cwd=tmp_path)
    whole = time.monotonic() - started
    assert done.returncode == 0, done.stderr
    summary = helpers.read_summary(tmp_path)
    seconds = summary["seconds"]
    assert set(seconds) == set(timing.PARTS)
    assert 0 < summary["startup_seconds"] < sum(seconds.values()) < whole
    assert "\ntime: " in done.stdout


IGNORED = """
import signal
for number in (signal.SIGUSR1, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
from mnist_fast import signals
signals.install()
print(*(signal.getsignal(n) == signal.SIG_IGN for n in (signal.SIGUSR1, signal.SIGHUP)))
"""


def test_only_the_end_of_a_terminal_may_be_ignored(tmp_path):
    """Batch scripts ignore SIGUSR1 for themselves, nohup SIGHUP for the program."""
    done = helpers.launch(sys.executable, "-c", IGNORED, cwd=tmp_path, timeout=60)
    assert done.stdout.split() == ["False", "True"]
