"""Metrics to disk, and to Weights & Biases through Accelerate's tracker."""

import contextlib
import json
import logging
import os
import secrets
import shlex
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mnist_fast.cli import dump
from mnist_fast.config import TARGET_ACCURACY, Config
from mnist_fast.errors import one_line
from mnist_fast.evaluate import Outcome
from mnist_fast.files import say, write_atomically
from mnist_fast.model import LayerRow
from mnist_fast.runtime import Runtime

PROJECT = "mnist_fast"
INIT_TIMEOUT = 20.0  # seconds that an unreachable W&B server may cost at the start
FINISH_TIMEOUT = 60.0  # and at the end
PATIENCE = 15.0  # a call that took longer was the last one: without a server each takes 20 s
MODES = ("online", "offline", "disabled")
DIGITS = list("0123456789")
SLURM = (
    *("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"),
    *("SLURM_NNODES", "SLURM_NTASKS", "SLURM_RESTART_COUNT", "SLURM_JOB_NODELIST"),
)


class Tracker:
    """Records a run in its folder and on W&B; on every process but the main one it does nothing.

    Attributes:
        wandb_id: the W&B run's id, kept over resumes, or None.
    """

    def __init__(self, config: Config, runtime: Runtime, folder: Path):
        self.config, self.runtime, self.folder = config, runtime, folder
        self.active = runtime.is_main
        self.held_out = "validation" if config.validation_split else "test"
        self.wandb_id: str | None = None
        self._passed = False
        self._records: list[dict[str, Any]] = []
        self._wandb: Any = None  # the module, while a run is open
        self._run: Any = None

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
        write_atomically(self.folder / "config.yaml", dump(self.config))
        write_atomically(self.folder / "metrics.jsonl", "".join(map(_line, records)))
        self._records = list(records)
        self._passed = any(map(self._passes, records))
        self._start_wandb(facts, wandb_id)

    def log_inputs(self, samples: Any, layers: Sequence[LayerRow], manifest: Path) -> None:
        """Shows on W&B what goes into the run.

        Args:
            samples: uint8 (2, n, 28, 28), training images before and after augmentation.
            layers: rows of the layer table.
            manifest: the betons' `manifest.json`.
        """

        def act() -> None:
            image = self._wandb.Image(
                tile(samples[1]), caption="the first training images as the network sees them"
            )
            columns = ["#", "layer", "kernel", "stride", "padding", "output"]
            columns += ["receptive field", "jump", "parameters"]
            table = self._wandb.Table(
                columns=columns,
                data=[[number, *_cells(layer)] for number, layer in enumerate(layers, start=1)],
            )
            self._run.log({"augmented_batch": image, "layers": table})
            data = json.loads(manifest.read_text(encoding="utf-8"))
            name, about = (
                f"{data['dataset']}-betons",
                {"train": data["train"], "test": data["test"]},
            )
            self._artifact(name, "dataset", [manifest], about, used=True)

        self._guard(act)

    def log_epoch(self, record: dict[str, Any]) -> None:
        """Appends one epoch's record to `metrics.jsonl` and sends its numbers to W&B."""
        if not self.active:
            return
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(_line(record))
        self._records.append(record)
        numbers = {key: value for key, value in record.items() if isinstance(value, int | float)}
        self._guard(lambda: self.runtime.log(numbers))
        if self._passes(record) and not self._passed:
            self._passed = True
            accuracy = record[f"{self.held_out}_accuracy"]
            self.alert(
                f"{self.held_out} accuracy above {TARGET_ACCURACY} %",
                f"{self.folder.name}: {accuracy:.2f} % in epoch {record['epoch']}",
            )

    def log_checkpoint(self, path: Path, epoch: int) -> None:
        """Keeps a checkpoint, written after `epoch` epochs, as a version of an artifact on W&B."""
        files = sorted(path.iterdir()) if self._run is not None else []
        name = f"checkpoint-{self.wandb_id}"
        self._guard(lambda: self._artifact(name, "checkpoint", files, {"epoch": epoch}))

    def log_outcome(self, outcome: Outcome) -> None:
        """Sends the confusion matrix and a table of the surest of the misread digits to W&B."""

        def act() -> None:
            wandb = self._wandb
            matrix = wandb.plot.confusion_matrix(
                y_true=outcome.labels.tolist(),
                preds=outcome.predictions.tolist(),
                class_names=DIGITS,
                title=f"{self.held_out} images by label and prediction",
            )
            table = wandb.Table(columns=["position", "image", "label", "prediction", "probability"])
            columns = (outcome.misread, outcome.probabilities)
            values = zip(outcome.images, *(column.tolist() for column in columns), strict=True)
            for image, position, probability in values:
                label, guess = outcome.labels[position], outcome.predictions[position]
                row = (int(label), int(guess), probability)
                table.add_data(position, wandb.Image(image.numpy()), *row)
            self._run.log({"confusion_matrix": matrix, "misread": table})

        self._guard(act)

    def log_weights(self, weights: Path, summary: dict[str, Any]) -> None:
        """Keeps the final weights as an artifact on W&B, described by the run's summary."""
        keys = ("dataset", "parameters", f"{self.held_out}_accuracy", "git_commit", "data_sha256")
        about = {key: summary[key] for key in keys}
        files = [weights, self.folder / "config.yaml"]
        self._guard(lambda: self._artifact(f"model-{self.wandb_id}", "model", files, about))

    def alert(self, title: str, text: str, failed: bool = False) -> None:
        """Sends an alert through W&B, to wherever its user set alerts to go."""

        def act() -> None:
            levels = self._wandb.AlertLevel
            self._run.alert(title, text, level=levels.ERROR if failed else levels.INFO)

        self._guard(act)

    def finish(self, summary: dict[str, Any]) -> None:
        """Writes `summary.json` and ends the W&B run, waiting for it a limited time."""
        if not self.active:
            return
        self.write_summary(summary)
        self._guard(lambda: self._run.summary.update(summarise(summary, self._records)))
        self.close(exit_code=0)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Writes `summary.json`."""
        if self.active:
            write_atomically(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")

    def close(self, exit_code: int) -> None:
        """Ends the W&B run; gives up on a server that does not answer."""
        if self._run is None:
            return
        run, self._run = self._run, None
        if not _bounded(lambda: run.finish(exit_code=exit_code), FINISH_TIMEOUT):
            self._say("W&B does not answer; its files are kept, upload them with `wandb sync`")

    def _passes(self, record: dict[str, Any]) -> bool:
        mnist = record.get("dataset", "mnist") == "mnist"  # the goal is no other data set's
        return mnist and record[f"{self.held_out}_accuracy"] >= TARGET_ACCURACY

    # W&B

    def _start_wandb(self, facts: dict[str, Any], wandb_id: str | None) -> None:
        mode = self._choose_mode()
        if mode == "disabled":
            return
        try:
            import wandb
        except ImportError as error:
            self._say(f"W&B cannot be imported ({error}); metrics go to {self.folder} alone")
            return
        logging.raiseExceptions = False  # W&B's own log on a full disk: no traceback for each line
        if mode == "auto":
            mode = "online" if _has_key(wandb) else "offline"
        # a sweep's agent has chosen an id already
        self.wandb_id = wandb_id or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        for attempt in ("online", "offline") if mode == "online" else ("offline",):
            try:
                self._run = self._init(wandb, attempt, facts)
                break
            except Exception as error:  # whatever W&B raises, training goes on
                self._say(f"W&B {attempt} failed: {one_line(error)[:300]}")
                _bounded(wandb.teardown, INIT_TIMEOUT)  # else the run's id stays in use
        if self._run is None:
            self._say(f"training goes on without W&B; metrics are in {self.folder}")
            return
        self._wandb = wandb
        if attempt == "offline":
            folder = shlex.quote(str(Path(self._run.dir).parent))
            self._say(f"W&B is offline; upload later: wandb sync {folder}")
        else:
            self._say(f"W&B shows this run at {self._run.url}")

    def _choose_mode(self) -> str:
        """The mode by option, else by WANDB_MODE, else auto."""
        wanted = os.environ.get("WANDB_MODE", "").strip().lower()
        if self.config.wandb != "auto" or not wanted:
            return self.config.wandb
        if wanted not in MODES:
            self._say(f"WANDB_MODE={wanted} is not one of {', '.join(MODES)} and is left out")
            return "auto"
        return wanted

    def _init(self, wandb: Any, mode: str, facts: dict[str, Any]) -> Any:
        settings = self._identity() | {
            "dir": str(self.folder),
            "mode": mode,
            "id": self.wandb_id,
            "resume": "allow",
            "config": self.config.as_dict() | facts | {"slurm": slurm_facts()},
            "settings": wandb.Settings(init_timeout=INIT_TIMEOUT, silent=True, console="off"),
        }
        project = self.config.wandb_project or os.environ.get("WANDB_PROJECT") or PROJECT
        run = self.runtime.start_tracker(project, settings)
        run.define_metric("epoch")
        run.define_metric("global_step")
        run.define_metric("*", step_metric="epoch")
        run.define_metric("learning_rate", step_metric="global_step")
        for name in SUMMARISED:
            step = "global_step" if name == "gradient_norm" else "epoch"
            run.define_metric(name, step_metric=step, summary="min,max,last")
        return run

    def _identity(self) -> dict[str, Any]:
        """What the run is called; what is not given W&B takes from the environment by itself."""
        config = self.config
        tags = [tag.strip() for tag in (config.wandb_tags or "").split(",")]
        given = {
            "name": config.wandb_name or os.environ.get("WANDB_NAME") or self.folder.name,
            "job_type": config.wandb_job_type or os.environ.get("WANDB_JOB_TYPE") or "train",
            "entity": config.wandb_entity,
            "group": config.wandb_group,
            "tags": [tag for tag in tags if tag],
            "notes": config.wandb_notes,
        }
        return {key: value for key, value in given.items() if value}

    def _artifact(
        self, name: str, kind: str, files: list[Path], about: dict[str, Any], used: bool = False
    ) -> None:
        """Logs files as an artifact: as this run's output, or as its input (`used`).

        Inputs are outputs offline, where W&B cannot ask the server for their earlier versions.
        """
        artifact = self._wandb.Artifact(name, type=kind, metadata=about)
        for file in files:
            artifact.add_file(str(file))
        if used and not self._run.offline:
            self._run.use_artifact(artifact)
        else:
            self._run.log_artifact(artifact)

    def _guard(self, action: Callable[[], None]) -> None:
        """Calls W&B; a failure is said and ends W&B's part, never the training."""
        if self._run is None:
            return
        started = time.monotonic()
        try:
            with _data_folder(self.folder / "wandb"):
                action()
            if time.monotonic() - started > PATIENCE:
                raise TimeoutError("it does not answer; upload its files with `wandb sync`")
        except Exception as error:
            self._say(f"W&B failed and is left out from here on: {one_line(error)[:300]}")
            self.close(exit_code=1)

    def _say(self, message: str) -> None:
        say(f"tracking: {message}")


