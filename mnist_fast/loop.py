"""The training loop: `train(config)` is the whole interface."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import safetensors.torch
import torch
from torch import Tensor

from data_prep import betons
from mnist_fast import checkpoint, files, profiling, progress, report, run_folder, signals
from mnist_fast.augment import MEAN, SD, augment, derive_key
from mnist_fast.checkpoint import Checkpoint
from mnist_fast.config import Config, read_yaml
from mnist_fast.data import ResidentFeed, Sharding, StreamFeed, keep_for_training, read_all, share
from mnist_fast.errors import InputError, RunError, Stopped
from mnist_fast.evaluate import Evaluation, evaluate, inspect
from mnist_fast.model import build_network, count_parameters, layer_table
from mnist_fast.runtime import Runtime, naming_lost_processes
from mnist_fast.schedule import learning_rate
from mnist_fast.step import TrainingStep
from mnist_fast.tracking import Tracker

MAX_SUMMARY = 1_000_000  # bytes of a summary.json, which has about 2,000
RESIDENT_FRACTION = 0.25  # of the device's free memory that a resident data set may take


@dataclasses.dataclass
class Position:
    """Where a run stands: epoch and step of the next batch, and what was measured so far."""

    epoch: int = 0
    step: int = 0
    global_step: int = 0
    epoch_seconds: float = 0.0
    records: list[dict[str, Any]] = dataclasses.field(default_factory=list)


class Training:
    """A run's parts, put together; `run` trains to the end."""

    def __init__(self, config: Config):
        self.config = config
        self.runtime = Runtime(config)
        self.manifest, self.betons = open_betons(config, self.runtime)
        self.dataset: str = self.manifest.dataset
        self.feed, self.evaluation_set = self._open_data()
        self.runtime.seed(config.seed)
        network = build_network(config.network, config.dropout)
        self.runtime.seed_process(config.seed)
        self.step = TrainingStep(config, network, self.runtime, self.feed.sharding)
        # behind all that may be refused: it leaves an empty folder otherwise
        self.folder = self.runtime.on_main(lambda: choose_folder(config, self.dataset))
        self.position = Position()
        self.tracker = Tracker(config, self.runtime, self.folder)
        self.startup_seconds = 0.0
        self.after_step: Callable[[], None] = lambda: None

    def _open_data(self) -> tuple[ResidentFeed | StreamFeed, tuple[Tensor, Tensor, int]]:
        """The training feed; this process's share of the evaluation set, and the set's size."""
        config, runtime = self.config, self.runtime
        held_out = config.validation_split
        total = self.manifest.train.samples
        kept = keep_for_training(total, held_out)
        sharding = Sharding(
            kept, config.batch_size, config.drop_last, runtime.rank, runtime.world_size
        )
        train_path = self.betons / self.manifest.train.file
        feed: ResidentFeed | StreamFeed
        if self._choose_feed(train_path) == "resident":
            images, labels = read_all(train_path, range(sharding.samples), runtime.device)
            feed = ResidentFeed(images, labels, sharding, config.seed)
        else:
            feed = StreamFeed(train_path, sharding, config.seed, runtime.device)
        if held_out:  # the test images are not even opened
            path, first, count = train_path, kept, held_out
        else:
            test = self.manifest.test
            path, first, count = self.betons / test.file, 0, test.samples
        start, stop = share(count, runtime.rank, runtime.world_size)
        images, labels = read_all(path, range(first + start, first + stop), runtime.device)
        return feed, (images, labels, count)

    def _choose_feed(self, beton: Path) -> str:
        if self.config.feed != "auto":
            return self.config.feed
        if self.runtime.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.runtime.device)[0]
        else:
            free = psutil.virtual_memory().available
        return "resident" if beton.stat().st_size <= RESIDENT_FRACTION * free else "stream"

    def run(self) -> dict[str, Any]:
        """Trains from where the run stands to its end; returns the summary."""
        with signals.leaving_at_once():
            wandb_id = self.resume()
        if finished := self.runtime.on_main(self._read_finished):
            self.say(f"{self.folder} is finished: nothing to do")
            return finished
        try:
            with signals.leaving_at_once():
                self.tracker.start(self.facts(), self.position.records, wandb_id)
                self.step.warm_up(self.feed.example())
            if self.runtime.is_main and not self.position.global_step:  # it draws random numbers
                layers = list(layer_table(build_network(self.config.network)))
                self.tracker.log_inputs(self.samples(), layers, self.betons / "manifest.json")
            with profiling.profile(self._profile_folder(), self.say) as self.after_step:
                while self.position.epoch < self.config.epochs:
                    self.run_epoch()
            summary = self.conclude()
        finally:
            self.tracker.close(exit_code=1)
        return summary

    def _read_finished(self) -> dict[str, Any] | None:
        """The summary of a run that is over; None where its end is, or files of it are, missing."""
        if self.position.epoch < self.config.epochs:
            return None
        with contextlib.suppress(OSError, ValueError):
            if (self.folder / "weights.safetensors").is_file():
                return json.loads(files.read_file(self.folder / "summary.json", MAX_SUMMARY))
        return None

    def _profile_folder(self) -> Path | None:
        wanted = self.config.profile and self.runtime.is_main
        return self.folder / "profile" if wanted else None

    def run_epoch(self) -> None:
        """Trains one epoch (or its rest), evaluates, records, saves."""
        position = self.position
        train = self.train_epoch()
        self.runtime.average_buffers(self.step.network)
        if self.step.averaged is not None:
            self.runtime.average_buffers(self.step.averaged)
        images, labels, count = self.evaluation_set
        test = evaluate(self.step.best_network(), images, labels, self.runtime, count)
        self.require_finite(test.loss)  # the epoch's last step may have been the one too far
        record = self.make_record(train, test) | {"gradient_norm": self.step.gradient_norm()}
        position.records.append(record)
        position.epoch, position.step, position.epoch_seconds = position.epoch + 1, 0, 0.0
        self.step.reset_totals()
        self.tracker.log_epoch(record)
        self.say(describe(record, self.config.epochs))
        every = self.config.checkpoint_every
        if position.epoch == self.config.epochs or (every and position.epoch % every == 0):
            self.save()

    def train_epoch(self) -> Evaluation:
        """Trains the rest of the current epoch; returns its training loss and accuracy."""
        position, sharding, config = self.position, self.feed.sharding, self.config
        self.step.start_epoch(position.epoch)
        started = time.perf_counter()
        batches = self.feed.epoch(position.epoch, position.step)
        for batch in self.progress(batches, sharding.steps):
            rate = learning_rate(config, position.global_step, sharding.steps)
            self.step(batch, rate)
            self.after_step()
            position.step += 1
            position.global_step += 1
            if not self.startup_seconds:
                self.startup_seconds = self.measure_startup()
            if self.runtime.agree_to_stop(signals.requested() is not None):
                position.epoch_seconds += time.perf_counter() - started
                self.stop()
        loss, hits, count = self.runtime.sum(self.step.totals).tolist()
        position.epoch_seconds += time.perf_counter() - started
        self.require_finite(loss)
        return Evaluation(loss / count, 100 * hits / count, int(count))

    def require_finite(self, loss: float) -> None:
        """Ends the run where a loss, the same on every process, is not a number or infinite."""
        if not math.isfinite(loss):
            fault = f"the loss is {loss} in epoch {self.position.epoch + 1}: lower --learning_rate"
            self.tracker.alert("Loss is not finite", f"{self.folder.name}: {fault}", failed=True)
            raise RunError(fault, shared=True)

    def progress(self, batches: Any, steps: int) -> Any:
        """The batches, with a bar on the main process's terminal."""
        if not (self.runtime.is_main and sys.stderr.isatty()):
            return batches
        position, epochs = self.position, self.config.epochs
        label = f"epoch {position.epoch + 1}/{epochs}"
        later_steps = (epochs - position.epoch - 1) * steps
        rest = range(position.step, steps)
        return progress.show(batches, label, rest, later_steps, self.step.totals.tolist)

    @torch.inference_mode()
    def samples(self) -> Tensor:
        """The first training images of the run before and after augmentation.

        Returns:
            uint8 (2, n, 28, 28), n at most 32, on the CPU.
        """
        batch = next(iter(self.feed.epoch(0)))
        before = batch.gather_images()[:32]
        positions = torch.arange(batch.position, batch.position + len(before), device=before.device)
        key = torch.tensor(derive_key(self.config.seed, 0, "augment"), device=before.device)
        after = augment(self.config, before, positions, key) * SD + MEAN
        pixels = (after * 255).round().clamp(0, 255).to(torch.uint8)
        return torch.stack([before, pixels])[:, :, 0].cpu()

    def conclude(self) -> dict[str, Any]:
        """Keeps the weights and what they make of the evaluation images; returns the summary."""
        summary, records = self.summarise(), self.position.records
        self.save_weights()
        images, labels, _ = self.evaluation_set
        outcome = inspect(self.step.best_network(), images, labels, self.runtime)
        self.tracker.log_outcome(outcome)
        if self.runtime.is_main:
            report.draw_run(self.folder, self.config, records, outcome, self.samples())
        self.tracker.log_weights(self.folder / "weights.safetensors", summary)
        self.tracker.finish(summary)
        self.say(report.describe_run(self.folder, summary, records))
        return summary

    def measure_startup(self) -> float:
        """Seconds from the start of this process to the end of its first step."""
        self.step.totals.tolist()
        return time.time() - psutil.Process().create_time()

    def stop(self) -> None:
        """Saves a checkpoint and leaves, on a request to stop."""
        self.save()
        raise Stopped(
            f"stopped on request at step {self.position.global_step}; "
            f"go on with the same options and --run_dir {self.folder}",
            shared=True,
        )

    def make_record(self, train: Evaluation, test: Evaluation) -> dict[str, Any]:
        """One epoch's line of `metrics.jsonl`."""
        position = self.position
        held_out = "validation" if self.config.validation_split else "test"
        rate = learning_rate(self.config, position.global_step - 1, self.feed.sharding.steps)
        return {
            "epoch": position.epoch + 1,
            "global_step": position.global_step,
            "dataset": self.dataset,
            "train_loss": train.loss,
            "train_accuracy": train.accuracy,
            f"{held_out}_loss": test.loss,
            f"{held_out}_accuracy": test.accuracy,
            "learning_rate": rate,
            "epoch_seconds": position.epoch_seconds,
            "images_per_second": train.images / position.epoch_seconds,
        }

    def facts(self) -> dict[str, Any]:
        """What describes the run beside its configuration."""
        return {
            "dataset": self.dataset,
            "parameters": count_parameters(self.step.network),
            "world_size": self.runtime.world_size,
            "device": self.runtime.device_name,
            "precision": self.runtime.precision,
            "feed": self.feed.name,
            "step": self.step.mode,
            "git_commit": git_commit(),
            "data_sha256": betons.data_sha256(self.manifest),
        }

    def summarise(self) -> dict[str, Any]:
        """The run's `summary.json`; accuracies in percent, times in seconds."""
        records, config = self.position.records, self.config
        held_out = "validation" if config.validation_split else "test"
        best = max(records, key=lambda record: record[f"{held_out}_accuracy"])
        train_seconds = sum(record["epoch_seconds"] for record in records)
        images = sum(record["epoch_seconds"] * record["images_per_second"] for record in records)
        return self.facts() | {
            "recipe": config.recipe,
            "seed": config.seed,
            "epochs": config.epochs,
            f"{held_out}_accuracy": records[-1][f"{held_out}_accuracy"],
            f"{held_out}_loss": records[-1][f"{held_out}_loss"],
            f"best_{held_out}_accuracy": best[f"{held_out}_accuracy"],
            "best_epoch": best["epoch"],
            f"{held_out}_images": self.evaluation_set[2],
            **self.evaluate_translated(held_out),
            "train_seconds": train_seconds,
            "startup_seconds": self.startup_seconds,
            "images_per_second": images / train_seconds,
            "versions": versions(),
        }

    def evaluate_translated(self, held_out: str) -> dict[str, float]:
        """Accuracy and loss with test-time translations, under names of their own."""
        pixels = self.config.tta
        if not pixels:
            return {}
        images, labels, count = self.evaluation_set
        network = self.step.best_network()
        found = evaluate(network, images, labels, self.runtime, count, pixels)
        return {f"{held_out}_accuracy_tta": found.accuracy, f"{held_out}_loss_tta": found.loss}

    def save(self) -> None:
        """Writes a checkpoint; every process hands in its own state."""
        tensors = self.tensors()
        if self.runtime.is_main:
            state = self.identity() | {
                **dataclasses.asdict(self.position),
                "scaler": self.runtime.scaler_state(),
                "wandb_id": self.tracker.wandb_id,
            }
            path = checkpoint.save(self.folder / "checkpoints", Checkpoint(tensors, state))
            self.tracker.log_checkpoint(path, self.position.epoch)

    def tensors(self) -> dict[str, Tensor]:
        """A checkpoint's tensors: those that all processes share, and each one's own."""
        own = checkpoint.generator_states(self.runtime.device) | self.own_tensors()
        return self.step.state() | {
            f"process/{rank}/{name}": tensor
            for rank, tensors in enumerate(self.runtime.gather(_on_cpu(own)))
            for name, tensor in tensors.items()
        }

    def own_tensors(self) -> dict[str, Tensor]:
        """What this process counted and, until the epoch's end, averaged over its own images."""
        networks = {"network": self.step.network, "averaged": self.step.averaged}
        return {"totals": self.step.totals} | {
            f"{prefix}/{name}": buffer
            for prefix, network in networks.items()
            for name, buffer in (network.named_buffers() if network is not None else ())
        }

    def identity(self) -> dict[str, Any]:
        """What makes it this training and no other."""
        return {
            "config": self.config.as_dict(),
            "data_sha256": betons.data_sha256(self.manifest),
            "world_size": self.runtime.world_size,
            "device": self.runtime.device.type,
            "precision": self.runtime.precision,
            "mode": self.step.mode,
            "steps_per_epoch": self.feed.sharding.steps,
        }

    def resume(self) -> str | None:
        """Goes to where the newest valid checkpoint stood; returns its W&B id."""
        found = self.runtime.on_main(self._find_checkpoint)
        if found is None:
            return None
        checkpoint.check_same_training(found.state, self.identity())
        checkpoint.check_tensors(found.tensors, self.tensors())
        self.step.load_state(found.tensors)
        prefix = f"process/{self.runtime.rank}/"
        own = {k.removeprefix(prefix): v for k, v in found.tensors.items() if k.startswith(prefix)}
        for name, tensor in self.own_tensors().items():
            tensor.copy_(own[name])
        checkpoint.restore_generators(own, self.runtime.device)
        self.runtime.load_scaler_state(found.state["scaler"])
        names = [field.name for field in dataclasses.fields(Position)]
        self.position = Position(**{name: found.state[name] for name in names})
        self.say(f"resumed at epoch {self.position.epoch + 1}, step {self.position.step}")
        return found.state["wandb_id"]

    def _find_checkpoint(self) -> Checkpoint | None:
        wanted = self.config.resume
        found, skipped = self._choose_checkpoint()
        for reason in skipped:
            self.say(f"skipped a checkpoint: {reason}")
        elsewhere = wanted not in ("auto", "never") and (
            self.folder.resolve() not in Path(wanted).resolve().parents
        )
        if found is None or elsewhere:
            check_unused(self.folder, self.config)
        if skipped and not found:
            self.say("no checkpoint is valid: starting from the beginning")
        return found

    def _choose_checkpoint(self) -> tuple[Checkpoint | None, list[str]]:
        """The checkpoint to go on from, and why newer ones are not taken."""
        wanted, folder = self.config.resume, self.folder / "checkpoints"
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: not a folder: move it away, or choose another --run_dir")
        if wanted not in ("auto", "never"):
            try:
                return checkpoint.load(Path(wanted)), []
            except checkpoint.CorruptCheckpointError as error:
                raise InputError(f"--resume: {error}: name a checkpoint's folder") from error
        if wanted == "never":
            if checkpoint.newest_first(folder):
                raise InputError(f"{self.folder} holds a run: choose another --run_dir or --resume")
            return None, []
        return checkpoint.load_newest(folder)

    def save_weights(self) -> None:
        """Writes the final weights as `weights.safetensors`."""
        if self.runtime.is_main:
            weights = _on_cpu(self.step.best_network().state_dict())
            details = {"network": self.config.network, "dataset": self.dataset}
            details["sha256"] = checkpoint.digest(weights)
            temporary = self.folder / ".weights.safetensors"
            content = safetensors.torch.save(weights, metadata=details)
            checkpoint.write_durably(temporary, checkpoint.sort_header(content))
            temporary.replace(self.folder / "weights.safetensors")

    def say(self, message: str) -> None:
        """Prints a line, on the main process."""
        if self.runtime.is_main:
            files.say(message)


