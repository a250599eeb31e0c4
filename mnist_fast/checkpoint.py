"""Checkpoints: written whole or not at all, verified before they are used, never unpickled.

A checkpoint is a folder `step-NNNNNNNN` with `tensors.safetensors`, `state.json` and
`manifest.json`, which lists size and sha256 of the others. It is written under a temporary name,
flushed to the disk and renamed; older ones are deleted only after that.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from mnist_fast.errors import InputError
from mnist_fast.files import read_file

FORMAT = 2
KEEP = 2  # checkpoints left after pruning
MANIFEST, STATE, TENSORS = "manifest.json", "state.json", "tensors.safetensors"
LIMITS = {MANIFEST: 10_000, STATE: 2**26, TENSORS: 2**26}  # bytes; more is not read at all
_NAME = re.compile(r"step-\d{8,18}")


class CorruptCheckpointError(Exception):
    """A checkpoint that cannot be trusted: one line that names the file and the fault."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on as if it had never stopped.

    Attributes:
        tensors: weights, momentum, averages, totals and generator states, by name, on the CPU.
        state: plain values, see `STATE_TYPES`.
    """

    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Writes a checkpoint into `folder` and prunes the oldest; returns its path.

    The caller holds the run's lock: nobody else writes there.

    Raises:
        OSError: the disk is full or the folder not writable; earlier checkpoints are untouched.
    """
    target = folder / f"step-{checkpoint.state['global_step']:08d}"
    if _is_valid(target):  # the same training came here before, and its checkpoint was passed over
        return target
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".writing-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        _write_files(temporary, checkpoint)
        shutil.rmtree(target, ignore_errors=True)  # not valid, see above
        temporary.rename(target)
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    prune(folder, keep=target)
    return target


def _write_files(folder: Path, checkpoint: Checkpoint) -> None:
    contents = {
        TENSORS: save_tensors(checkpoint.tensors),
        STATE: json.dumps(checkpoint.state, indent=1).encode(),
    }
    files = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents.items()
    }
    contents[MANIFEST] = _manifest_text(files)
    for name, content in contents.items():
        write_durably(folder / name, content)
    sync_folder(folder)


def _manifest_text(files: Any) -> bytes:
    return json.dumps({"format": FORMAT, "files": files}, indent=1).encode()


def _is_valid(path: Path) -> bool:
    with contextlib.suppress(CorruptCheckpointError):
        return bool(load(path))
    return False


def write_durably(path: Path, content: bytes) -> None:
    """Writes a file and waits until the disk has it."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sort_header(content: bytes) -> bytes:
    """Safetensors with its header's keys in order: equal weights are then equal files."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(
        json.loads(content[8:start]), sort_keys=True, separators=(",", ":")
    ).encode()
    header += b" " * (-len(header) % 8)  # the format aligns what follows
    return len(header).to_bytes(8, "little") + header + content[start:]


def digest(tensors: dict[str, Tensor]) -> str:
    """Checksum of tensors on the CPU: sha256 over their bytes, in the order of their names."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(tensors[name].contiguous().numpy().tobytes())
    return found.hexdigest()


def sync_folder(folder: Path) -> None:
    """Waits until the disk has a folder's entries, where the file system can do that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems
            raise
    finally:
        os.close(descriptor)


def prune(folder: Path, keep: Path) -> None:
    """Deletes checkpoints older than `keep` but the newest, and what an interrupted save left."""
    older = [path for path in newest_first(folder) if _step(path) < _step(keep)]
    for path in older[KEEP - 1 :] + list(folder.glob(".writing-*")):
        shutil.rmtree(path, ignore_errors=True)


def newest_first(folder: Path) -> list[Path]:
    """Checkpoint folders by step, newest first, valid or not."""
    if not folder.is_dir():
        return []
    return sorted(filter(lambda p: _NAME.fullmatch(p.name), folder.iterdir()), key=_step)[::-1]


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def load_newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint of a folder, and why each newer one was skipped."""
    skipped: list[str] = []
    for path in newest_first(folder):
        try:
            return load(path), skipped
        except CorruptCheckpointError as error:
            skipped.append(str(error))
    return None, skipped


def load(path: Path) -> Checkpoint:
    """Reads and verifies one checkpoint.

    Raises:
        CorruptCheckpointError: a file is missing, a link, of the wrong size or checksum, or not
            what a checkpoint holds.
    """
    contents = {name: _read(path / name) for name in (MANIFEST, STATE, TENSORS)}
    _check_manifest(path, contents)
    try:
        state = json.loads(contents[STATE])
        _check_state(state)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError(f"{path / STATE}: {error}") from error
    try:
        tensors = load_tensors(contents[TENSORS])
    except Exception as error:  # safetensors raises many kinds for bytes that are not its own
        raise CorruptCheckpointError(f"{path / TENSORS}: not readable: {error}") from error
    return Checkpoint(tensors, state)


def _read(path: Path) -> bytes:
    """A regular file's bytes, neither through a link nor more than a checkpoint can have."""
    if path.parent.is_symlink() or path.is_symlink():
        raise CorruptCheckpointError(f"{path}: a symbolic link")
    try:
        return read_file(path, LIMITS[path.name], follow=False)
    except OSError as error:
        raise CorruptCheckpointError(f"{path}: {error.strerror}") from error


