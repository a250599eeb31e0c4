"""Every choice of a run in one frozen dataclass: defaults < recipe < file < options."""

import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from mnist_fast.errors import InputError, one_line
from mnist_fast.files import read_file

RECIPES = Path(__file__).parent / "recipes"
MAX_FILE = 100_000  # bytes of a configuration file that are read
TARGET_ACCURACY = 99.4  # percent of MNIST's test images


def option(default: Any, text: str) -> Any:
    """A dataclass field with the help text that `--help` shows."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Config:
    """The choices of one training run; `load` reads it from recipe, file and command line.

    Raises `InputError` on construction when a value is out of its range.
    """

    # What is trained, on what
    recipe: str = option("fast", "recipe to start from: a file name in mnist_fast/recipes")
    network: Literal["notebook", "record"] = option("notebook", "network in mnist_fast/model.py")
    dataset: Literal["mnist", "digits", "auto"] = option(
        "mnist", "data set; auto takes scikit-learn's digits where MNIST cannot be had"
    )
    epochs: int = option(15, "passes over the training images")
    seed: int = option(1, "seed of weights, order, augmentation and dropout")
    batch_size: int = option(128, "images per step, over all processes")
    drop_last: bool = option(False, "leave out the last, smaller batch of an epoch")
    validation_split: int = option(
        0, "images held out from the end of the training set and evaluated in place of the test set"
    )

    # Optimisation
    learning_rate: float = option(0.01, "learning rate; the peak of onecycle")
    schedule: Literal["constant", "step", "onecycle"] = option("constant", "learning rate schedule")
    step_epochs: int = option(6, "epochs between two decays of the step schedule")
    step_gamma: float = option(0.1, "factor of each decay of the step schedule")
    warmup_fraction: float = option(0.3, "fraction of all steps in which onecycle rises")
    optimizer: Literal["sgd", "adamw", "muon"] = option(
        "sgd", "rule by which gradients move the weights; muon: SGD with orthogonal updates"
    )
    momentum: float = option(0.9, "momentum of SGD and Muon, beta 1 of AdamW")
    beta2: float = option(0.99, "beta 2 of AdamW, the decay of the mean squared gradient")
    nesterov: bool = option(False, "Nesterov momentum of SGD and Muon")
    weight_decay: float = option(
        0.0, "on every parameter: L2 penalty of SGD, decoupled decay of AdamW and Muon"
    )
    dropout: float = option(0.03, "probability that dropout zeroes an activation")
    label_smoothing: float = option(0.0, "probability mass spread evenly over the classes")
    ema_decay: float = option(
        0.0, "decay per step of averaged weights used in evaluation; 0 is off"
    )

    # Augmentation (off where 0, and 1 for the scales)
    rotation: float = option(0.0, "first rotation, uniform in +- this many degrees")
    affine_rotation: float = option(0.0, "rotation of the affine map, +- degrees")
    shear: float = option(0.0, "x shear of the affine map, +- degrees")
    translate: float = option(0.0, "shift of the affine map, +- fraction of the image size")
    scale_min: float = option(1.0, "smallest scale of the affine map, factor")
    scale_max: float = option(1.0, "largest scale of the affine map, factor")
    elastic: float = option(0.0, "elastic distortion: points of a 5 x 5 grid move by +- pixels")
    resampling: Literal["nearest", "bilinear", "bicubic"] = option("nearest", "interpolation")
    fill: int = option(0, "pixel value outside the image, 0-255")
    brightness: float = option(0.0, "brightness factor, uniform in 1 +- this")
    contrast: float = option(0.0, "contrast factor, uniform in 1 +- this")
    plain_epochs: int = option(0, "last epochs that are trained without augmentation")

    # Evaluation
    tta: int = option(
        0,
        "pixels: also evaluate the mean over all translations by up to so many, at the end and "
        "apart (test_accuracy_tta); 0 is off",
    )

    # How it runs
    precision: Literal["auto", "no", "bf16", "fp16"] = option(
        "auto",
        "mixed precision; auto is what the launcher set, else float32 on CPUs and where steps are "
        "fused, and bf16 on other GPUs that have it",
    )
    step: Literal["auto", "eager", "native", "compiled", "captured", "fused"] = option(
        "auto",
        "how a step runs; native: C++ for CPUs; captured: one CUDA graph; fused: one kernel, on "
        "large GPUs in float32; auto: fused or captured on GPUs, native on CPUs with a C++ "
        "compiler, eager where the run is too short for either",
    )
    feed: Literal["auto", "resident", "stream"] = option(
        "auto", "images held on the device, or streamed by FFCV; auto is resident where they fit"
    )
    threads: int = option(
        0, "CPU threads per process; 0 shares this machine's CPUs among its processes"
    )
    profile: bool = option(
        False,
        "write RUN_DIR/profile/: a trace of 8 steps for Perfetto, and the costliest operations",
    )
    process_timeout: int = option(300, "seconds after which a process that waits for others fails")
    data_dir: str | None = option(None, "folder of the betons (default: data/betons/DATASET)")
    run_dir: str | None = option(None, "folder of this run (default: a new one, runs/NAME)")
    resume: str = option(
        "auto", "auto continues the run in run_dir; never; or the path of a checkpoint"
    )
    checkpoint_every: int = option(1, "epochs between two checkpoints; 0 is only at the end")
    wandb: Literal["auto", "online", "offline", "disabled"] = option(
        "auto", "Weights & Biases; auto is what WANDB_MODE says, else online with a key or offline"
    )
    wandb_project: str | None = option(None, "W&B project (default: $WANDB_PROJECT, mnist_fast)")
    wandb_entity: str | None = option(None, "W&B user or team (default: $WANDB_ENTITY)")
    wandb_name: str | None = option(None, "W&B run name (default: $WANDB_NAME, that of run_dir)")
    wandb_group: str | None = option(None, "W&B run group (default: $WANDB_RUN_GROUP)")
    wandb_job_type: str | None = option(None, "W&B job type (default: $WANDB_JOB_TYPE, train)")
    wandb_tags: str | None = option(None, "W&B tags, separated by commas (default: $WANDB_TAGS)")
    wandb_notes: str | None = option(None, "W&B notes (default: $WANDB_NOTES)")

    def __post_init__(self) -> None:
        """Checks the ranges."""
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if not low <= value <= high:
                fault = f"{name} is {value}: it must be between {low:,} and {high:,}"
                raise InputError(f"{fault}; see train.py --help")
        for name in ("recipe", "data_dir", "run_dir", "resume"):
            if getattr(self, name) == "":  # most often a shell variable that is not set
                raise InputError(f"{name} is empty: give it a value, or leave the option out")
        if self.scale_min > self.scale_max:
            raise InputError(
                f"scale_min {self.scale_min} is larger than scale_max {self.scale_max}"
            )
        if self.nesterov and self.momentum == 0:
            raise InputError("nesterov needs a momentum above 0")
        if self.nesterov and self.optimizer == "adamw":
            raise InputError("nesterov is of SGD and Muon: set it to false for adamw")

    def as_dict(self) -> dict[str, Any]:
        """The choices as plain values, in order."""
        return dataclasses.asdict(self)


RANGES: dict[str, tuple[float, float]] = {
    "epochs": (1, 100_000),
    "seed": (0, 2**63 - 1),
    "batch_size": (2, 2**20),
    "validation_split": (0, 2**31),
    "learning_rate": (0, 1e3),
    "step_epochs": (1, 100_000),
    "step_gamma": (0, 1),
    "warmup_fraction": (0, 1),
    "momentum": (0, 0.999999),
    "beta2": (0, 0.999999),
    "weight_decay": (0, 1),
    "dropout": (0, 0.9),
    "label_smoothing": (0, 0.9),
    "ema_decay": (0, 0.999999),
    "rotation": (0, 180),
    "affine_rotation": (0, 180),
    "shear": (0, 80),
    "translate": (0, 1),
    "scale_min": (0.1, 10),
    "scale_max": (0.1, 10),
    "elastic": (0, 14),
    "fill": (0, 255),
    "brightness": (0, 1),
    "contrast": (0, 1),
    "plain_epochs": (0, 100_000),
    "tta": (0, 8),
    "threads": (0, 4_096),
    "process_timeout": (1, 86_400),
    "checkpoint_every": (0, 100_000),
}


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


class _Loader(yaml.SafeLoader):
    """YAML without what is read as something else than was meant: see its constructors."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuses aliases: a few of them within each other fill all memory."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read")
        return super().compose_node(parent, index)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [key.value for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:  # the last one would win
            raise yaml.YAMLError(f"the key '{key}' stands there twice")
    return loader.construct_mapping(node, deep=True)


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int:
    if not re.fullmatch(r"[-+]?(0|[1-9][0-9_]*)", node.value):  # 010 would be 8, and 1:30 be 90
        raise yaml.YAMLError(f"{node.value} is not a whole number as people write them")
    return loader.construct_yaml_int(node)


def _truth(loader: _Loader, node: yaml.ScalarNode) -> bool | str:
    if node.value.lower() in ("true", "false"):
        return loader.construct_yaml_bool(node)
    return node.value  # no is a precision, too; where a truth value is due, the parser reads it


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:bool", _truth)
_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a mapping from a YAML file; every fault is one `InputError` that names the file."""
    try:
        content = yaml.load(read_file(path, MAX_FILE).decode(), _Loader)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}: name a readable YAML file") from error
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path}: not valid YAML: {error}") from error
    except RecursionError as error:
        raise InputError(f"{path}: not valid YAML: nested too deeply") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(f"{path}: must hold lines of the form 'option: value'")
    return content


def read_recipe(name: str) -> dict[str, Any]:
    """The choices of a recipe by name."""
    if name not in recipe_names():
        raise InputError(f"--recipe {name}: unknown, the recipes are {', '.join(recipe_names())}")
    return read_yaml(RECIPES / f"{name}.yaml")


def build_parser() -> Any:
    """A parser with one option per field of `Config`, and --config."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="train.py", exit_on_error=False, allow_abbrev=False, description=DESCRIPTION
    )
    parser.add_argument("--config", type=str | None, default=None, help="YAML file with options")
    recipe = read_recipe(Config.recipe)  # what a run without options takes
    for field in dataclasses.fields(Config):
        default = recipe.get(field.name, field.default)
        help_text = field.metadata["help"]
        parser.add_argument(f"--{field.name}", type=field.type, default=default, help=help_text)
    return parser