@naming_lost_processes()
def train(config: Config) -> dict[str, Any]:
    """Trains a network as configured and returns what `summary.json` holds.

    Raises:
        InputError: bad configuration or data, before anything is trained.
        RunError: the loss is not finite, another process failed, or the disk is full.
        Stopped: a request to stop was obeyed.
    """
    with signals.leaving_at_once():
        training = Training(config)
    runtime = training.runtime
    try:
        with run_folder.reporting(training.folder, runtime.is_main), naming_lost_processes():
            summary = training.run()
    except (InputError, RunError, Stopped) as error:
        if error.shared:  # a launcher ends the main process when the others leave before it
            runtime.wait()
        raise
    runtime.wait()
    runtime.close()
    return summary


def open_betons(config: Config, runtime: Runtime) -> tuple[Any, Path]:
    """The checked manifest and its folder; the main process prepares the data where it is missing.

    Raises:
        InputError: no data, data of another set, or data that fails its checksums.
    """
    folder = runtime.on_main(lambda: find_betons(config))
    manifest = betons.check(folder)
    if config.dataset not in ("auto", manifest.dataset):
        raise InputError(
            f"{folder} holds {manifest.dataset}, not {config.dataset}: "
            f"give --dataset {manifest.dataset}, or another --data_dir"
        )
    return manifest, folder


