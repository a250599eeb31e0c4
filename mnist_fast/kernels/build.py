"""Compilers and their caches: C++ for CPUs, NVRTC for GPUs, Inductor for torch.compile."""

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mnist_fast.files import write_atomically

CPP_OPTIONS = ("-std=c++20", "-O3", "-march=native", "-shared", "-fPIC", "-pthread")
CUDA_OPTIONS = ("-std=c++20", "-default-device", "-diag-suppress=128,177")
COMPILE_TIMEOUT = 300.0  # seconds
FULL = "No space left on device"


class BuildError(Exception):
    """Code that cannot be compiled or loaded here; the message is one line that says why."""


def cache_folder(name: str) -> Path:
    """A folder for compiled code in the user's cache, created.

    The cache is $XDG_CACHE_HOME, else ~/.cache.

    Raises:
        OSError: it cannot be created.
        RuntimeError: the user has no home.
    """
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    cache = Path(chosen) if os.path.isabs(chosen) else Path.home() / ".cache"
    folder = cache / "mnist_fast" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cpp_compiler() -> str | None:
    """The C++ compiler: $CXX, or the first that is installed."""
    names = (os.environ.get("CXX", ""), "g++", "c++", "clang++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def c_compiler() -> str | None:
    """The C compiler that Triton builds its driver with: $CC where that is set, gcc or clang."""
    chosen = os.environ.get("CC")
    names = ("gcc", "clang") if chosen is None else (chosen,)
    return next((path for name in names if (path := shutil.which(name))), None)


def load_cpp(source: Path, headers: Sequence[Path]) -> ctypes.CDLL:
    """Compiled and loaded C++, from the user's cache where it is there.

    If the cache cannot be written, or runs no code, a temporary folder serves this process.

    Args:
        source: what is compiled.
        headers: what it includes.

    Raises:
        BuildError: there is no compiler, or it refuses the source.
    """
    program = cpp_compiler()
    if program is None:
        raise BuildError("there is no C++ compiler: install g++, or name one in CXX")
    parts = [source.read_bytes(), *(header.read_bytes() for header in headers)]
    # nodes of a cluster with other processors may share the cache
    parts += [program.encode(), " ".join(CPP_OPTIONS).encode(), _processor()]
    name = f"{hashlib.sha256(b'/'.join(parts)).hexdigest()[:16]}.so"
    with contextlib.suppress(OSError, RuntimeError, BuildError):
        return _load_from(cache_folder("cpu"), name, program, source)
    try:
        # the code stays in memory when its file is gone
        with tempfile.TemporaryDirectory(prefix="mnist_fast-") as folder:
            return _load_from(Path(folder), name, program, source)
    except OSError as error:
        raise BuildError(f"{error.filename or source.name}: {error.strerror or error}") from error


def _load_from(folder: Path, name: str, program: str, source: Path) -> ctypes.CDLL:
    path = folder / name
    if not path.exists():
        with tempfile.TemporaryDirectory(
            dir=folder
        ) as scratch:  # two processes may compile at once
            made = Path(scratch) / name
            _compile_cpp(program, source, made)
            made.replace(path)
    return ctypes.CDLL(str(path))


def _compile_cpp(program: str, source: Path, made: Path) -> None:
    command = [program, *CPP_OPTIONS, "-o", str(made), str(source)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{program} took more than {COMPILE_TIMEOUT:.0f} s") from error
    except subprocess.CalledProcessError as error:
        raise BuildError(_reason(error.stderr, f"{program} failed")) from error


def _reason(output: str, default: str) -> str:
    """The line of a compiler's output that says why it failed."""
    lines = output.strip().splitlines()
    for sign in (FULL, ": error", "rror:"):  # warnings may come before the error
        if found := next((line for line in lines if sign in line), None):
            return found.strip()
    return lines[0] if lines else default


def _processor() -> bytes:
    """The processor's instruction sets, as the kernel lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return b""
    return b"".join(sorted({line for line in lines if line.startswith((b"flags", b"Features"))}))


def load_cuda(text: str) -> Any:
    """A CUDA module of the program, loaded on the current GPU.

    Raises:
        BuildError: the compiler refuses it; its first line is in the message.
    """
    from cuda.bindings import driver

    try:
        return call_cuda(driver.cuModuleLoadData(compile_cuda(text)))
    except BuildError:  # what the cache had may be damaged
        return call_cuda(driver.cuModuleLoadData(compile_cuda(text, force=True)))


def compile_cuda(text: str, force: bool = False) -> bytes:
    """Machine code for the current GPU, from the user's cache where it is there.

    Args:
        text: the program.
        force: compile it in any case.

    Raises:
        BuildError: the compiler refuses it.
    """
    major, minor = torch.cuda.get_device_capability()
    options = (*CUDA_OPTIONS, f"-arch=sm_{major}{minor}")
    key = hashlib.sha256("/".join([text, *options, str(torch.version.cuda)]).encode()).hexdigest()
    path = None
    with contextlib.suppress(OSError, RuntimeError):
        path = cache_folder("hopper") / f"{key[:16]}.cubin"
        if not force:
            return path.read_bytes()
    code = _compile_cuda(text, options)
    if path is not None:
        with contextlib.suppress(OSError):  # a full disk, say: the code is there all the same
            write_atomically(path, code)
    return code


def _compile_cuda(text: str, options: tuple[str, ...]) -> bytes:
    from cuda.bindings import nvrtc

    program = call_cuda(nvrtc.nvrtcCreateProgram(text.encode(), b"hopper.cu", 0, [], []))
    given = [option.encode() for option in options]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(given), given)
    if status.value:
        log = bytearray(call_cuda(nvrtc.nvrtcGetProgramLogSize(program)))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise BuildError(_reason(log.decode(errors="replace").strip("\0 \n"), status.name))
    code = bytearray(call_cuda(nvrtc.nvrtcGetCUBINSize(program)))
    nvrtc.nvrtcGetCUBIN(program, code)
    return bytes(code)


def call_cuda(answer: tuple[Any, ...]) -> Any:
    """The values that a function of CUDA returned after its status.

    Raises:
        BuildError: the status is an error.
    """
    status, *values = answer
    if status.value:
        raise BuildError(f"CUDA: {status.name}")
    return values[0] if len(values) == 1 else values


def prepare_inductor(device_type: str) -> None:
    """Keeps Inductor's kernels in the user's cache, and lets it choose none by timing on GPUs.

    A program may compile the same function for many shapes; torch gives up after eight, silently.

    /tmp, torch's choice for the cache, often ends with a job. Where the user has no cache, or
    TORCHINDUCTOR_CACHE_DIR is set, the place is not changed.
    """
    with contextlib.suppress(OSError, RuntimeError):
        folder = cache_folder("inductor")
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    torch._dynamo.config.cache_size_limit = 64
    if device_type == "cuda":
        from torch._inductor import config

        if hasattr(config, "deterministic"):  # since torch 2.10
            config.deterministic = True


def why_no_inductor(device_type: str) -> str | None:
    """Why torch.compile cannot build kernels for a device here; None where it can."""
    if os.environ.get("TORCHDYNAMO_DISABLE", "0") not in ("", "0"):
        return "TORCHDYNAMO_DISABLE is set"
    if device_type == "cpu":
        return None if cpp_compiler() else "there is no C++ compiler: install g++"
    if c_compiler() is None:
        return "there is no C compiler, which Triton needs: install gcc"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "there is no Python.h, which Triton needs: install python3-dev"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None
