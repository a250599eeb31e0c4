"""Processes, device and reductions."""

import contextlib
import datetime
import os
import random
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from mnist_fast import signals
from mnist_fast.augment import derive_key
from mnist_fast.config import Config
from mnist_fast.errors import InputError, RunError, one_line
from mnist_fast.files import say
from mnist_fast.launch_environment import TRUE, check_accelerate, check_launch_environment
from mnist_fast.provenance import device_name

T = TypeVar("T")

STOP_INTERVAL = 8  # steps from one agreement on a stop to the next


class Runtime:
    """One process's view of the run.

    Attributes:
        device: where tensors live.
        device_name: that in words, with the threads of a CPU.
        threads: for computing on the CPU.
        rank, world_size: number of this process, and of all.
        is_main: whether this process speaks and writes for all.
        precision: no, bf16 or fp16; set by `set_precision`.
    """

    def __init__(self, config: Config):
        check_accelerate(os.environ)
        # `accelerate launch` says False where nobody asked for the CPU
        self._cpu = _asks_for_cpu() or not torch.cuda.is_available()
        check_launch_environment(os.environ, not self._cpu)
        timeout = datetime.timedelta(seconds=config.process_timeout)
        try:
            with naming_lost_processes(), signals.ending_at_once(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about the threads, which are set below
                state = PartialState(cpu=self._cpu, timeout=timeout)
        except ValueError as error:  # Accelerate and torch name what is missing
            advice = "start with accelerate launch or torchrun, or unset WORLD_SIZE and RANK"
            raise InputError(f"environment: {one_line(error)}; {advice}") from error
        self.device: torch.device = state.device
        set_threads(config.threads)
        # float32 is to mean float32, in evaluation above all, also where a container says otherwise
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.deterministic = True  # a run that goes on ends with the same bits
        self.threads = torch.get_num_threads()  # a native step leaves torch one of them
        self.device_name = device_name(self.device)
        self.rank: int = state.process_index
        self.world_size: int = state.num_processes
        self.is_main: bool = state.is_main_process
        self.precision = "no"
        # objects, barriers and agreements go over the host: NCCL would sync the device for them
        self._host_group: Any = None
        if self.world_size > 1 and self.device.type == "cuda":
            self._host_group = dist.new_group(backend="gloo", timeout=timeout)
        self._pending_stop: tuple[Any, Tensor] | None = None
        self._steps = 0

    def set_precision(self, precision: str) -> None:
        """Sets the mixed precision; to be called once, before anything is prepared."""
        self.precision = precision
        self.accelerator = Accelerator(
            mixed_precision=precision,
            cpu=self._cpu,
            log_with="wandb",
            # running statistics are averaged before use, not broadcast in every step
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )

    def seed(self, seed: int) -> None:
        """Seeds the generators: the same weights everywhere, then other dropout per process."""
        torch.manual_seed(derive_key(seed, 0, "weights"))

    def seed_process(self, seed: int) -> None:
        """Seeds this process's own randomness (dropout masks)."""
        torch.manual_seed(derive_key(seed, self.rank, "process"))
        random.seed(derive_key(seed, self.rank, "python"))
        np.random.seed(derive_key(seed, self.rank, "numpy") % 2**32)

    def prepare(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """Moves to the device and wraps for several processes (DDP) and for fp16's scaler."""
        with warnings.catch_warnings():  # the name that follows it is not in every torch since 2.6
            warnings.filterwarnings("ignore", ".*broadcast_buffers. is deprecated", FutureWarning)
            return self.accelerator.prepare(network, optimizer)

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Runs the forward pass in the run's precision."""
        dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.precision != "no")

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a loss, scaled in fp16."""
        self.accelerator.backward(loss)

    def average_buffers(self, network: nn.Module) -> None:
        """Averages BatchNorm's running statistics, which each process gathers on its own images."""
        self.average([buffer for buffer in network.buffers() if buffer.is_floating_point()])

    def average(self, tensors: list[Tensor]) -> None:
        """Averages float32 tensors over the processes, in place and in one exchange."""
        if self.world_size == 1:
            return
        flat = torch._utils._flatten_dense_tensors(tensors)
        if self.device.type == "cpu":  # so few bytes cost gloo a wake-up per message, of which
            gathered = flat.new_empty(self.world_size * len(flat))  # a gather needs half as many
            dist.all_gather_into_tensor(gathered, flat)
            flat = gathered.view(self.world_size, -1).sum(0)
        else:
            dist.all_reduce(flat)
        flat /= self.world_size
        parts = torch._utils._unflatten_dense_tensors(flat, tensors)
        torch._foreach_copy_(tensors, list(parts))

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over all processes, on every process."""
        if self.world_size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def broadcast(self, value: Any) -> Any:
        """The main process's value (any that pickles), on every process."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, group=self._host_group)
        return values[0]

    def on_main(self, action: Callable[[], T]) -> T:
        """Runs an action on the main process alone; its result on every process.

        Raises:
            InputError: on every process, where the action raised it.
        """
        result, fault = self.broadcast(_attempt(action) if self.is_main else None)
        if fault:
            raise InputError(fault, shared=True)
        return result

    def on_each(self, action: Callable[[], T]) -> list[T]:
        """Runs an action on every process; all results on every process, by rank.

        Raises:
            InputError: on every process, where the action raised it on one.
        """
        told = self.gather(_attempt(action))
        for rank, (_, fault) in enumerate(told):
            if fault:
                where = f"on process {rank}: " if rank else ""
                raise InputError(f"{where}{fault}", shared=True)
        return [result for result, _ in told]

    def gather(self, value: Any) -> list[Any]:
        """Every process's value (any that pickles), on every process, by rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self._host_group)
        return values

    def say(self, message: str) -> None:
        """Prints a line, on the main process."""
        if self.is_main:
            say(message)

    def wait(self) -> None:
        """Returns when every process has come here."""
        if self.world_size > 1:
            dist.barrier(group=self._host_group)

    def agree_to_stop(self, requested: bool) -> bool:
        """Whether the processes stop now: the same answer everywhere, at every step's end.

        With several processes requests are reduced in the background, at every eighth call, and
        answered eight calls later, so that no step waits for it.
        """
        if self.world_size == 1:
            return requested
        self._steps += 1
        if self._steps % STOP_INTERVAL:
            return False
        agreed = self._pending_stop is not None and self._finish_stop()
        flag = torch.tensor([int(requested)], dtype=torch.int32)
        work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._host_group, async_op=True)
        self._pending_stop = (work, flag)
        return agreed

    def _finish_stop(self) -> bool:
        assert self._pending_stop is not None
        work, flag = self._pending_stop
        self._pending_stop = None
        work.wait()
        return bool(flag.item())

    def start_tracker(self, project: str, settings: dict[str, Any]) -> Any:
        """Starts Accelerate's W&B tracker and returns the W&B run; main process only."""
        self.accelerator.trackers.clear()  # one that failed to start would be started again
        self.accelerator.init_trackers(project, init_kwargs={"wandb": settings})
        return self.accelerator.get_tracker("wandb", unwrap=True)

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        """Hands a line of history to the tracker; `step` is its number, the next one if None."""
        self.accelerator.log(values, step=step, log_kwargs={"wandb": {"commit": True}})

    def scaler_state(self) -> dict[str, Any]:
        """The state of fp16's loss scaling; empty in other precisions."""
        scaler = self.accelerator.scaler
        return scaler.state_dict() if scaler is not None else {}

    def load_scaler_state(self, state: dict[str, Any]) -> None:
        """Sets what `scaler_state` returned."""
        if state:
            self.accelerator.scaler.load_state_dict(state)

    def close(self) -> None:
        """Leaves the process group, together with the others."""
        if self._pending_stop is not None:
            self._finish_stop()
        if dist.is_initialized():
            dist.destroy_process_group()


def _attempt(action: Callable[[], T]) -> tuple[T | None, str]:
    """An action's result, or the message of the `InputError` that it raised."""
    try:
        return action(), ""
    except InputError as error:
        return None, str(error)


def _asks_for_cpu() -> bool:
    """Whether the launcher was told to leave the GPUs alone, in Accelerate's words for it."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in TRUE


# Words by which gloo's errors are told from others; its own name is not in all of them.
GLOO_SAYS = ("gloo", "pair closure", "Connection closed by peer", "Connection reset by peer")


@contextlib.contextmanager
def naming_lost_processes() -> Iterator[None]:
    """Turns the many lines of torch and gloo about processes that do not answer into one.

    Raises:
        RunError: another process ended or did not answer in time, or the port is taken.
    """
    try:
        yield
    except RuntimeError as error:  # gloo's errors have no class of their own
        text = str(error)
        if not isinstance(error, dist.DistError) and not any(map(text.__contains__, GLOO_SAYS)):
            raise
        if "EADDRINUSE" in text:
            port = os.environ.get("MASTER_PORT")
            raise RunError(f"port {port} is in use: choose another for the launcher") from error
        reason = text.strip().splitlines()[0]
        raise RunError(f"another process was lost or does not answer: {reason}") from error


def set_threads(wanted: int) -> None:
    """Sets torch's threads: as wanted, else by OMP_NUM_THREADS, else a fair share of the CPUs.

    What the variable says, which may be left over, counts up to the number of CPUs: 128 threads on
    two of them did no epoch in 30 s, and did not listen to a request to stop. `accelerate launch`
    and `torchrun` set it to 1 where the user set nothing; a 1 from them is therefore ignored, and
    so is what is no number.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    asked = os.environ.get("OMP_NUM_THREADS", "")
    cpus = len(os.sched_getaffinity(0))
    if not wanted and re.fullmatch("[0-9]{1,4}", asked) and not (launched and asked == "1"):
        wanted = min(int(asked), cpus)
    share = cpus // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(wanted or max(1, share))