def find_betons(config: Config) -> Path:
    """The folder of the betons, written first where there is none."""
    root = Path("data/betons")
    names = ["mnist", "digits"] if config.dataset == "auto" else [config.dataset]
    candidates = [Path(config.data_dir)] if config.data_dir else [root / name for name in names]
    for folder in candidates:
        if (folder / "manifest.json").exists():
            return folder
    out = Path(config.data_dir) if config.data_dir else None
    manifest = betons.prepare(config.dataset, None, out)
    return out or root / manifest.dataset


def choose_folder(config: Config, dataset: str) -> Path:
    """The run's folder, made and locked: as configured, or a new one named for the run."""
    name = f"{config.recipe}-{dataset}-seed{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(config.run_dir or run_folder.make_new(Path("runs") / name))
    run_folder.lock(folder)
    return folder


def check_unused(folder: Path, config: Config) -> None:
    """Refuses a folder whose files a run from the beginning would replace.

    Those of an earlier try of the same training may be: it was stopped before its first checkpoint.

    Raises:
        InputError: a file is of another run, or of something else.
    """
    names = ("config.yaml", "metrics.jsonl", "summary.json", "weights.safetensors")
    there = [name for name in names if os.path.lexists(folder / name)]
    if not there:
        return
    remedy = "choose another --run_dir, or move it away"
    if there[0] != "config.yaml":
        raise InputError(f"{folder / there[0]}: not of this run: {remedy}")
    try:
        old = read_yaml(folder / "config.yaml")
    except InputError as error:
        raise InputError(f"{error}: {remedy}") from error
    new = config.as_dict()
    key = checkpoint.different_choice(old, new)
    if key is None and old.get("dataset") != config.dataset:
        key = "dataset"
    if key:
        raise InputError(
            f"{folder} holds a run with {key} {old.get(key)}, this one has {new.get(key)}: {remedy}"
        )


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def describe(record: dict[str, Any], epochs: int) -> str:
    """An epoch's record as one line."""
    held_out = "test" if "test_accuracy" in record else "validation"
    return (
        f"epoch {record['epoch']:>2}/{epochs}"
        f"  train {record['train_accuracy']:.2f} % ({record['train_loss']:.4f})"
        f"  {held_out} {record[f'{held_out}_accuracy']:.2f} % ({record[f'{held_out}_loss']:.4f})"
        f"  {record['epoch_seconds']:.2f} s  {record['images_per_second']:,.0f} images/s"
    )


@functools.cache  # the code that runs was read at the start, whatever is committed meanwhile
def git_commit() -> str | None:
    """Commit of the code that runs, with `-dirty` where tracked files differ; None outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    here = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape the result."""
    names = ("torch", "torchvision", "accelerate", "ffcv", "numpy", "wandb")
    found = {name: version(name) for name in names}
    return {"python": ".".join(map(str, sys.version_info[:3]))} | found


__all__ = ["Training", "train"]
