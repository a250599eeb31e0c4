"""Every choice of a run in one frozen dataclass: its default, its range and what it affects."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from mnist_fast.errors import InputError

TARGET_ACCURACY = 99.4  # percent of MNIST's test images
EMPTY = "is empty: give it a value, or leave the option out"  # what to say of an option
Affects = Literal["result", "rounding", "nothing"]


def option(
    default: Any,
    text: str,
    between: tuple[float, float] | None = None,
    affects: Affects = "result",
) -> Any:
    """A dataclass field that `Config` and the command line share.

    Args:
        default: its value where nobody chooses.
        text: what `--help` shows.
        between: the smallest and the largest value.
        affects: what differs between two runs that differ in this choice alone. "result": another
            training. "rounding": the same training up to rounding. "nothing": the same bits.
    """
    metadata = {"help": text, "between": between, "affects": affects}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Config:
    """The choices of one training run; `cli.load` reads it from recipe, file and command line.

    Raises `InputError` on construction when a value is out of its range.
    """

    # What is trained, on what
    recipe: str = option(
        "fast", "recipe to start from: a file name in mnist_fast/recipes", affects="nothing"
    )
    network: str = option(
        "notebook", "network by its name in mnist_fast/model.py: notebook, record"
    )
    dataset: Literal["mnist", "digits", "auto"] = option(
        "mnist",
        "data set, if data_dir holds none; auto: MNIST, or scikit-learn's digits without MNIST",
        affects="nothing",
    )
    epochs: int = option(15, "passes over the training images", between=(1, 100_000))
    seed: int = option(
        1, "seed of weights, order, augmentation and dropout", between=(0, 2**63 - 1)
    )
    batch_size: int = option(128, "images per step, over all processes", between=(2, 2**20))
    drop_last: bool = option(False, "leave out the last, smaller batch of an epoch")
    validation_split: int = option(
        0,
        "images held out from the end of the training set and evaluated in place of the test set",
        between=(0, 2**31),
    )

    # Optimisation
    learning_rate: float = option(0.01, "learning rate; the peak of onecycle", between=(0, 1e3))
    schedule: Literal["constant", "step", "onecycle"] = option("constant", "learning rate schedule")
    step_epochs: int = option(
        6, "epochs between two decays of the step schedule", between=(1, 100_000)
    )
    step_gamma: float = option(0.1, "factor of each decay of the step schedule", between=(0, 1))
    warmup_fraction: float = option(
        0.3, "fraction of all steps in which the rate of onecycle rises", between=(0, 1)
    )
    optimizer: Literal["sgd", "adamw", "muon"] = option(
        "sgd", "update rule of the weights; muon: SGD with orthogonal updates"
    )
    momentum: float = option(
        0.9, "momentum of SGD and Muon, beta 1 of AdamW", between=(0, 0.999999)
    )
    beta2: float = option(
        0.99, "beta 2 of AdamW, the decay of the mean squared gradient", between=(0, 0.999999)
    )
    nesterov: bool = option(False, "Nesterov momentum of SGD and Muon")
    weight_decay: float = option(
        0.0,
        "on every parameter: L2 penalty of SGD, decoupled decay of AdamW and Muon",
        between=(0, 1),
    )
    dropout: float = option(0.03, "probability that dropout zeroes an activation", between=(0, 0.9))
    label_smoothing: float = option(
        0.0, "probability mass spread evenly over the classes", between=(0, 0.9)
    )
    ema_decay: float = option(
        0.0,
        "decay per step of averaged weights used in evaluation; 0 is off",
        between=(0, 0.999999),
    )

    # Augmentation (off where 0, and 1 for the scales)
    rotation: float = option(
        0.0, "first rotation, uniform in +- this many degrees", between=(0, 180)
    )
    affine_rotation: float = option(0.0, "rotation of the affine map, +- degrees", between=(0, 180))
    shear: float = option(0.0, "x shear of the affine map, +- degrees", between=(0, 80))
    translate: float = option(
        0.0, "shift of the affine map, +- fraction of the image size", between=(0, 1)
    )
    scale_min: float = option(1.0, "smallest scale of the affine map, factor", between=(0.1, 10))
    scale_max: float = option(1.0, "largest scale of the affine map, factor", between=(0.1, 10))
    elastic: float = option(
        0.0, "elastic distortion: points of a 5 x 5 grid move by +- pixels", between=(0, 14)
    )
    resampling: Literal["nearest", "bilinear", "bicubic"] = option("nearest", "interpolation")
    fill: int = option(0, "pixel value outside the image, 0-255", between=(0, 255))
    brightness: float = option(0.0, "brightness factor, uniform in 1 +- this", between=(0, 1))
    contrast: float = option(0.0, "contrast factor, uniform in 1 +- this", between=(0, 1))
    plain_epochs: int = option(
        0, "last epochs that are trained without augmentation", between=(0, 100_000)
    )

    # Evaluation
    tta: int = option(
        0,
        "test-time augmentation: at the end, also evaluate the mean over all translations by up to "
        "this many pixels (test_accuracy_tta); 0 is off",
        between=(0, 8),
    )

    # How it runs
    precision: Literal["auto", "no", "bf16", "fp16"] = option(
        "auto",
        "mixed precision; auto: what the launcher set, else float32 on CPUs and in fused steps, "
        "and bf16 on other GPUs that support it",
        affects="rounding",
    )
    step: str = option(
        "auto",
        "step mode; auto: the fastest mode that supports the run; eager: kernel by kernel; native: "
        "C++ for CPUs; compiled: torch.compile; captured: one CUDA graph; fused: one kernel, on "
        "large GPUs in float32",
        affects="rounding",
    )
    feed: Literal["auto", "resident", "stream"] = option(
        "auto",
        "resident: images held on the device; stream: streamed by FFCV; auto: resident if they fit",
        affects="nothing",
    )
    threads: int = option(
        0,
        "CPU threads per process; 0: OMP_NUM_THREADS up to the CPUs, or a fair share of the CPUs",
        between=(0, 4_096),
        affects="rounding",
    )
    profile: bool = option(
        False,
        "write RUN_DIR/profile/: a trace of 8 steps for Perfetto, and the costliest operations",
        affects="nothing",
    )
    process_timeout: int = option(
        300,
        "seconds after which a process that waits for others fails",
        between=(1, 86_400),
        affects="nothing",
    )
    data_dir: str | None = option(
        None, "folder of the betons (default: data/betons/DATASET)", affects="nothing"
    )
    run_dir: str | None = option(
        None, "folder of this run (default: a new one, runs/NAME)", affects="nothing"
    )
    resume: str = option(
        "auto",
        "auto: continue the run in run_dir; never: refuse a run_dir with checkpoints; or the path "
        "of a checkpoint",
        affects="nothing",
    )
    checkpoint_every: int = option(
        1,
        "epochs between two checkpoints; 0: only at the end",
        between=(0, 100_000),
        affects="nothing",
    )
    wandb: Literal["auto", "online", "offline", "disabled"] = option(
        "auto",
        "Weights & Biases; auto: what WANDB_MODE says, else online with a key and offline without",
        affects="nothing",
    )
    wandb_project: str | None = option(
        None, "W&B project (default: $WANDB_PROJECT, else mnist_fast)", affects="nothing"
    )
    wandb_entity: str | None = option(
        None, "W&B user or team (default: $WANDB_ENTITY)", affects="nothing"
    )
    wandb_name: str | None = option(
        None, "W&B run name (default: $WANDB_NAME, else that of run_dir)", affects="nothing"
    )
    wandb_group: str | None = option(
        None, "W&B run group (default: $WANDB_RUN_GROUP)", affects="nothing"
    )
    wandb_job_type: str | None = option(
        None, "W&B job type (default: $WANDB_JOB_TYPE, else train)", affects="nothing"
    )
    wandb_tags: str | None = option(
        None, "W&B tags, separated by commas (default: $WANDB_TAGS)", affects="nothing"
    )
    wandb_notes: str | None = option(None, "W&B notes (default: $WANDB_NOTES)", affects="nothing")

    def __post_init__(self) -> None:
        """Checks the ranges."""
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if not low <= value <= high:
                fault = f"{name} is {value}: it must be between {low:,} and {high:,}"
                raise InputError(f"{fault}; see train.py --help")
        for name in ("recipe", "data_dir", "run_dir", "resume"):
            if getattr(self, name) == "":  # most often a shell variable that is not set
                raise InputError(f"{name} {EMPTY}")
        if self.scale_min > self.scale_max:
            raise InputError(
                f"scale_min {self.scale_min} is larger than scale_max {self.scale_max}"
            )
        if self.nesterov and self.momentum == 0:
            raise InputError("nesterov needs a momentum above 0")
        if self.nesterov and self.optimizer == "adamw":
            raise InputError("nesterov is not supported with adamw: set it to false")

    @property
    def named_checkpoint(self) -> Path | None:
        """The checkpoint that `resume` names; None where it names none."""
        return None if self.resume in ("auto", "never") else Path(self.resume)

    def resumes_from_outside(self, folder: Path) -> bool:
        """Whether `resume` names a checkpoint that does not lie in a run's folder."""
        named = self.named_checkpoint
        return named is not None and folder.resolve() not in named.resolve().parents

    def as_dict(self) -> dict[str, Any]:
        """The choices as plain values, in order."""
        return dataclasses.asdict(self)


