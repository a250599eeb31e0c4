"""Step modes: `plan` decides which one a run gets, in which precision, and says why."""

import copy
import dataclasses
import os

import torch

from mnist_fast.config import Config
from mnist_fast.data import Sharding
from mnist_fast.errors import InputError
from mnist_fast.model import Network
from mnist_fast.runtime import Runtime
from mnist_fast.steps.base import Job, Settings, Step, TrainState
from mnist_fast.steps.captured import CapturedStep
from mnist_fast.steps.compiled import CompiledStep
from mnist_fast.steps.eager import EagerStep
from mnist_fast.steps.fused import FusedStep
from mnist_fast.steps.native import NativeStep

# In order of preference: `auto` takes the first one that supports the run.
MODES: tuple[type[Step], ...] = (FusedStep, CapturedStep, NativeStep, CompiledStep, EagerStep)
WORTH_A_GPU = 128  # images of a step from which a GPU's time grows with their number
PRECISIONS = {"no": "float32", "bf16": "bf16", "fp16": "fp16"}


@dataclasses.dataclass(frozen=True)
class Plan:
    """The mode that a run gets, its job, and why faster modes were passed over.

    Attributes:
        mode: the class of the steps.
        job: what they are built for; it holds the precision.
        passed_over: names of the modes that come before it, each with the reason.
        notes: what else the user should know, in sentences.
    """

    mode: type[Step]
    job: Job
    passed_over: dict[str, str]
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        """Mode, precision, reasons and notes as one line."""
        line = f"step: {self.mode.name} in {PRECISIONS[self.job.precision]}"
        if (processes := self.job.sharding.world_size) > 1:
            line += f" on {processes} processes"
        reasons: dict[str, list[str]] = {}
        for name, reason in self.passed_over.items():
            reasons.setdefault(reason, []).append(name)
        told = [f"{' and '.join(modes)}, because {reason}" for reason, modes in reasons.items()]
        passed_over = [f"Passed over: {'; '.join(told)}"] if told else []
        return ". ".join([line, *passed_over, *self.notes])

    def build(self, state: TrainState, runtime: Runtime) -> Step:
        """The step, which trains the state."""
        return self.mode(self.job, state, runtime)


def names() -> list[str]:
    """The values that `--step` accepts."""
    return ["auto", *(mode.name for mode in reversed(MODES))]


def mode_named(name: str) -> type[Step]:
    """The mode of a name, which must be one of `MODES`."""
    return next(mode for mode in MODES if mode.name == name)


def check_name(name: str) -> None:
    """Refuses an unknown mode.

    Raises:
        InputError: no mode has this name.
    """
    if name not in names():
        raise InputError(f"--step {name}: unknown, the modes are {', '.join(names())}")


def plan(config: Config, network: Network, runtime: Runtime, sharding: Sharding) -> Plan:
    """The mode and the precision of a run, the same on every process.

    Args:
        config: the run's choices.
        network: as it was built, on the CPU.
        runtime: processes and device.
        sharding: the run's.

    Raises:
        InputError: what is asked for by name is not supported, on this process or on another.
    """
    check_name(config.step)
    wanted, default, notes = _agree_on_precision(config, runtime)
    if runtime.device.type == "cuda" and (note := small_shares(sharding)):
        notes = (*notes, note)
    images = config.epochs * sharding.samples
    passed_over: dict[str, str] = {}
    network = copy.deepcopy(network)  # the run moves its own to the device
    for mode in _candidates(config.step, runtime.device):
        precision = wanted or (default if default in mode.precisions else "no")
        job = Job(config, network, runtime.device, precision, sharding)
        reason = None
        if config.step == "auto" and images < mode.min_images:
            reason = f"a run of {images:,} images is too short"
        reason = _first(runtime.gather(reason or unsupported_reason(mode, job)))
        if reason is None:
            return Plan(mode, job, passed_over, notes)
        if config.step != "auto":
            raise InputError(f"--step {mode.name}: {reason}: use --step auto", shared=True)
        passed_over[mode.name] = reason
    raise AssertionError("eager steps support every job")