# Validation metrics keep plain numbers in W&B's summary: a sweep reads them there.
SUMMARISED = (
    *("train_accuracy", "test_accuracy", "train_loss", "test_loss"),
    *("gradient_norm", "epoch_seconds", "images_per_second"),
)


def summarise(summary: dict[str, Any], records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What W&B's summary is to hold at the end.

    `min`, `max` and `last` of the summarised metrics are over all epochs, because W&B counts those
    since the last resume alone in an offline run; what `summary.json` says under the same name, of
    the whole run, stands under `final/`.
    """
    whole = {f"final/{key}" if key in SUMMARISED else key: summary[key] for key in summary}
    for name in SUMMARISED:
        if values := [r[name] for r in records if r.get(name) is not None]:
            whole[name] = {"min": min(values), "max": max(values), "last": values[-1]}
    return whole


def tile(images: Any, columns: int = 8) -> Any:
    """Lays uint8 images (n, 28, 28) out in rows, one white pixel apart; unused places are white."""
    import numpy as np

    count, height, width = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + 1), index % columns * (width + 1)
        sheet[top : top + height, left : left + width] = image
    return sheet


def slurm_facts() -> dict[str, str]:
    """What SLURM says about the job, by variable in lower case; empty outside a job."""
    return {name.lower(): os.environ[name] for name in SLURM if name in os.environ}


@contextlib.contextmanager
def _data_folder(folder: Path) -> Any:
    """Keeps W&B's copies of tables and artifacts, which `wandb sync` needs, with the run."""
    before = os.environ.get("WANDB_DATA_DIR")
    os.environ["WANDB_DATA_DIR"] = before or str(folder.resolve())
    try:
        yield
    finally:
        if before is None:
            del os.environ["WANDB_DATA_DIR"]


def _cells(layer: LayerRow) -> list[Any]:
    output = "x".join(map(str, layer.output_shape))
    sides = [layer.name, layer.kernel, layer.stride, layer.padding, output]
    return [*sides, layer.receptive_field, layer.jump, layer.parameters]


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


def _has_key(wandb: Any) -> bool:
    """Whether a W&B key is at hand, in the environment or in the netrc file."""
    with contextlib.suppress(Exception):
        return bool(os.environ.get("WANDB_API_KEY") or wandb.login(prompt=False, verify=False))
    return False


def _bounded(action: Callable[[], object], seconds: float) -> bool:
    """Calls W&B and whatever it raises is no matter; False if it has not returned in time."""

    def act() -> None:
        with contextlib.suppress(Exception):
            action()

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()
