"""The time of a run by part, from the start of its process on."""

import os
import time
from pathlib import Path

# In the order in which a run comes to them
PARTS = (
    *("imports", "start", "data", "compile", "tracker", "training", "evaluation", "checkpoints"),
    *("figures", "closing"),
)


def seconds_since_start(process: int | str = "self") -> float:
    """Seconds since a process, by default this one, was started, to a hundredth."""
    stat = Path(f"/proc/{process}/stat").read_bytes()
    ticks = int(stat.rpartition(b")")[2].split()[19])  # field 22, since the machine was booted
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


class Parts:
    """Seconds by part: each stretch of time belongs to the part whose end closes it.

    So the parts add up to all the time since the process was started.
    """

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._last = time.perf_counter() - seconds_since_start()

    def end(self, part: str) -> None:
        """Adds the time since the last end to a part."""
        now = time.perf_counter()
        self._seconds[part] += now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        """Seconds by part so far, to a millisecond."""
        return {part: round(seconds, 3) for part, seconds in self._seconds.items()}


def describe(seconds: dict[str, float]) -> str:
    """The parts of at least a twentieth of a second as one line, the longest first."""
    longest = sorted(seconds.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{part} {value:.1f}" for part, value in longest if value >= 0.05)
    return f"{sum(seconds.values()):.1f} s in all: {listed}"
