"""Searches a recipe's choices with Optuna, on held-out training images only.

    python benchmarks/search.py --space fast --trials 50 --seeds_per_trial 3
    python benchmarks/search.py --space record --trials 30 --seeds_per_trial 8 --epochs 20

Every trial holds out the last 5,000 training images and is judged by their accuracy in the last
epoch, averaged over its seeds; the test images are never opened. The first trial is the recipe as
it stands. Trials that are worse than the median of earlier ones at the same epoch are given up
(--pruner). The study lies in a file: the same command goes on where it was stopped, and several
of them share the work. A trial that fails is told and left out; three in a row end the search, as
does bad input before any trial has succeeded. Other options are handed on to train.py and hold
for every trial.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
import yaml
from sqlalchemy.exc import SQLAlchemyError

from benchmarks.seeds import (
    Experiment,
    Job,
    check,
    count_gpus,
    cpu_slots,
    open_experiment,
    read_curve,
    train_seeds,
)
from mnist_fast import signals
from mnist_fast.config import Config
from mnist_fast.errors import InputError, Parser, RunError, Stopped, run_main
from mnist_fast.run_folder import make_writable

ROOT = Path(__file__).resolve().parent.parent

VALIDATION = 5_000  # images held out in every trial
KEY = "validation_accuracy"
FAILURES = 3  # failed trials in a row that end a search

Space = dict[str, optuna.distributions.BaseDistribution]


def build_space(name: str) -> Space:
    """The range of every searched choice, by a name that `to_options` understands."""
    number = optuna.distributions.FloatDistribution
    whole = optuna.distributions.IntDistribution
    one_of = optuna.distributions.CategoricalDistribution
    wide = name == "record"  # longer training bears stronger augmentation
    return {
        "batch_size": one_of([32, 64, 128, 256, 512]),
        "learning_rate": number(0.02, 0.5, log=True),
        "warmup_fraction": number(0.05, 0.5),
        "optimizer": one_of(["sgd", "muon"]),  # AdamW needs other rates, and no nesterov
        "momentum": number(0.8, 0.98),
        "nesterov": one_of([True, False]),
        "weight_decay": number(1e-6, 2e-3, log=True),
        "dropout": number(0.0, 0.05),
        "label_smoothing": number(0.0, 0.1),
        "ema_decay": one_of([0.0, 0.99, 0.995, 0.998]),
        "affine_rotation": number(0.0, 20.0 if wide else 15.0),
        "shear": number(0.0, 15.0 if wide else 10.0),
        "translate": number(0.0, 0.15 if wide else 0.12),
        "scale": number(0.0, 0.25 if wide else 0.2),
        "elastic": number(0.0, 2.0),
        "resampling": one_of(["nearest", "bilinear", "bicubic"]),
        "jitter": number(0.0, 0.4),
        "plain_epochs": whole(0, 6 if wide else 3),
    }


def to_options(values: dict[str, Any]) -> dict[str, Any]:
    """Searched values as options of train.py: two of them stand for a pair."""
    options = {k: v for k, v in values.items() if k not in ("scale", "jitter")}
    if "scale" in values:
        options |= {"scale_min": 1 - values["scale"], "scale_max": 1 + values["scale"]}
    if "jitter" in values:
        options |= {"brightness": values["jitter"], "contrast": values["jitter"]}
    return options


def from_config(config: Config, space: Space) -> dict[str, Any]:
    """The recipe's own values as a trial, moved to the nearest end where out of range.

    A choice that is not among those searched is left to the sampler.
    """
    own = config.as_dict() | {"scale": config.scale_max - 1, "jitter": config.brightness}
    values = {}
    for name, distribution in space.items():
        value = own[name]
        if isinstance(distribution, optuna.distributions.CategoricalDistribution):
            if value not in distribution.choices:
                continue
        else:
            value = min(max(value, distribution.low), distribution.high)  # type: ignore[attr-defined]
        values[name] = value
    return values


def suggest(
    trial: optuna.Trial, name: str, distribution: optuna.distributions.BaseDistribution
) -> Any:
    """The trial's value of a choice."""
    if isinstance(distribution, optuna.distributions.CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    if isinstance(distribution, optuna.distributions.IntDistribution):
        return trial.suggest_int(name, distribution.low, distribution.high)
    assert isinstance(distribution, optuna.distributions.FloatDistribution)
    return trial.suggest_float(name, distribution.low, distribution.high, log=distribution.log)


def words(options: dict[str, Any]) -> list[str]:
    """Options as they are written on a command line."""
    text = {True: "true", False: "false"}
    pairs = [(f"--{k}", text[v] if isinstance(v, bool) else str(v)) for k, v in options.items()]
    return [word for pair in pairs for word in pair]


class Search:
    """What every trial of a study shares."""

    def __init__(self, choices: argparse.Namespace, rest: Sequence[str]):
        if any(word.split("=")[0] == "--validation_split" for word in rest):
            raise InputError(f"--validation_split is {VALIDATION} in every search: leave it out")
        self.choices, self.rest = choices, list(rest)
        if choices.epochs is not None:
            self.rest += ["--epochs", str(choices.epochs)]
        self.base = self.experiment({}).config  # bad options are refused here
        if self.base.dataset == "digits":
            raise InputError(f"digits has no {VALIDATION:,} images to hold out: search on mnist")
        given = {word.split("=")[0].removeprefix("--") for word in self.rest}
        space = build_space(choices.space)
        pairs = {"scale": "scale_max", "jitter": "brightness"}
        self.space = {k: v for k, v in space.items() if pairs.get(k, k) not in given}
        self.seeds = range(choices.first, choices.first + choices.seeds_per_trial)
        wanted = choices.one_program
        self.in_one = wanted == "true" or (wanted == "auto" and count_gpus() == 1)
        self.deadline = time.monotonic() + choices.time_limit
        self.failures: list[InputError | RunError] = []  # of the last trials, in a row

    def experiment(self, values: dict[str, Any]) -> Experiment:
        """A trial's runs; their summaries can hold no test accuracy."""
        fixed = ["--validation_split", str(VALIDATION), "--checkpoint_every", "0"]
        options = ["--recipe", self.choices.space, *self.rest, *words(to_options(values)), *fixed]
        return open_experiment(options, self.choices.runs / self.choices.study)

    def objective(self, trial: optuna.Trial) -> float:
        """Mean validation accuracy of the last epoch over the trial's seeds, in percent."""
        values = {name: suggest(trial, name, d) for name, d in self.space.items()}
        left = max(0.0, self.deadline - time.monotonic())
        choices = argparse.Namespace(**(vars(self.choices) | {"time_limit": left}))
        try:
            experiment = self.experiment(values)
            watch = self.watcher(trial, experiment)
            train_seeds(experiment, self.seeds, self.in_one, choices, watch)
            summaries = [experiment.summary(seed) or {} for seed in self.seeds]
        except (Stopped, KeyboardInterrupt) as request:  # taken up again first another time
            trial.study.tell(trial, state=optuna.trial.TrialState.FAIL)
            trial.study.enqueue_trial(trial.params)
            raise Stopped(str(request) or "interrupted; the same command goes on") from None
        except (InputError, RunError) as error:
            self.failures.append(error)
            raise
        accuracies = [float(summary[KEY]) for summary in summaries]
        trial.set_user_attr("accuracies", accuracies)
        trial.set_user_attr("losses", [float(s["validation_loss"]) for s in summaries])
        return statistics.fmean(accuracies)

    def after(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        """Tells how a trial ended, and ends the search when it has its trials, or none can come.

        Raises:
            InputError, RunError: that of the last trial, when no other would do better.
            Stopped: the time is over.
        """
        if trial.state != optuna.trial.TrialState.FAIL:
            self.failures.clear()
        value = "" if trial.value is None else f"{trial.value:.3f} %"
        reason = str(self.failures[-1]) if self.failures else value
        print(f"trial {trial.number}: {trial.state.name.lower()} {reason}", flush=True)
        if self.failures:
            self.give_up(study)
        if len(done(study)) >= self.choices.trials:
            study.stop()
        elif time.monotonic() > self.deadline:
            raise Stopped("stopped by time limit; the same command goes on")

    def give_up(self, study: optuna.Study) -> None:
        """Raises the last trial's error where other trials would fail, too."""
        last, none_yet = self.failures[-1], not done(study)
        if len(self.failures) < FAILURES and not (none_yet and isinstance(last, InputError)):
            return
        if none_yet:  # the recipe's own values come first another time, too
            study.enqueue_trial(from_config(self.base, self.space))
        count = len(self.failures)
        before = f"{count} trials in a row failed, the last so: " if count > 1 else ""
        raise type(last)(f"{before}{last}") from last

    def watcher(self, trial: optuna.Trial, experiment: Experiment) -> Callable[[Job], None]:
        """Reports each epoch's mean over the seeds that start together; gives up bad trials."""
        started = 1 if self.in_one else count_gpus() or len(cpu_slots(self.choices.parallel))
        first = list(self.seeds)[:started]
        told: set[int] = set()

        def watch(_job: Job) -> None:
            curves = [dict(read_curve(experiment.run_dir(seed))) for seed in first]
            common = set.intersection(*(set(curve) for curve in curves))
            for epoch in sorted(common - told):
                told.add(epoch)
                trial.report(statistics.fmean(curve[epoch] for curve in curves), epoch)
            if trial.should_prune():
                raise optuna.TrialPruned

        return watch


@contextlib.contextmanager
def study_file(path: Path) -> Iterator[None]:
    """Within it, a fault of the study's file is one `InputError` that names it."""
    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.OptunaError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, SQLAlchemyError) else error
        reason = str(getattr(cause, "orig", cause)).split("\n")[0]
        advice = "move it away, or choose another --study or --runs"
        raise InputError(f"{path}: cannot be used as a study ({reason}): {advice}") from error


def open_study(choices: argparse.Namespace, first: dict[str, Any], epochs: int) -> optuna.Study:
    """The study in its file, begun with the recipe's own values."""
    make_writable(choices.runs / choices.study, "--study")
    storage = optuna.storages.RDBStorage(
        f"sqlite:///{choices.runs / choices.study}.db",
        engine_kwargs={"connect_args": {"timeout": 60}},  # seconds, for several searches in one
    )
    pruners: dict[str, optuna.pruners.BasePruner] = {
        "median": optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=epochs // 3),
        "halving": optuna.pruners.SuccessiveHalvingPruner(min_resource=max(1, epochs // 4)),
        "none": optuna.pruners.NopPruner(),
    }
    study = optuna.create_study(
        study_name=choices.study,
        storage=storage,
        sampler=optuna.samplers.TPESampler(seed=choices.sampler_seed),
        pruner=pruners[choices.pruner],
        direction="maximize",
        load_if_exists=True,
    )
    study.enqueue_trial(first, skip_if_exists=True)
    return study


def done(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Trials that came to an end, good or given up."""
    states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    return study.get_trials(states=states)


def report(study: optuna.Study, search: Search) -> None:
    """Prints the best trials; writes all of them, and the best one as a configuration file."""
    complete = study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    if not complete:
        return
    best = sorted(complete, key=lambda trial: -(trial.value or 0.0))
    print(f"{len(done(study))} trials, {len(complete)} of them complete; {KEY}, %:")
    for trial in best[:10]:
        values = trial.user_attrs["accuracies"]
        sd = f"{statistics.stdev(values):.3f}" if len(values) > 1 else "-"
        print(f"  trial {trial.number:>4}  {trial.value:.3f}  sd {sd}  n {len(values)}", end="  ")
        print(" ".join(f"{k}={shorten(v)}" for k, v in trial.params.items()))
    rows = [
        {"number": t.number, "state": t.state.name, "value": t.value, "params": t.params}
        | {"epochs_reported": len(t.intermediate_values)}
        | t.user_attrs
        for t in done(study)
    ]
    name = search.choices.results / f"search-{search.choices.study}"
    content = {"space": search.choices.space, "options": search.rest, "trials": rows}
    name.with_name(f"{name.name}.json").write_text(json.dumps(content, indent=1) + "\n")
    chosen = {"recipe": search.choices.space} | to_options(best[0].params)
    path = name.with_name(f"{name.name}-best.yaml")
    path.write_text(yaml.safe_dump(chosen, sort_keys=False))
    print(f"written: {name}.json; the best trial for train.py --config: {path}")


def shorten(value: Any) -> str:
    """A value with four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def build_parser() -> Parser:
    """The options of this program; others are train.py's."""
    parser = Parser(
        prog="benchmarks/search.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--space", choices=["fast", "record"], default="fast", help="recipe and its ranges")
    add("--trials", type=int, default=50, help="trials in the whole study (%(default)s)")
    add("--seeds_per_trial", type=int, default=3, help="seeds of each trial (%(default)s)")
    add("--first", type=int, default=1001, help="the first seed (%(default)s)")
    add("--epochs", type=int, help="epochs of each trial (default: the recipe's)")
    add("--study", help="name of the study (default: the space's)")
    add("--pruner", choices=["median", "halving", "none"], default="median", help="%(default)s")
    add("--sampler_seed", type=int, help="seed of the sampler (default: a new one)")
    add("--one_program", choices=["auto", "true", "false"], default="auto", help="see seeds.py")
    add("--parallel", type=int, help="runs at a time on a CPU (default: one per core)")
    add("--seed_timeout", type=float, default=7200.0, help="seconds for a run (%(default)s)")
    add("--time_limit", type=float, default=86400.0, help="seconds for all of it (%(default)s)")
    add("--runs", type=Path, default=ROOT / "runs" / "search", help="folder of study and runs")
    add("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of results")
    return parser


def main() -> int:
    """Goes on with the study until it has its trials, and reports in any case."""
    choices, rest = build_parser().parse_known_args()
    choices.study = choices.study or choices.space
    choices.runs = choices.runs.resolve()
    check(choices)
    search = Search(choices, rest)
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)  # `after` tells what is of interest
    with study_file(choices.runs / f"{choices.study}.db"):
        study = open_study(choices, from_config(search.base, search.space), search.base.epochs)
        try:
            if len(done(study)) < choices.trials:
                # a trial that fails (a loss that is not finite, say) is noted; `after` judges
                errors = (RunError, InputError)
                study.optimize(search.objective, callbacks=[search.after], catch=errors)
        finally:
            report(study, search)
    return 0


if __name__ == "__main__":
    signals.install()
    sys.exit(run_main(main, "benchmarks/search.py"))
