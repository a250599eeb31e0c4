"""A run's progress, the content of its checkpoints, and whether a run may go on from one."""

import dataclasses
import os
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mnist_fast import checkpoint
from mnist_fast.checkpoint import Checkpoint
from mnist_fast.cli import read_yaml
from mnist_fast.config import Config, different_choices
from mnist_fast.errors import InputError
from mnist_fast.records import Record, check_record, is_duration
from mnist_fast.runtime import Runtime
from mnist_fast.steps import Job, Step, TrainState, mode_named


@dataclasses.dataclass
class Progress:
    """A run's progress: epoch and step of the next batch, and the records so far."""

    epoch: int = 0
    step: int = 0
    global_step: int = 0
    epoch_seconds: float = 0.0
    records: list[Record] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Identity:
    """The facts that tell one training from another; `threads` in `config` are those it has."""

    config: dict[str, Any]
    data_sha256: str
    world_size: int
    device: str
    precision: str
    mode: str
    steps_per_epoch: int

    @classmethod
    def of(cls, job: Job, mode: str, data_sha256: str, threads: int) -> "Identity":
        """That of a run.

        Args:
            job: what its steps are built for.
            mode: of the steps.
            data_sha256: checksum of the betons.
            threads: of each process, where the choice of 0 leaves it to the machine.
        """
        return cls(
            config=job.config.as_dict() | {"threads": threads},
            data_sha256=data_sha256,
            world_size=job.sharding.world_size,
            device=job.device.type,
            precision=job.precision,
            mode=mode,
            steps_per_epoch=job.sharding.steps,
        )


def _types(kind: type) -> dict[str, Any]:
    """The types of a dataclass's fields, without those of their items."""
    fields = dataclasses.fields(kind)
    return {field.name: typing.get_origin(field.type) or field.type for field in fields}


# What `state.json` holds.
STATE_TYPES: dict[str, Any] = {
    **_types(Identity),
    **_types(Progress),
    "epoch_seconds": (int, float),
    "scaler": dict,
    "wandb_id": (str, type(None)),
}


def check_state(state: Any) -> None:
    """Raises ValueError unless a state is one that a run could have written."""
    if not isinstance(state, dict) or set(state) != set(STATE_TYPES):
        raise ValueError("its keys are not those of a checkpoint")
    for key, kind in STATE_TYPES.items():
        if not isinstance(state[key], kind) or isinstance(state[key], bool):
            raise ValueError(f"{key} is of the wrong type")
    epoch, step, steps = state["epoch"], state["step"], state["steps_per_epoch"]
    consistent = epoch >= 0 and 0 <= step <= steps and state["global_step"] == epoch * steps + step
    if not consistent or not is_duration(state["epoch_seconds"]):
        raise ValueError("its position is impossible")
    if len(state["records"]) != epoch:
        raise ValueError("its records do not match its epochs")
    for number, record in enumerate(state["records"], 1):
        check_record(record, number)
    # W&B makes file names of it
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", state["wandb_id"] or "none"):
        raise ValueError("wandb_id has characters that an id cannot have")


# What a checkpoint holds


def save(
    folder: Path,
    identity: Identity,
    progress: Progress,
    state: TrainState,
    step: Step,
    runtime: Runtime,
    wandb_id: str | None,
) -> Path | None:
    """Writes a checkpoint into a run's folder; every process must call it.

    Returns:
        The checkpoint's folder, on the main process.
    """
    tensors = _tensors(state, step, runtime)
    if not runtime.is_main:
        return None
    values = {
        **dataclasses.asdict(identity),
        **dataclasses.asdict(progress),
        "scaler": runtime.scaler_state(),
        "wandb_id": wandb_id,
    }
    return checkpoint.save(folder / "checkpoints", Checkpoint(tensors, values), check_state)


def _tensors(state: TrainState, step: Step, runtime: Runtime) -> dict[str, Tensor]:
    """The tensors that all processes share, and each one's own."""
    own = generator_states(runtime.device) | _own_tensors(state)
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in own.items()}
    return state.save(step.optimizer_state) | {
        f"process/{rank}/{name}": tensor
        for rank, tensors in enumerate(runtime.gather(own))
        for name, tensor in tensors.items()
    }


