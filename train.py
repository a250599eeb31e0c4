"""Trains the network: `accelerate launch train.py --help` lists the options."""

import gc
import traceback

from mnist_fast import signals
from mnist_fast.errors import InputError, leave, run_main
from mnist_fast.preflight import LIBRARIES, missing_libraries


def main() -> int:
    """Resolves the command line and trains."""
    needed = [name for name in LIBRARIES if name != "wandb"]  # a run goes on without it
    for fault in missing_libraries(needed, quick=True):
        raise InputError(fault)
    from mnist_fast.cli import load

    config = load()
    gc.disable()  # it would search the libraries' new objects again and again
    from mnist_fast.loop import train  # after bad usage was refused: its imports take seconds

    gc.freeze()
    gc.enable()
    train(config)
    return 0


if __name__ == "__main__":
    signals.install()  # before the slow imports: a request to stop may come at any time
    signals.follow_launcher()
    try:
        status = run_main(main, "train.py")
    except Exception:  # Python's own way out waits for graphs and for other processes
        traceback.print_exc()
        status = 1
    signals.ignore()  # the exit status is settled
    leave(status)