FIELDS = {field.name: field for field in dataclasses.fields(Config)}
RANGES: dict[str, tuple[float, float]] = {
    name: field.metadata["between"] for name, field in FIELDS.items() if field.metadata["between"]
}


def names_affecting(*kinds: Affects) -> set[str]:
    """Names of the choices that affect one of these."""
    return {name for name, field in FIELDS.items() if field.metadata["affects"] in kinds}


def different_choices(old: dict[str, Any], new: dict[str, Any], *kinds: Affects) -> list[str]:
    """Names, sorted, of the choices of these kinds in which two configurations differ.

    A name that is no choice of today counts as one that affects the result.
    """
    known = names_affecting(*kinds)
    missing = object()  # None is a value
    return [
        key
        for key in sorted({*old, *new})
        if (key in known or ("result" in kinds and key not in FIELDS))
        and old.get(key, missing) != new.get(key, missing)
    ]


def what_is_trained(choices: dict[str, Any]) -> dict[str, Any]:
    """The choices that tell two trainings apart, whatever their seed and their folders.

    Recipe and data set are among them: they name what the other choices and the data came from.
    """
    kept = names_affecting("result", "rounding") - {"seed"} | {"recipe", "dataset"}
    return {key: value for key, value in choices.items() if key in kept or key not in FIELDS}
