"""Divides a node's CPUs among its training processes: `python slurm/cpus.py PROCESSES`.

Prints the threads of each process, then one line per process with the CPUs that it may use.
"""

import os
import subprocess
import sys
from pathlib import Path


def divide(cpus: list[int], near: list[set[int]]) -> list[list[int]]:
    """Gives every process the same number of CPUs, those near its GPU first.

    Args:
        cpus: those to divide, neighbours side by side.
        near: for each process the CPUs next to its GPU; empty where that is not known.

    Returns:
        For each process its CPUs. With fewer CPUs than processes some share one.
    """
    if len(cpus) < len(near):
        return [[cpus[process % len(cpus)]] for process in range(len(near))]
    quota, free = len(cpus) // len(near), list(cpus)
    shares: list[list[int]] = [[] for _ in near]
    for wanted in (near, [set(cpus)] * len(near)):
        for share, close in zip(shares, wanted, strict=True):
            taken = [cpu for cpu in free if cpu in close][: quota - len(share)]
            share += taken
            free = [cpu for cpu in free if cpu not in taken]
    return shares


def allowed(owned: int) -> set[int]:
    """The CPUs that this process may use, with a binding undone that is narrower than the job."""
    if len(os.sched_getaffinity(0)) < owned:
        os.sched_setaffinity(0, range(os.cpu_count() or 1))  # the job's cgroup still holds
    return os.sched_getaffinity(0)


def by_neighbourhood(cpus: set[int]) -> list[int]:
    """CPUs with those of one core, socket and memory node side by side."""
    columns = ask("lscpu", "--parse=NODE,SOCKET,CORE,CPU")
    rows = [line.split(",") for line in columns if not line.startswith("#")]
    places = {int(row[-1]): [int(field or 0) for field in row] for row in rows}
    return sorted(cpus, key=lambda cpu: places.get(cpu, [0, 0, 0, cpu]))


def near_gpus(processes: int) -> list[set[int]]:
    """For each process the CPUs next to its GPU; empty sets where that is not known."""
    rows = ask("nvidia-smi", "--query-gpu=pci.bus_id,index,uuid", "--format=csv,noheader")
    buses: dict[str, str] = {}
    for bus, *names in (row.split(", ") for row in rows):
        buses |= dict.fromkeys(names, bus.lower()[-12:])  # its domain has 8 digits, the kernel's 4
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    found = [local_cpus(buses[name]) for name in visible if name in buses]
    return found if len(found) == processes else [set()] * processes


def local_cpus(bus: str) -> set[int]:
    """The CPUs of the memory node that a PCI device belongs to; empty where that is not known."""
    try:
        text = Path(f"/sys/bus/pci/devices/{bus}/local_cpulist").read_text()
    except OSError:
        return set()
    ends = [part.split("-") for part in text.strip().split(",") if part]
    return {cpu for end in ends for cpu in range(int(end[0]), int(end[-1]) + 1)}


def as_ranges(cpus: list[int]) -> str:
    """CPUs as taskset takes them: `[0, 1, 2, 8]` is `0-2,8`."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][-1] + 1:
            runs[-1].append(cpu)
        else:
            runs.append([cpu])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def ask(*command: str) -> list[str]:
    """The lines that a program prints; none where it fails or is not installed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def main() -> None:
    """Prints the threads of a process and the CPUs of each."""
    processes = int(sys.argv[1])
    owned = int(os.environ.get("SLURM_CPUS_ON_NODE") or 1)
    cpus = allowed(owned)
    if len(cpus) > owned:  # nothing tells which of them are the job's
        shares = [sorted(cpus)] * processes
    else:
        shares = divide(by_neighbourhood(cpus), near_gpus(processes))
    print(max(1, min(owned, len(cpus)) // processes))
    for share in shares:
        print(as_ranges(share))


if __name__ == "__main__":
    main()
