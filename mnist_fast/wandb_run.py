"""One run on W&B, served by a thread of its own: whatever W&B does, training goes on.

The thread loads W&B, starts it as its user wishes or else offline, and hands it what there is.
Training waits for it at the end alone, and there for a limited time.
"""

import contextlib
import logging
import os
import queue
import shlex
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mnist_fast import wandb_files
from mnist_fast.config import Config
from mnist_fast.errors import one_line
from mnist_fast.files import say
from mnist_fast.runtime import Runtime
from mnist_fast.wandb_panels import SUMMARISED, slurm_facts
from mnist_fast.wandb_wishes import FINISH_TIMEOUT, Wishes, read_wishes

# Seconds. Whatever hangs, W&B costs a run 20 s at most: online CLOSE_TIMEOUT at its end, and after
# that FINISH_TIMEOUT in W&B's own exit handler; where it is not online, OFFLINE_TIMEOUT.
EXTRA_TIMEOUT = 5.0  # for pictures and files that still wait for the server at the end
SLACK = 2.0  # for what W&B does itself
CLOSE_TIMEOUT = EXTRA_TIMEOUT + FINISH_TIMEOUT + SLACK
OFFLINE_TIMEOUT = CLOSE_TIMEOUT + FINISH_TIMEOUT  # for a start that fails and one offline
TEARDOWN_TIMEOUT = 5.0  # for W&B's service to go after a failure

Show = Callable[[Any, "WandbRun"], None]  # shows something, given W&B's module and the run


