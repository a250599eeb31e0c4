"""The training loop: `train(config)` is the whole interface."""

import math
import time
from collections.abc import Callable

from mnist_fast import (
    checkpoint,
    datasets,
    figures,
    profiling,
    progress,
    provenance,
    records,
    report,
    resume,
    run_folder,
    signals,
    steps,
    timing,
)
from mnist_fast.config import Config
from mnist_fast.errors import InputError, RunError, Stopped
from mnist_fast.model import build_network, check_name, count_parameters, layer_table
from mnist_fast.records import Evaluation, Record
from mnist_fast.resume import Identity, Progress
from mnist_fast.runtime import Runtime, naming_lost_processes
from mnist_fast.schedule import learning_rate
from mnist_fast.steps import Settings, TrainState
from mnist_fast.tracking import Tracker


@naming_lost_processes()  # also where a process is lost before the run has a folder
def train(config: Config) -> Record:
    """Trains a network as configured and returns what `summary.json` holds.

    Raises:
        InputError: bad configuration or data, before anything is trained.
        RunError: the loss is not finite, another process failed, or the disk is full.
        Stopped: a request to stop was obeyed.
    """
    with signals.leaving_at_once():
        run = Run(config)
    runtime = run.runtime
    try:
        with run_folder.reporting(run.folder, runtime.is_main), naming_lost_processes():
            summary = run.train()
    except (InputError, RunError, Stopped) as error:
        if error.shared:  # a launcher ends the main process when the others leave before it
            runtime.wait()
            run.step.close()
        raise
    runtime.wait()
    run.step.close()
    runtime.close()
    return summary