def _own_tensors(state: TrainState) -> dict[str, Tensor]:
    """This process's totals, and buffers that differ between processes within an epoch."""
    return {"totals": state.totals} | {
        f"{kind}/{name}": buffer
        for kind, network in state.networks()
        for name, buffer in network.named_buffers()
    }


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """States of this process's torch generators."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore(
    found: Checkpoint, identity: Identity, state: TrainState, step: Step, runtime: Runtime
) -> Progress:
    """Restores a checkpoint into a run; returns its progress.

    Raises:
        InputError: the checkpoint is of another training.
    """
    check_same_training(found.state, identity)
    check_tensors(found.tensors, _tensors(state, step, runtime))
    state.load(found.tensors, step.optimizer_state)
    step.parameters_changed()
    prefix = f"process/{runtime.rank}/"
    own = {k.removeprefix(prefix): v for k, v in found.tensors.items() if k.startswith(prefix)}
    for name, tensor in _own_tensors(state).items():
        tensor.copy_(own[name])
    restore_generators(own, runtime.device)
    runtime.load_scaler_state(found.state["scaler"])
    names = [field.name for field in dataclasses.fields(Progress)]
    return Progress(**{name: found.state[name] for name in names})


def restore_generators(states: dict[str, Tensor], device: torch.device) -> None:
    """Sets this process's torch generators.

    Raises:
        InputError: a state is not a generator's.
    """
    try:
        torch.set_rng_state(states["cpu"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], device)
    except RuntimeError as error:
        raise InputError(f"cannot resume: {error}") from error


# Whether a run may go on there


def check_exists(config: Config) -> None:
    """Refuses a --resume that names no checkpoint, before a folder is made for the run.

    Raises:
        InputError: there is no such folder, or it is a run's.
    """
    named = config.named_checkpoint
    if named is None:
        return
    if not named.is_dir():
        raise InputError(
            f"--resume: {named}: No such file or directory: name a checkpoint's folder"
        )
    if found := checkpoint.newest_first(named / "checkpoints"):
        raise InputError(
            f"--resume: {named} is a run's folder: name a checkpoint, such as {found[0]}"
        )


def find(config: Config, folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint that a run goes on from; None where it starts from the beginning.

    Args:
        config: the run's choices.
        folder: the run's.
        say: prints why newer checkpoints are not taken.

    Raises:
        InputError: there is none where one was named, or the folder holds another run's files.
    """
    try:
        found, skipped = _choose(config, folder)
    except OSError as error:
        fault = f"{error.filename}: {error.strerror}"
        raise InputError(f"{fault}: check its permissions, or choose another --run_dir") from error
    for reason in skipped:
        say(f"skipped a checkpoint: {reason}")
    if found is None or config.resumes_from_outside(folder):
        check_unused(folder, config)
    if skipped and not found:
        say("no checkpoint is valid: starting from the beginning")
    return found


def _choose(config: Config, folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to go on from, and why newer ones are not taken."""
    checkpoints = folder / "checkpoints"
    if checkpoints.exists() and not checkpoints.is_dir():
        raise InputError(f"{checkpoints}: not a folder: move it away, or choose another --run_dir")
    if named := config.named_checkpoint:
        try:
            return checkpoint.load(named, check_state), []
        except checkpoint.CorruptCheckpointError as error:
            raise InputError(f"--resume: {error}: name a checkpoint's folder") from error
    if config.resume == "never":
        if checkpoint.newest_first(checkpoints):
            raise InputError(f"{folder} holds a run: choose another --run_dir or --resume")
        return None, []
    return checkpoint.load_newest(checkpoints, check_state)


def check_unused(folder: Path, config: Config) -> None:
    """Refuses a folder with files that a run from the beginning must not replace.

    Files of an earlier start of the same training, stopped before its first checkpoint, may be
    replaced.

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
    different = different_choices(old, new, "result")
    if not different and not config.data_dir and old.get("dataset") != config.dataset:
        different = ["dataset"]
    if different:
        key = different[0]
        raise InputError(
            f"{folder} holds a run with {key} {old.get(key)}, this one has {new.get(key)}: {remedy}"
        )


def check_same_training(state: dict[str, Any], identity: Identity) -> None:
    """Refuses to continue under choices that would make it another training.

    Args:
        state: the checkpoint's.
        identity: of this run.

    Raises:
        InputError: one line that names the first difference.
    """
    old, new = dict(state["config"]), dict(identity.config)
    if new["schedule"] != "onecycle" and not new["plain_epochs"] and state["epoch"] < new["epochs"]:
        old["epochs"] = new["epochs"]  # nothing before the end depends on it
    for key in different_choices(old, new, "result"):
        _refuse(key, old.get(key), new.get(key))
    for key, value in dataclasses.asdict(identity).items():
        if key != "config" and state[key] != value:
            _refuse(key, state[key], value)


def different_rounding(state: dict[str, Any], identity: Identity) -> str | None:
    """One line where a run goes on with other rounding than before; None where it does not.

    Args:
        state: the checkpoint's.
        identity: of this run; mode and precision are the checkpoint's.
    """
    old, new = state["config"], identity.config
    different = set(different_choices(old, new, "rounding")) - {"step", "precision"}
    # these modes add in a fixed order
    if not different or mode_named(identity.mode).threads_change_no_bit:
        return None
    listed = ", ".join(f"{key} {old.get(key)} before, {new[key]} now" for key in sorted(different))
    return f"the last bits may differ from those of a run without a stop: {listed}"


def _refuse(key: str, old: Any, new: Any) -> None:
    remedy = f"add --step {old}" if key == "mode" else "use the same"
    raise InputError(
        f"cannot resume: the checkpoint has {key} {_short(old)}, this run {_short(new)}: "
        f"{remedy}, or choose another --run_dir",
        shared=True,
    )


def _short(value: Any) -> str:
    """A value as text, of a checksum its beginning."""
    text = str(value)
    return f"{text[:12]}..." if re.fullmatch("[0-9a-f]{64}", text) else text


def check_tensors(tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Refuses tensors that are not of the names, shapes and types that a run has.

    Raises:
        InputError: one line that names the first difference.
    """
    for name in sorted({*tensors, *wanted}):
        old, new = tensors.get(name), wanted.get(name)
        if old is None or new is None or (old.shape, old.dtype) != (new.shape, new.dtype):
            _refuse(f"tensor {name}", _kind(old), _kind(new))


def _kind(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