DESCRIPTION = """Trains the network. Choices come from the recipe, then the configuration file,
then the options, each overriding the one before. The defaults shown are those of the default
recipe."""


def load(arguments: Sequence[str] | None = None) -> Config:
    """Resolves a command line into a `Config`.

    Args:
        arguments: the command line without the program's name; default: that of this process.

    Raises:
        InputError: an unknown option or key, a wrong type, a value out of range, a bad file.
    """
    parser = build_parser()
    given = _options_given(parser, list(sys.argv[1:] if arguments is None else arguments))
    from_file = read_yaml(Path(given["config"])) if "config" in given else {}
    values = _checked(parser, str(given.get("config")), from_file)
    recipe = given.get("recipe", values.get("recipe", Config.recipe))
    values = _checked(parser, f"recipe {recipe}", read_recipe(recipe)) | values
    values |= {name: value for name, value in given.items() if name != "config"}
    return Config(**(values | {"recipe": recipe}))


def _options_given(parser: Any, arguments: list[str]) -> dict[str, Any]:
    """Only the options that stand on the command line, as typed values."""
    from jsonargparse import ArgumentError

    try:
        namespace = parser.parse_args(arguments, defaults=False)
    except ArgumentError as error:
        raise InputError(f"{one_line(error)}; see train.py --help") from error
    return {name: value for name, value in namespace.as_dict().items() if value is not None}


def _checked(parser: Any, where: str, layer: dict[str, Any]) -> dict[str, Any]:
    """A layer's values, converted to the types of their fields; unknown keys are errors."""
    from jsonargparse import ArgumentError

    fields = {field.name: field for field in dataclasses.fields(Config)}
    for key, value in layer.items():
        if key not in fields:
            raise InputError(f"{where}: unknown key '{key}'; see train.py --help")
        if value is None and fields[key].default is not None:  # the parser would take it
            raise InputError(f"{where}: {key} has no value")
    try:
        checked = parser.parse_object(layer, defaults=False).as_dict()
    except ArgumentError as error:
        raise InputError(f"{where}: {one_line(error)}") from error
    return {name: checked[name] for name in layer}


def dump(config: Config) -> str:
    """The resolved choices as YAML that `--config` reads again."""
    return yaml.safe_dump(config.as_dict(), sort_keys=False)