class Run:
    """A run's parts, put together; `train` trains to the end."""

    def __init__(self, config: Config):
        steps.check_name(config.step)
        check_name(config.network)
        resume.check_exists(config)
        self.parts = timing.Parts()
        self.parts.end("imports")
        self.config = config
        self.runtime = runtime = Runtime(config)
        self.parts.end("start")
        self.data = datasets.open_data(config, runtime)
        self.parts.end("data")
        runtime.seed(config.seed)
        network = build_network(config.network, config.dropout)
        self.plan = steps.plan(config, network, runtime, self.data.sharding)
        runtime.set_precision(self.plan.job.precision)
        runtime.seed_process(config.seed)
        self.state = TrainState(config, network, runtime.device)
        self.step = self.plan.build(self.state, runtime)
        # after all that may be refused: it leaves an empty folder otherwise
        dataset = self.data.manifest.dataset
        self.folder = runtime.on_main(lambda: run_folder.choose(config, dataset))
        mode, data = self.plan.mode.name, self.data.sha256
        self.identity = Identity.of(self.plan.job, mode, data, runtime.threads)
        self.facts = self.find_facts()
        self.progress = Progress()
        self.tracker = Tracker(config, runtime, self.folder)
        self.startup_seconds = 0.0
        self.parts.end("compile")
        self.after_step: Callable[[], None] = lambda: None

    # The run

    def train(self) -> Record:
        """Trains from where the run stands to its end; returns the summary."""
        with signals.leaving_at_once():
            wandb_id = self.restore()
        self.parts.end("checkpoints")
        if finished := self.find_end():
            self.runtime.say(f"{self.folder} is finished: nothing to do")
            return finished
        self.runtime.say(self.plan.describe())
        try:
            with signals.leaving_at_once():
                self.set_out(wandb_id)
            profile = self.config.profile and self.runtime.is_main
            folder = self.folder / "profile" if profile else None
            say = self.runtime.say
            with profiling.profile(folder, self.runtime.device, say) as self.after_step:
                while self.progress.epoch < self.config.epochs:
                    self.run_epoch()
            return self.conclude()
        finally:
            self.tracker.close(exit_code=1)

    def set_out(self, wandb_id: str | None) -> None:
        """Starts the tracker, compiles and shows what the network will see."""
        self.tracker.start(self.facts, self.progress.records, wandb_id)
        self.parts.end("tracker")
        self.step.warm_up(self.data.feed.example())
        self.parts.end("compile")
        first = not self.progress.global_step
        if self.runtime.is_main and (first or figures.samples_missing(self.folder)):
            samples = datasets.preview(self.config, self.data.feed)
            figures.draw_samples(self.folder, samples)
            self.parts.end("figures")
            if first:
                # draws random numbers: every start from the beginning has to
                layers = list(layer_table(build_network(self.config.network)))
                self.tracker.log_inputs(samples, layers, self.data.folder / "manifest.json")
            self.parts.end("tracker")

    def restore(self) -> str | None:
        """Restores the newest valid checkpoint, if there is one; returns its W&B id."""
        say = self.runtime.say
        found = self.runtime.on_main(lambda: resume.find(self.config, self.folder, say))
        if found is None:
            return None
        self.progress = resume.restore(found, self.identity, self.state, self.step, self.runtime)
        say(f"resumed at epoch {self.progress.epoch + 1}, step {self.progress.step}")
        if difference := resume.different_rounding(found.state, self.identity):
            say(f"resumed: {difference}")
        return found.state["wandb_id"]

    def find_end(self) -> Record | None:
        """The summary of a run that has nothing left to do; None where something is left."""
        epochs = self.config.epochs
        if self.progress.epoch < epochs:
            return None
        return self.runtime.on_main(lambda: run_folder.read_summary(self.folder, epochs))

    def conclude(self) -> Record:
        """Saves the weights, the results and the summary; returns the summary."""
        summary, network = self.summarise(), self.state.best_network()
        weights = self.folder / "weights.safetensors"
        if self.runtime.is_main:
            about = {"network": self.config.network, "dataset": self.data.manifest.dataset}
            checkpoint.save_weights(weights, network.state_dict(), about)
        outcome = self.data.evaluation_set.inspect(network, self.runtime)
        self.parts.end("evaluation")
        if self.runtime.is_main:
            drawn = (self.config, self.data.sharding.steps, self.progress.records, outcome)
            figures.draw_results(self.folder, *drawn)
        self.parts.end("figures")
        self.tracker.log_outcome(outcome)
        self.tracker.log_weights(weights, summary)
        self.runtime.say(report.describe_run(self.folder, summary, self.progress.records))
        self.tracker.finish(summary)
        self.parts.end("closing")
        summary["seconds"] = self.parts.seconds()
        self.tracker.write_summary(summary)
        self.runtime.say(f"time: {timing.describe(summary['seconds'])}")
        return summary

    # The epoch

    def run_epoch(self) -> None:
        """Trains an epoch, or the rest of one, evaluates, records and saves."""
        train = self.train_epoch()
        self.parts.end("training")
        for _, network in self.state.networks():
            self.runtime.average_buffers(network)
        evaluation = self.evaluate()
        self.parts.end("evaluation")
        self.require_finite(evaluation.loss)  # the epoch's last step may have been the one too far
        record = self.record(train, evaluation)
        self.progress.records.append(record)
        self.progress.epoch += 1
        self.progress.step, self.progress.epoch_seconds = 0, 0.0
        self.state.totals.zero_()
        self.tracker.log_epoch(record)
        self.runtime.say(records.describe(record, self.config.epochs))
        self.parts.end("tracker")
        every, epoch = self.config.checkpoint_every, self.progress.epoch
        if epoch == self.config.epochs or (every and epoch % every == 0):
            self.save()

    def train_epoch(self) -> Evaluation:
        """Trains the rest of the current epoch; returns its training loss and accuracy."""
        started = time.perf_counter()
        at, steps_per_epoch = self.progress, self.data.sharding.steps
        settings = Settings.of_epoch(self.config, at.epoch)
        bar = (self.config.epochs, range(at.step, steps_per_epoch), self.state.totals)
        batches = self.data.feed.epoch(at.epoch, at.step)
        for batch in progress.show_epoch(batches, at.epoch, *bar, self.runtime.is_main):
            rate = learning_rate(self.config, at.global_step, steps_per_epoch)
            self.step.run(batch, settings.at(rate))
            self.after_step()
            at.step += 1
            at.global_step += 1
            if not self.startup_seconds:
                self.state.totals.tolist()  # waits for the end of the first step
                self.startup_seconds = timing.seconds_since_start()
            if self.runtime.agree_to_stop(signals.requested() is not None):
                at.epoch_seconds += time.perf_counter() - started
                self.stop()
        loss, hits, count = self.runtime.sum(self.state.totals).tolist()
        at.epoch_seconds += time.perf_counter() - started
        self.require_finite(loss)
        return Evaluation(loss / count, 100 * hits / count, int(count))

    def evaluate(self, translations: int = 0) -> Evaluation:
        """Evaluates the best network on every image of the evaluation set."""
        images = self.data.evaluation_set
        return images.evaluate(self.state.best_network(), self.runtime, translations)

    def require_finite(self, loss: float) -> None:
        """Ends the run if a loss, the same on every process, is not finite."""
        if not math.isfinite(loss):
            fault = f"the loss is {loss} in epoch {self.progress.epoch + 1}: lower --learning_rate"
            self.tracker.alert("Loss is not finite", f"{self.folder.name}: {fault}", failed=True)
            raise RunError(fault, shared=True)

    # Stops and checkpoints

    def stop(self) -> None:
        """Saves a checkpoint and leaves, on a request to stop."""
        self.save()
        raise Stopped(
            f"stopped on request at step {self.progress.global_step}; "
            f"go on with the same options and --run_dir {self.folder}",
            shared=True,
        )

    def save(self) -> None:
        """Writes a checkpoint; every process hands in its own state."""
        run = (self.identity, self.progress, self.state, self.step, self.runtime)
        if path := resume.save(self.folder, *run, self.tracker.wandb_id):
            self.tracker.log_checkpoint(path, self.progress.epoch)
        self.parts.end("checkpoints")

    # What is recorded

    def record(self, train: Evaluation, evaluation: Evaluation) -> Record:
        """The epoch's line of `metrics.jsonl`."""
        last = self.progress.global_step - 1
        scaled = self.runtime.precision == "fp16"  # gradients are, by an unknown factor
        return records.epoch_record(
            self.progress.epoch + 1,
            train,
            records.split_of(self.config),
            evaluation,
            self.progress.epoch_seconds,
            global_step=self.progress.global_step,
            dataset=self.data.manifest.dataset,
            learning_rate=learning_rate(self.config, last, self.data.sharding.steps),
            gradient_norm=None if scaled else self.state.gradient_norm(),
        )

    def summarise(self) -> Record:
        """The content of `summary.json`."""
        translated = self.evaluate(self.config.tta) if self.config.tta else None
        return records.summary(
            self.config,
            self.progress.records,
            self.data.evaluation_set.total,
            translated,
            **self.facts,
            startup_seconds=self.startup_seconds,
            versions=provenance.versions(),
        )

    def find_facts(self) -> Record:
        """Facts about the run that are not in its configuration."""
        return {
            "dataset": self.data.manifest.dataset,
            "parameters": count_parameters(self.plan.job.network),
            "world_size": self.runtime.world_size,
            "device": self.runtime.device_name,
            "precision": self.runtime.precision,
            "feed": self.data.feed.name,
            "step": self.plan.mode.name,
            "git_commit": provenance.git_commit(),
            "data_sha256": self.data.sha256,
        }
