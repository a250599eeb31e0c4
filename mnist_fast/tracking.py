"""A run's records on disk, and on Weights & Biases through Accelerate's tracker.

The disk comes first. `wandb_run` serves W&B in the background; this module alone imports it.
"""

import contextlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

from mnist_fast import checkpoint, wandb_files
from mnist_fast.cli import dump
from mnist_fast.config import TARGET_ACCURACY, Config
from mnist_fast.evaluate import Outcome
from mnist_fast.files import write_atomically
from mnist_fast.records import split_of
from mnist_fast.runtime import Runtime
from mnist_fast.wandb_panels import show_inputs, show_outcome, summarise
from mnist_fast.wandb_run import Show, WandbRun
from mnist_fast.wandb_wishes import ID, is_disabled


class Tracker:
    """Records a run in its folder and on W&B; on every process but the main one it does nothing.

    Attributes:
        wandb_id: the W&B run's id, kept over resumes, or None.
    """

    def __init__(self, config: Config, runtime: Runtime, folder: Path):
        self.config, self.runtime, self.folder = config, runtime, folder
        self.active = runtime.is_main
        self.held_out = split_of(config)
        self.wandb_id: str | None = None
        self._passed = False
        self._records: list[dict[str, Any]] = []
        self._wandb: WandbRun | None = None

    def start(
        self, facts: dict[str, Any], records: list[dict[str, Any]], wandb_id: str | None
    ) -> None:
        """Writes what is known at the start, and lets W&B start in the background.

        Args:
            facts: resolved values that describe the run, for W&B's config.
            records: epochs of an earlier part of this run.
            wandb_id: its W&B id.
        """
        if not self.active:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "config.yaml", dump(self.config))
        write_atomically(self.folder / "metrics.jsonl", "".join(map(_line, records)))
        self._records = list(records)
        self._passed = any(map(self._passes, records))
        self.wandb_id = wandb_id
        if not is_disabled(self.config.wandb):
            self.wandb_id = chosen = self._choose_id(wandb_id)
            self._wandb = WandbRun(self.config, self.runtime, self.folder, chosen, load_wandb)
            self._wandb.start(facts, dict(map(_history_line, records)))

    def log_inputs(self, samples: Any, layers: Any, manifest: Path) -> None:
        """Shows on W&B what goes into the run.

        Args:
            samples: uint8 (2, n, 28, 28), training images before and after augmentation.
            layers: rows of the layer table.
            manifest: the betons' `manifest.json`.
        """

        def show(wandb: Any, run: WandbRun) -> None:
            run.write(0, show_inputs(wandb, samples, layers))
            data = json.loads(manifest.read_text(encoding="utf-8"))
            about = {"train": data["train"], "test": data["test"]}
            run.keep(f"{data['dataset']}-betons", "dataset", [manifest], about, used=True)

        self._show(show)

    def log_epoch(self, record: dict[str, Any]) -> None:
        """Appends one epoch's record to `metrics.jsonl` and sends its numbers to W&B."""
        if not self.active:
            return
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(_line(record))
        self._records.append(record)
        if self._wandb is not None:
            self._wandb.log(*_history_line(record))
        if self._passes(record) and not self._passed:
            self._passed = True
            accuracy = record[f"{self.held_out}_accuracy"]
            self.alert(
                f"{self.held_out} accuracy above {TARGET_ACCURACY} %",
                f"{self.folder.name}: {accuracy:.2f} % in epoch {record['epoch']}",
            )

    def log_checkpoint(self, path: Path, epoch: int) -> None:
        """Keeps a checkpoint, written after `epoch` epochs, as a version of an artifact on W&B."""
        name = f"checkpoint-{self.wandb_id}"
        files = [path / name for name in checkpoint.FILES]

        def show(_: Any, run: WandbRun) -> None:
            with contextlib.suppress(FileNotFoundError, ValueError):  # newer ones replaced it
                run.keep(name, "checkpoint", files, {"epoch": epoch})

        self._show(show)

    def log_outcome(self, outcome: Outcome) -> None:
        """Sends the confusion matrix and a table of the surest of the misread digits to W&B."""
        step = _step(len(self._records)) + 1
        self._show(lambda wandb, run: run.write(step, show_outcome(wandb, outcome, self.held_out)))

    def log_weights(self, weights: Path, summary: dict[str, Any]) -> None:
        """Keeps the final weights as an artifact on W&B, described by the run's summary."""
        keys = ("dataset", "parameters", f"{self.held_out}_accuracy", "git_commit", "data_sha256")
        about = {key: summary[key] for key in keys}
        files = [weights, self.folder / "config.yaml"]
        self._show(lambda _, run: run.keep(f"model-{self.wandb_id}", "model", files, about))

    def alert(self, title: str, text: str, failed: bool = False) -> None:
        """Sends an alert through W&B, to wherever its user set alerts to go."""
        self._show(lambda _, run: run.alert(title, text, failed))

    def finish(self, summary: dict[str, Any]) -> None:
        """Writes `summary.json` and ends the W&B run, waiting for it a limited time."""
        if not self.active:
            return
        self.write_summary(summary)
        self._close(0, summarise(summary, self._records))

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Writes `summary.json`."""
        if self.active:
            write_atomically(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")

    def close(self, exit_code: int) -> None:
        """Ends the W&B run unless it is over, waiting for it a limited time."""
        self._close(exit_code, {})

    def _close(self, exit_code: int, summary: dict[str, Any]) -> None:
        run, self._wandb = self._wandb, None
        if run is not None:
            run.close(exit_code, summary)

    def _choose_id(self, wandb_id: str | None) -> str:
        """The W&B id: that of an earlier part of this run, else what is given, else a new one.

        A run that goes on from another folder's checkpoint is another run there too: both would
        send the same epochs.
        """
        if self.config.resumes_from_outside(self.folder):
            wandb_id = None
        given = os.environ.get("WANDB_RUN_ID", "")
        chosen = wandb_id or (given if ID.fullmatch(given) else None)
        # a try that did not come to a checkpoint left its id in the folder alone
        return chosen or wandb_files.newest_id(self.folder) or secrets.token_hex(4)

    def _show(self, action: Show) -> None:
        if self._wandb is not None:
            self._wandb.show(action)

    def _passes(self, record: dict[str, Any]) -> bool:
        mnist = record.get("dataset", "mnist") == "mnist"  # the goal is no other data set's
        return mnist and record[f"{self.held_out}_accuracy"] >= TARGET_ACCURACY


def load_wandb() -> Any:
    """Imports W&B, which takes most of a second: called in the background.

    Raises:
        ImportError: it is not installed, or broken.
    """
    import wandb
    import wandb.proto.wandb_internal_pb2

    return wandb


def _history_line(record: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """An epoch's step and numbers, as W&B's history has them."""
    numbers = {key: value for key, value in record.items() if isinstance(value, int | float)}
    return _step(record["epoch"]), numbers


def _step(epochs: int) -> int:
    """W&B's `_step` of a line written after so many epochs; the odd ones are for pictures."""
    return 2 * epochs


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"
