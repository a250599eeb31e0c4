"""Checkpoints: written whole or not at all, verified before they are used, never unpickled.

A checkpoint is a folder `step-NNNNNNNN` with `tensors.safetensors`, `state.json` and
`manifest.json`, which lists size and sha256 of the others. It is written under a temporary name,
flushed to the disk and renamed; older ones are deleted only after that.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from mnist_fast.errors import InputError

FORMAT = 1
KEEP = 2  # checkpoints left after pruning
MANIFEST, STATE, TENSORS = "manifest.json", "state.json", "tensors.safetensors"
_NAME = re.compile(r"step-\d{8,}")


class CorruptCheckpointError(Exception):
    """A checkpoint that cannot be trusted: one line that names the file and the fault."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on as if it had never stopped.

    Attributes:
        tensors: weights, momentum, averages, totals and generator states, by name, on the CPU.
        state: plain values: position, resolved configuration, data checksum, W&B id.
    """

    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Writes a checkpoint into `folder` and prunes the oldest; returns its path.

    Raises:
        OSError: the disk is full or the folder not writable; earlier checkpoints are untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{checkpoint.state['global_step']:08d}"
    temporary = folder / f".writing-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        contents = {
            TENSORS: save_tensors(checkpoint.tensors),
            STATE: json.dumps(checkpoint.state, indent=1).encode(),
        }
        for name, content in contents.items():
            write_durably(temporary / name, content)
        files = {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in contents.items()
        }
        manifest = json.dumps({"format": FORMAT, "files": files}, indent=1).encode()
        write_durably(temporary / MANIFEST, manifest)
        sync_folder(temporary)
        shutil.rmtree(target, ignore_errors=True)  # the same step again, after an earlier resume
        temporary.rename(target)
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    prune(folder, keep=target)
    return target


def write_durably(path: Path, content: bytes) -> None:
    """Writes a file and waits until the disk has it."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Waits until the disk has a folder's entries."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prune(folder: Path, keep: Path) -> None:
    """Deletes all but the newest checkpoints, and what an interrupted save left."""
    older = [path for path in newest_first(folder) if path != keep]
    for path in older[KEEP - 1 :] + list(folder.glob(".writing-*")):
        shutil.rmtree(path, ignore_errors=True)


def newest_first(folder: Path) -> list[Path]:
    """Checkpoint folders by step, newest first, valid or not."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def load(path: Path) -> Checkpoint:
    """Reads and verifies one checkpoint.

    Raises:
        CorruptCheckpointError: a file is missing, of the wrong size or checksum, or not readable.
    """
    contents = _verified_contents(path)
    try:
        state = json.loads(contents[STATE])
        tensors = load_tensors(contents[TENSORS])
    except (ValueError, SafetensorError) as error:
        raise CorruptCheckpointError(f"{path}: not readable: {error}") from error
    return Checkpoint(tensors, state)


def _verified_contents(path: Path) -> dict[str, bytes]:
    """The files' bytes, each checked against the manifest."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        if manifest["format"] != FORMAT:
            raise CorruptCheckpointError(f"{path / MANIFEST}: format {manifest['format']}")
        files = {name: manifest["files"][name] for name in (TENSORS, STATE)}
        contents = {name: (path / name).read_bytes() for name in files}
        for name, content in contents.items():
            if len(content) != files[name]["bytes"]:
                raise CorruptCheckpointError(
                    f"{path / name}: {len(content)} bytes instead of {files[name]['bytes']}"
                )
            if hashlib.sha256(content).hexdigest() != files[name]["sha256"]:
                raise CorruptCheckpointError(f"{path / name}: checksum mismatch")
    except OSError as error:
        raise CorruptCheckpointError(f"{error.filename}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptCheckpointError(f"{path / MANIFEST}: not a manifest ({error})") from error
    return contents


def load_newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint of a folder, and why each newer one was skipped."""
    skipped: list[str] = []
    for path in newest_first(folder):
        try:
            return load(path), skipped
        except CorruptCheckpointError as error:
            skipped.append(str(error))
    return None, skipped


# What may differ between a run and its continuation without changing the training.
FREE = {
    *("data_dir", "run_dir", "resume", "feed", "process_timeout", "checkpoint_every"),
    *("wandb", "wandb_project", "wandb_entity", "wandb_name"),
    *("wandb_group", "wandb_job_type", "wandb_tags", "wandb_notes"),
    "recipe",  # only the name: what it chose is compared key by key
    "dataset",  # the data's checksum is compared instead
}


def check_same_training(state: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuses to continue under choices that would make it another training.

    Args:
        state: the checkpoint's.
        wanted: this run's `config`, `data_sha256`, `world_size`, `precision`, `mode`.

    Raises:
        InputError: one line that names the first difference.
    """
    old, new = dict(state["config"]), dict(wanted["config"])
    if old.get("schedule") != "onecycle" and not old.get("plain_epochs"):
        old["epochs"] = new["epochs"]  # nothing before the end depends on it
    for key in new:
        if key not in FREE and key not in ("precision", "step") and old.get(key) != new[key]:
            _refuse(key, old.get(key), new[key])
    for key in ("data_sha256", "world_size", "precision", "mode"):
        if state[key] != wanted[key]:
            _refuse(key, state[key], wanted[key])


def _refuse(key: str, old: Any, new: Any) -> None:
    raise InputError(
        f"cannot resume: the checkpoint has {key} {old}, this run {new}: "
        "use the same, or another --run_dir"
    )


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """States of this process's torch generators."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_generators(states: dict[str, Tensor], device: torch.device) -> None:
    """Sets this process's torch generators."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