class WandbRun:
    """Starts a run on W&B in the background, writes to it, and ends it.

    Every line of history has a `_step` of its own, which it keeps over resumes. So a line that the
    server or the file of an earlier part holds is told from one that was lost, which is sent again.

    Args:
        config: of the run.
        runtime: holds Accelerate's tracker.
        folder: of the run.
        run_id: W&B's id of the run.
        load: imports W&B.
    """

    def __init__(
        self, config: Config, runtime: Runtime, folder: Path, run_id: str, load: Callable[[], Any]
    ):
        self.config, self.runtime, self.folder, self._load = config, runtime, folder, load
        self._id = run_id
        self._lines: dict[int, dict[str, Any]] = {}  # of history, by step
        self._held: Callable[[int], bool] = lambda step: False
        self._earlier: list[wandb_files.Part] = []
        self._place: Path | None = None  # of this part
        self._module: Any = None
        self._run: Any = None
        self._wishes: Wishes | None = None
        self._started_over = self._finishing = self._uploaded = False
        self._shows = True  # pictures and files
        self._begun = self._opened = 0.0  # by time.monotonic
        self._data_dir = os.environ.get("WANDB_DATA_DIR")
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def start(self, facts: dict[str, Any], lines: dict[int, dict[str, Any]]) -> None:
        """Starts W&B in the background.

        Args:
            facts: values for W&B's config beside the run's own.
            lines: history of an earlier part of this run, by step.
        """
        self._facts, self._lines = facts, lines
        # W&B keeps copies of tables and artifacts there; `wandb sync` needs them
        os.environ["WANDB_DATA_DIR"] = self._data_dir or str((self.folder / "wandb").resolve())
        self._queue.put(self._open)
        self._thread.start()

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Sends a line of history."""
        self._queue.put(lambda: self._log(step, values))

    def show(self, action: Show) -> None:
        """Calls an action when all that came before is done.

        Pictures and files make W&B's client wait for the server. After a failure there are no more.
        """
        self._queue.put(lambda: self._show(action))

    def close(self, exit_code: int, summary: dict[str, Any]) -> None:
        """Ends the run, waiting for it a limited time; says what is to be uploaded later."""
        self._queue.put(lambda: self._finish(exit_code, summary))
        self._queue.put(None)
        over = self._wait()
        if self._data_dir is None:
            os.environ.pop("WANDB_DATA_DIR", None)
        self._conclude(over)

    # For actions that show something

    def write(self, step: int, data: dict[str, Any]) -> None:
        """Sends a line of history that holds pictures or tables."""
        if not self._held(step):
            self._run.log(data, step=step, commit=True)

    def keep(
        self, name: str, kind: str, files: list[Path], about: dict[str, Any], used: bool = False
    ) -> None:
        """Logs files as an artifact: as this run's output, or as its input (`used`).

        Inputs are outputs offline, where W&B cannot ask the server for their earlier versions.
        """
        artifact = self._module.Artifact(name, type=kind, metadata=about)
        for file in files:
            artifact.add_file(str(file))
        if used and not self._run.offline:
            self._run.use_artifact(artifact)
        else:
            self._run.log_artifact(artifact)

    def alert(self, title: str, text: str, failed: bool) -> None:
        """Sends an alert."""
        levels = self._module.AlertLevel
        self._run.alert(title, text, level=levels.ERROR if failed else levels.INFO)

    # In the thread

    def _work(self) -> None:
        while (action := self._queue.get()) is not None:
            action()

    def _open(self) -> None:
        """Starts W&B as wished, else offline."""
        self._begun = time.monotonic()
        try:
            self._module = self._load()
        except Exception as error:  # whatever W&B raises, training goes on
            self._say(f"W&B cannot be imported ({_reason(error)}): metrics go to {self.folder}")
            return
        logging.raiseExceptions = False  # W&B's own log on a full disk: no traceback for each line
        os.environ.pop("WANDB_SERVICE", None)  # of a program that may have ended: start our own
        try:
            wishes = self._wishes = self._wishes or self._read_wishes()
        except Exception as error:
            self._say(f"W&B cannot start ({_reason(error)}): metrics go to {self.folder}")
            return
        modes = {"online": ("online", "offline"), "offline": ("offline",)}.get(wishes.mode, ())
        if modes and not any(self._open_as(mode, wishes) for mode in modes):
            self._say(f"training goes on without W&B; metrics are in {self.folder}")

    def _read_wishes(self) -> Wishes:
        wishes = read_wishes(self._module, self.config, self.folder.name)
        for fault in wishes.faults:
            self._say(f"W&B is kept offline: {fault}")
        return wishes

    def _open_as(self, mode: str, wishes: Wishes) -> bool:
        """Starts W&B in a mode and sends what it lacks; False where it could not."""
        try:
            self._module.setup(self._module.Settings(mode=mode, **wishes.settings))
            parse = self._module.proto.wandb_internal_pb2.Record.FromString
            self._earlier = wandb_files.tidy_parts(self.folder, self._id, parse)
            self._run, self._opened = self._init(mode, wishes), time.monotonic()
            self._place = Path(self._run.sync_dir)
            self._held = self._find_held()
            for step, values in self._lines.items():
                self._send(step, values)
        except Exception as error:
            self._run = self._place = None
            self._say(f"W&B {mode} failed: {_reason(error)}")
            _bounded(self._module.teardown, TEARDOWN_TIMEOUT)  # else the run's id stays in use
            return False
        if not self._run.offline:
            self._tell(f"W&B shows this run at {self._run.url}")
        return True

    def _init(self, mode: str, wishes: Wishes) -> Any:
        settings = wishes.identity | {
            "dir": str(self.folder),
            "mode": mode,
            "id": self._id,
            "resume": "allow",
            "config": self.config.as_dict() | self._facts | {"slurm": slurm_facts()},
        }
        project = settings.pop("project")
        run = self.runtime.start_tracker(project, settings)
        run.define_metric("epoch")
        run.define_metric("global_step")
        run.define_metric("*", step_metric="epoch")
        run.define_metric("learning_rate", step_metric="global_step")
        for name in SUMMARISED:
            step = "global_step" if name == "gradient_norm" else "epoch"
            run.define_metric(name, step_metric=step, summary="min,max,last")
        return run

    def _find_held(self) -> Callable[[int], bool]:
        """Whether a line, by its step, is on the server or will get there by `wandb sync`."""
        if not self._run.offline:
            first = self._run.starting_step
            return lambda step: step < first
        steps = set().union(*(part.steps for part in self._earlier if part.reliable))
        return lambda step: step in steps

    def _log(self, step: int, values: dict[str, Any]) -> None:
        self._lines[step] = values
        if self._run is None:
            return
        try:
            self._send(step, values)
        except Exception as error:
            self._start_over(error)

    def _send(self, step: int, values: dict[str, Any]) -> None:
        if not self._held(step):
            self.runtime.log(values, step)

    def _start_over(self, error: Exception) -> None:
        """Starts W&B once more after a failure; what it lacks then is sent again."""
        run, self._run = self._run, None
        _bounded(lambda: run.finish(exit_code=1), TEARDOWN_TIMEOUT)
        _bounded(self._module.teardown, TEARDOWN_TIMEOUT)
        if self._started_over:
            self._say(f"W&B failed and is disabled for the rest of the run: {_reason(error)}")
            return
        self._started_over = self._shows = True
        self._say(f"W&B failed and is started again: {_reason(error)}")
        self._open()

    def _show(self, action: Show) -> None:
        if self._run is None or not self._shows:
            return
        try:
            action(self._module, self)
        except Exception as error:
            if self._shows:
                self._say(f"W&B gets no more pictures and files: {_reason(error)}")
            self._shows = False

    def _finish(self, exit_code: int, summary: dict[str, Any]) -> None:
        self._finishing = True
        if self._run is not None:
            with contextlib.suppress(Exception):  # TimeoutError: the server does not take the rest
                self._run.summary.update(summary)
                self._run.finish(exit_code=exit_code)
                self._uploaded = not self._run.offline
        if self._module is not None:  # its service writes the last; the next run reads wishes anew
            _bounded(self._module.teardown, TEARDOWN_TIMEOUT)

    # The end

    def _wait(self) -> bool:
        """Waits until the thread is through, a limited time; whether it is.

        A picture that still waits for the server is given up first: another thread goes on with
        what is left.
        """
        closing = time.monotonic()
        while self._thread.is_alive():
            run = self._run
            online = run is not None and not run.offline
            limit = closing + (CLOSE_TIMEOUT if online else OFFLINE_TIMEOUT)
            limit += self._time_given(closing)
            if time.monotonic() > limit:
                return False
            if self._is_stuck(closing, limit):
                self._shows = False
                self._queue.put(None)  # one for each thread
                self._thread = threading.Thread(target=self._work, daemon=True)
                self._thread.start()
            self._thread.join(0.05)
        return True

    def _is_stuck(self, closing: float, limit: float) -> bool:
        """Whether a picture that waits for the server keeps the run from its end for too long."""
        run = self._run
        if run is None or run.offline or self._finishing or not self._shows:
            return False
        patience = max(closing, self._opened) + EXTRA_TIMEOUT
        return time.monotonic() > min(patience, limit - FINISH_TIMEOUT - SLACK)

    def _time_given(self, closing: float) -> float:
        """Seconds that the user gives W&B beyond ours, from a moment on."""
        if self._wishes is None:
            return 0.0
        start = self._begun + (self._wishes.init_timeout or 0.0) - closing
        return max(0.0, start) + max(0.0, self._wishes.settings["finish_timeout"] - FINISH_TIMEOUT)

    def _conclude(self, over: bool) -> None:
        """Says what `wandb sync` is to upload, and marks what it need not."""
        if not over:
            self._say("W&B does not answer in time: going on without it")
        offline = self._run is None or self._run.offline
        if not offline:  # this part holds, or the server got, what the earlier ones held
            wandb_files.mark_uploaded(part.file for part in self._earlier)
        if self._uploaded and self._place:
            wandb_files.mark_uploaded(self._place.glob("run-*.wandb"))
        waiting = [part.folder for part in self._earlier if part.reliable and not part.uploaded]
        if self._place and not self._uploaded:
            waiting.append(self._place)
        if waiting:
            folders = " ".join(shlex.quote(str(folder.absolute())) for folder in waiting)
            what = "is offline" if offline else "did not get everything"
            self._tell(f"W&B {what}; upload later: wandb sync {folders}")

    def _say(self, message: str) -> None:
        say(f"tracking: {message}")

    def _tell(self, message: str) -> None:
        """Says what is no fault, unless the user wants W&B to be silent."""
        if not (self._wishes and self._wishes.silent):
            self._say(message)


def _reason(error: Exception) -> str:
    return one_line(error)[:300]


def _bounded(action: Callable[[], object], seconds: float) -> None:
    """Calls W&B and waits for it a limited time; whatever it raises is no matter."""

    def act() -> None:
        with contextlib.suppress(Exception):
            action()

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)
