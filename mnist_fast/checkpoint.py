"""The file format of checkpoints: written whole or not at all, verified, never unpickled.

A checkpoint is a folder `step-NNNNNNNN` with `tensors.safetensors`, `state.json` and
`manifest.json`, which lists size and sha256 of the others. It is written under a temporary name,
flushed to the disk and renamed; older ones are deleted only after that.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from mnist_fast.files import read_file

FORMAT = 2
KEEP = 2  # checkpoints left after pruning
FILES = MANIFEST, STATE, TENSORS = "manifest.json", "state.json", "tensors.safetensors"
LIMITS = {MANIFEST: 10_000, STATE: 2**26, TENSORS: 2**26}  # bytes; more is not read at all
_NAME = re.compile(r"step-\d{8,18}")
CheckState = Callable[[Any], None]


class CorruptCheckpointError(Exception):
    """A checkpoint that cannot be trusted: one line that names the file and the fault."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on as if it had never stopped.

    Attributes:
        tensors: by name, on the CPU; `resume` says which.
        state: plain values; `global_step`, a whole number, is among them.
    """

    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save(folder: Path, checkpoint: Checkpoint, check_state: CheckState) -> Path:
    """Writes a checkpoint into `folder` and prunes the oldest; returns its path.

    The caller holds the run's lock: nobody else writes there.

    Args:
        folder: of the run's checkpoints.
        checkpoint: what is written.
        check_state: raises ValueError for a state that a run could not have written.

    Raises:
        OSError: the disk is full or the folder not writable; earlier checkpoints are untouched.
    """
    target = folder / f"step-{checkpoint.state['global_step']:08d}"
    if _is_valid(target, check_state):  # the same training came here before, and was passed over
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


def _is_valid(path: Path, check_state: CheckState) -> bool:
    with contextlib.suppress(CorruptCheckpointError):
        return bool(load(path, check_state))
    return False


def write_durably(path: Path, content: bytes) -> None:
    """Writes a file and waits until the disk has it."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def save_weights(path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """Writes weights as safetensors, in one step, with a description and their checksum.

    Args:
        path: of the file.
        tensors: by name.
        about: the description, text by name.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = save_tensors(weights, metadata=about | {"sha256": digest(weights)})
    temporary = path.with_name(f".{path.name}")
    try:
        write_durably(temporary, sort_header(content))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
    """Deletes all checkpoints older than `keep` except the newest, and interrupted saves."""
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


def load_newest(folder: Path, check_state: CheckState) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint of a folder, and why each newer one was skipped."""
    skipped: list[str] = []
    for path in newest_first(folder):
        try:
            return load(path, check_state), skipped
        except CorruptCheckpointError as error:
            skipped.append(str(error))
    return None, skipped


def load(path: Path, check_state: CheckState) -> Checkpoint:
    """Reads and verifies one checkpoint; arguments as for `save`.

    Raises:
        CorruptCheckpointError: a file is missing, a link, of the wrong size or checksum, or not
            what a checkpoint holds.
    """
    contents = {name: _read(path / name) for name in (MANIFEST, STATE, TENSORS)}
    _check_manifest(path, contents)
    try:
        state = json.loads(contents[STATE])
        check_state(state)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError(f"{path / STATE}: {error}") from error
    try:
        tensors = load_tensors(contents[TENSORS])
    except Exception as error:  # safetensors raises many kinds for bytes that are not its own
        raise CorruptCheckpointError(f"{path / TENSORS}: not readable: {error}") from error
    return Checkpoint(tensors, state)


def _read(path: Path) -> bytes:
    """A regular file's bytes; refuses links, and more bytes than a checkpoint can have."""
    if path.parent.is_symlink() or path.is_symlink():
        raise CorruptCheckpointError(f"{path}: a symbolic link")
    try:
        return read_file(path, LIMITS[path.name], follow=False)
    except OSError as error:
        raise CorruptCheckpointError(f"{path}: {error.strerror}") from error


def _check_manifest(path: Path, contents: dict[str, bytes]) -> None:
    """Compares the files with the manifest, and the manifest with its canonical form."""
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
