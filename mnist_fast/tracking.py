"""Metrics to disk, and to Weights & Biases through Accelerate's tracker."""

import contextlib
import json
import os
import secrets
import threading
from pathlib import Path
from typing import Any

from mnist_fast.config import Config, dump
from mnist_fast.runtime import Runtime

PROJECT = "mnist_fast"
INIT_TIMEOUT = 30  # seconds that an unreachable W&B server may cost at the start
FINISH_TIMEOUT = 60.0  # and at the end
TARGET_ACCURACY = 99.4  # percent


class Tracker:
    """Records a run in its folder and on W&B; on every process but the main one it does nothing.

    Attributes:
        wandb_id: the W&B run's id, kept over resumes, or None.
    """

    def __init__(self, config: Config, runtime: Runtime, folder: Path):
        self.config, self.runtime, self.folder = config, runtime, folder
        self.active = runtime.is_main
        self.wandb_id: str | None = None
        self._wandb: Any = None

    def start(
        self, facts: dict[str, Any], records: list[dict[str, Any]], wandb_id: str | None
    ) -> None:
        """Writes what is known at the start.

        Args:
            facts: resolved values that describe the run, for W&B's config.
            records: epochs of an earlier part of this run.
            wandb_id: its W&B id.
        """
        if not self.active:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        dump(self.config, self.folder / "config.yaml")
        write_atomically(self.folder / "metrics.jsonl", "".join(map(_line, records)))
        self._start_wandb(facts, wandb_id)

    def log_epoch(self, record: dict[str, Any]) -> None:
        """Appends one epoch's record to `metrics.jsonl` and sends its numbers to W&B."""
        if not self.active:
            return
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(_line(record))
        numbers = {key: value for key, value in record.items() if not isinstance(value, str)}
        self._guard(lambda: self.runtime.log(numbers))

    def finish(self, summary: dict[str, Any]) -> None:
        """Writes `summary.json` and ends the W&B run, waiting for it a limited time."""
        if not self.active:
            return
        write_atomically(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        self._guard(lambda: self._wandb.summary.update(summary))
        self.close(exit_code=0)

    def close(self, exit_code: int) -> None:
        """Ends the W&B run; gives up on a server that does not answer."""
        if self._wandb is None:
            return
        run, self._wandb = self._wandb, None
        thread = threading.Thread(target=_finish_quietly, args=(run, exit_code), daemon=True)
        thread.start()
        thread.join(FINISH_TIMEOUT)
        if thread.is_alive():
            self._say("W&B does not answer; its files are kept, upload them with `wandb sync`")

    def _start_wandb(self, facts: dict[str, Any], wandb_id: str | None) -> None:
        mode = self.config.wandb
        if mode == "disabled":
            return
        try:
            import wandb
        except ImportError as error:
            self._say(f"W&B cannot be imported ({error}); metrics go to {self.folder} alone")
            return
        if mode == "auto":
            mode = "online" if _has_key(wandb) else "offline"
        self.wandb_id = wandb_id or secrets.token_hex(4)
        for attempt in ("online", "offline") if mode == "online" else ("offline",):
            try:
                self._wandb = self._init(wandb, attempt, facts)
                break
            except Exception as error:  # whatever W&B raises, training goes on
                self._say(f"W&B {attempt} failed: {_first_line(error)}")
        if self._wandb is None:
            self._say(f"training goes on without W&B; metrics are in {self.folder}")
        elif attempt == "offline":
            self._say(f"W&B is offline; upload later: wandb sync {Path(self._wandb.dir).parent}")

    def _init(self, wandb: Any, mode: str, facts: dict[str, Any]) -> Any:
        settings = {
            "name": self.folder.name,
            "dir": str(self.folder),
            "mode": mode,
            "id": self.wandb_id,
            "resume": "allow",
            "config": self.config.as_dict() | facts,
            "settings": wandb.Settings(init_timeout=INIT_TIMEOUT, silent=True, console="off"),
        }
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        run = self.runtime.start_tracker(project, settings)
        run.define_metric("epoch")
        run.define_metric("*", step_metric="epoch")
        for name, summary in {"accuracy": "max", "loss": "min"}.items():
            run.define_metric(f"test_{name}", step_metric="epoch", summary=summary)
            run.define_metric(f"train_{name}", step_metric="epoch", summary=summary)
        return run

    def _guard(self, action: Any) -> None:
        """Calls W&B; a failure is said and ends W&B's part, never the training."""
        if self._wandb is None:
            return
        try:
            action()
        except Exception as error:
            self._say(f"W&B failed and is left out from here on: {_first_line(error)}")
            self._wandb = None

    def _say(self, message: str) -> None:
        print(f"tracking: {message}", flush=True)


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file in one step: readers see the old or the new content."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _has_key(wandb: Any) -> bool:
    """Whether a W&B key is at hand, in the environment or in the netrc file."""
    with contextlib.suppress(Exception):
        return bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)
    return False


def _finish_quietly(run: Any, exit_code: int) -> None:
    with contextlib.suppress(Exception):
        run.finish(exit_code=exit_code)