def _candidates(name: str, device: torch.device) -> list[type[Step]]:
    """The mode of a name, or for `auto` all those for a device."""
    if name != "auto":
        return [mode_named(name)]
    return [mode for mode in MODES if device.type in mode.devices]


def unsupported_reason(mode: type[Step], job: Job) -> str | None:
    """Why a mode cannot run a job, in words; None where it can."""
    if job.device.type not in mode.devices:
        return "it needs a GPU" if job.device.type == "cpu" else "it is for CPUs"
    if job.precision not in mode.precisions:
        return f"it does not support {PRECISIONS[job.precision]}"
    return mode.unsupported_reason(job)


def _first(reasons: list[str | None]) -> str | None:
    """The first process's reason; that of another one with its rank."""
    for rank, reason in enumerate(reasons):
        if reason is not None:
            return f"on process {rank}, {reason}" if rank else reason
    return None


def small_shares(sharding: Sharding) -> str | None:
    """Advice where several GPUs share batches too small for one of them; None elsewhere.

    Muon's rate grows with the square root of the batch: docs/speed.md, "How to scale the batch".
    """
    processes, size = sharding.world_size, sharding.local_size
    if processes == 1 or size >= WORTH_A_GPU:
        return None
    rate = 0.05 * processes**0.5
    return (
        f"{processes} processes share each batch of {sharding.batch_size} images, {size} each, "
        f"which keeps no GPU busy: one process may be as fast (--num_processes 1 of the launcher), "
        f"or give each {WORTH_A_GPU}: --recipe scale --batch_size {processes * WORTH_A_GPU} "
        f"--learning_rate {rate:.2g}"
    )


def _agree_on_precision(
    config: Config, runtime: Runtime
) -> tuple[str | None, str, tuple[str, ...]]:
    """The precision that was asked for, or None, the one that GPUs get otherwise, and notes.

    Raises:
        InputError: the processes were asked for different ones, or for one that is not supported.
    """
    wanted = config.precision if config.precision != "auto" else _launchers_precision()
    told = runtime.gather((wanted, has_bf16(runtime.device)))
    if len({one for one, _ in told}) > 1:
        listed = ", ".join(str(one) for one, _ in told)
        fault = f"the processes were started with different precisions ({listed})"
        raise InputError(f"{fault}: give the same --precision to all", shared=True)
    if wanted is not None and wanted not in PRECISIONS:
        fault = f"ACCELERATE_MIXED_PRECISION is {wanted}, from the launcher"
        raise InputError(f"{fault}: use --mixed_precision bf16, fp16 or no there", shared=True)
    if wanted == "fp16" and runtime.device.type == "cpu":
        raise InputError("--precision fp16 needs a GPU: use bf16 or no", shared=True)
    have_bf16 = all(has for _, has in told)
    on_gpu, from_launcher = runtime.device.type == "cuda", config.precision == "auto"
    if wanted == "bf16" and on_gpu and from_launcher and not have_bf16:
        return None, "no", ("The launcher asked for bf16, which not every GPU here supports",)
    notes = (f"{wanted} is what the launcher asked for",) if wanted and from_launcher else ()
    return wanted, "bf16" if have_bf16 else "no", notes


def _launchers_precision() -> str | None:
    """What the launcher was told, or None: it says `no` where nobody chose."""
    told = os.environ.get("ACCELERATE_MIXED_PRECISION") or "no"
    return None if told == "no" else told


def has_bf16(device: torch.device) -> bool:
    """Whether a device is a GPU that multiplies bf16 matrices."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


__all__ = [
    "MODES",
    "Job",
    "Plan",
    "Settings",
    "Step",
    "TrainState",
    "check_name",
    "mode_named",
    "plan",
]