def _check_manifest(path: Path, contents: dict[str, bytes]) -> None:
    """Compares the files with the manifest, and the manifest with the one way to write it."""
    try:
        files = json.loads(contents[MANIFEST])["files"]
        listed = {name: (files[name]["bytes"], files[name]["sha256"]) for name in (STATE, TENSORS)}
        canonical = _manifest_text(files)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptCheckpointError(f"{path / MANIFEST}: not a manifest ({error})") from error
    if contents[MANIFEST] != canonical or len(files) != len(listed):
        raise CorruptCheckpointError(f"{path / MANIFEST}: not as it was written")
    for name, (size, sha256) in listed.items():
        if len(contents[name]) != size:
            raise CorruptCheckpointError(
                f"{path / name}: {len(contents[name])} bytes instead of {size}"
            )
        if hashlib.sha256(contents[name]).hexdigest() != sha256:
            raise CorruptCheckpointError(f"{path / name}: checksum mismatch")


# What `state.json` holds.
STATE_TYPES: dict[str, type | tuple[type, ...]] = {
    # what makes it this training
    "config": dict,
    "data_sha256": str,
    "world_size": int,
    "device": str,
    "precision": str,
    "mode": str,
    "steps_per_epoch": int,
    # where it stands
    "epoch": int,
    "step": int,
    "global_step": int,
    "epoch_seconds": (int, float),
    "records": list,
    # what goes with it
    "scaler": dict,
    "wandb_id": (str, type(None)),
}


def _check_state(state: Any) -> None:
    """Raises ValueError unless a state is one that a run could have written."""
    if not isinstance(state, dict) or set(state) != set(STATE_TYPES):
        raise ValueError("its keys are not those of a checkpoint")
    for key, kind in STATE_TYPES.items():
        if not isinstance(state[key], kind) or isinstance(state[key], bool):
            raise ValueError(f"{key} is of the wrong type")
    epoch, step, steps = state["epoch"], state["step"], state["steps_per_epoch"]
    consistent = epoch >= 0 and 0 <= step <= steps and state["global_step"] == epoch * steps + step
    if not consistent or not _is_duration(state["epoch_seconds"]):
        raise ValueError("its position is not possible")
    if len(state["records"]) != epoch or not all(
        _is_record(record, number) for number, record in enumerate(state["records"], 1)
    ):
        raise ValueError("records are not those of its epochs")
    # W&B makes file names of it
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", state["wandb_id"] or "none"):
        raise ValueError("wandb_id has characters that an id cannot have")


def _is_duration(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value >= 0


def _is_record(record: Any, epoch: int) -> bool:
    if not isinstance(record, dict) or record.get("epoch") != epoch:
        return False
    measured = ("epoch_seconds", "images_per_second")
    held_out = "test" if "test_loss" in record else "validation"
    numbers = ("train_loss", "train_accuracy", f"{held_out}_loss", f"{held_out}_accuracy")
    return (
        all(_is_duration(record.get(key)) for key in measured)
        and all(isinstance(record.get(key), int | float) for key in numbers)
        and all(isinstance(value, str | int | float | None) for value in record.values())
    )


# What may differ between a run and its continuation without changing the training.
FREE = {
    *("data_dir", "run_dir", "resume", "feed", "process_timeout", "checkpoint_every", "profile"),
    "tta",
    *("precision", "step"),  # what they resolved to is compared
    "recipe",  # only the name: what it chose is compared key by key
    "dataset",  # the data's checksum is compared instead
}


def different_choice(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """The first choice, by name, that makes two configurations another training."""
    for key in sorted({*old, *new} - FREE):
        same = key in old and key in new and old[key] == new[key]
        if not same and not key.startswith("wandb"):
            return key
    return None


def check_same_training(state: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuses to continue under choices that would make it another training.

    Args:
        state: the checkpoint's.
        wanted: the same keys of this run: `config`, `data_sha256`, `world_size`, ...

    Raises:
        InputError: one line that names the first difference.
    """
    old, new = dict(state["config"]), dict(wanted["config"])
    if new["schedule"] != "onecycle" and not new["plain_epochs"] and state["epoch"] < new["epochs"]:
        old["epochs"] = new["epochs"]  # nothing before the end depends on it
    if key := different_choice(old, new):
        _refuse(key, old.get(key), new.get(key))
    for key in wanted:
        if key != "config" and state[key] != wanted[key]:
            _refuse(key, state[key], wanted[key])


def _refuse(key: str, old: Any, new: Any) -> None:
    raise InputError(
        f"cannot resume: the checkpoint has {key} {old}, this run {new}: "
        "use the same, or another --run_dir",
        shared=True,
    )


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


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """States of this process's torch generators."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


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
