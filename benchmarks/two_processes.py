"""Images per second of two processes, on one core each, against one process on one core.

    python benchmarks/two_processes.py --rounds 3

Launches train.py in turns, alone and as two gloo ranks under torchrun, one epoch each, with the
same global batch, and takes the speed from `summary.json`. Writes two_processes.json.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import records  # noqa: E402

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def train(processes: int, choices: list[str], batch_size: int) -> dict[str, Any]:
    """Trains once; its `summary.json`. Raises `CalledProcessError` with the run's output."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, *(TORCHRUN if processes == 2 else ()), str(ROOT / "train.py")]
        command += ["--run_dir", str(run), "--wandb", "disabled", "--threads", "1"]
        command += ["--batch_size", str(batch_size), *choices]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
        return json.loads((run / "summary.json").read_text(encoding="utf-8"))


def main() -> int:
    """Measures, prints, writes; options it does not know are handed on to train.py."""
    parser = records.build_parser(__doc__, rounds=3)
    parser.add_argument("--batch_size", type=int, default=512, help="global (default: 512)")
    options, choices = parser.parse_known_args()
    choices = choices or ["--epochs", "1"]
    speeds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(options.rounds):
        for processes, found in speeds.items():
            summary = train(processes, choices, options.batch_size)
            found.append(summary["images_per_second"])
            print(f"{processes} process(es): {found[-1]:,.0f} images/s", flush=True)
    ratio = statistics.median(speeds[2]) / statistics.median(speeds[1])
    print(f"two processes: {ratio:.2f} times as fast (medians of {options.rounds})")
    results = {"images_per_second": speeds, "ratio_of_medians": ratio}
    records.write("two_processes", options, summary, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
