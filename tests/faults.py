"""Starts training processes quickly, tampers with them, and waits for them with a limit.

They are forked from a server that has imported everything already, so that a run of the digits
takes seconds; each then runs train.py as its main program.
"""

import contextlib
import importlib
import json
import multiprocessing
import os
import runpy
import signal
import sys
import time
from pathlib import Path

import helpers
from safetensors.torch import load_file

from mnist_fast import checkpoint
from mnist_fast.resume import check_state

LIMIT = 200  # seconds that a run of the digits may take on a busy machine

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    ["mnist_fast.loop", "wandb", "ffcv.loader", "ffcv.fields.decoders", "torch._dynamo"]
)


def _train(arguments, log, folder, environment, tamper):
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.setpgid(0, 0)
    os.environ.update(environment)
    os.chdir(folder)
    sys.path.insert(0, str(helpers.ROOT))
    sys.argv = ["train.py", *arguments]
    loop = importlib.import_module("mnist_fast.loop")
    for name in ("draw_samples", "draw_results"):  # they take longer than the training
        setattr(loop.figures, name, lambda *_: None)
    if tamper:
        tamper()
    runpy.run_path(str(helpers.TRAIN), run_name="__main__")


class Process:
    """One training process.

    Args:
        folder: where it runs; its log lies there.
        arguments: of train.py.
        environment: added to its environment.
        tamper: a module's function that it calls first.
    """

    def __init__(self, folder, *arguments, environment=None, tamper=None):
        self.log = Path(folder) / "log"
        options = ([str(word) for word in arguments], str(self.log), str(folder), environment or {})
        self.process = _server.Process(target=_train, args=(*options, tamper))
        self.process.start()
        self.pid = self.process.pid

    def signal(self, number):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait_for_line(self, text, seconds=LIMIT):
        """Waits until the log holds a text."""
        deadline = time.monotonic() + seconds
        while text not in self.said():
            assert self.process.is_alive(), f"ended without '{text}':\n{self.said()}"
            assert time.monotonic() < deadline, f"no '{text}' in {seconds} s:\n{self.said()}"
            time.sleep(0.02)

    def said(self):
        return self.log.read_text() if self.log.exists() else ""

    def errors(self):
        return helpers.error_lines(self.said())

    def wait(self, seconds=LIMIT):
        """Waits for its end; returns the exit status, negative: the signal it died of."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"hangs after {seconds} s:\n{self.said()}"
        return self.process.exitcode

    def end(self):
        """Kills it and what it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.join()


@contextlib.contextmanager
def started(folder, *arguments, **more):
    process = Process(folder, *arguments, **more)
    try:
        yield process
    finally:
        process.end()


@contextlib.contextmanager
def started_ranks(folder, port, *arguments, tampers=(None, None)):
    """Two processes that train together, as a launcher would start them; each with its own log."""
    processes = []
    try:
        for rank, tamper in enumerate(tampers):
            place = folder / f"rank-{rank}"
            place.mkdir(exist_ok=True)
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "ACCELERATE_USE_CPU": "true",
            }
            processes.append(Process(place, *arguments, environment=environment, tamper=tamper))
        yield processes
    finally:
        for process in processes:
            process.end()


def status(folder):
    return json.loads((folder / "status.json").read_text())["status"]


def newest(folder):
    """Step of the newest valid checkpoint of a run, None without one."""
    found, _ = checkpoint.load_newest(folder / "checkpoints", check_state)
    return found and found.state["global_step"]


def same_weights(one, other):
    ours, theirs = (load_file(folder / "weights.safetensors") for folder in (one, other))
    return ours.keys() == theirs.keys() and all(ours[k].equal(theirs[k]) for k in ours)
