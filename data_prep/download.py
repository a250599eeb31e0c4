"""MNIST from its mirrors, by torchvision, in watched child processes that can be given up."""

import os
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.request import Request, urlopen

from tqdm import tqdm

from data_prep.read_idx import NAMES
from data_prep.staging import staging
from data_prep.watched import Limits, Report, WorkFailed, run_watched

# torchvision's own mirrors, repeated because importing torchvision takes seconds and most failures
# to download can be told before.
MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/")

CONNECT_SECONDS = 10.0  # to reach a mirror at all
LIMITS = Limits(first=90.0, then=30.0)  # until the first bytes, until more of them

_FILES = tuple(NAMES.values())


def download_mnist(raw: Path, check: Callable[[Path], object]) -> None:
    """Downloads the four files into `raw`, unless another process has done so in the meantime.

    Args:
        raw: the folder `MNIST/raw` of a torchvision root.
        check: called with the folder of the downloaded files; raises if they are not usable.

    Raises:
        WorkFailed: no mirror answers, or the download fails.
    """
    run_watched("data_prep.download:reach_mirror", [], Limits(CONNECT_SECONDS, CONNECT_SECONDS))
    with staging(raw.parent.parent) as stage:
        if all((raw / name).exists() for name in _FILES):
            return
        target, arguments = "data_prep.download:download", [str(stage.folder)]
        with tqdm(desc="downloading MNIST", unit="B", unit_scale=True, disable=None) as bar:
            run_watched(target, arguments, LIMITS, bar.update)
        downloaded = stage.folder / "MNIST" / "raw"
        check(downloaded)
        raw.mkdir(parents=True, exist_ok=True)
        for name in _FILES:
            os.replace(downloaded / name, raw / name)


# What follows runs in the child processes.


def reach_mirror(report: Report) -> None:
    """Raises WorkFailed if no mirror answers; runs watched, for a host name can take minutes."""
    answers: queue.Queue[str] = queue.Queue()

    def ask(mirror: str) -> None:
        try:
            request = Request(f"{mirror}{_FILES[1]}.gz", method="HEAD")
            with urlopen(request, timeout=CONNECT_SECONDS - 2):
                answers.put("")
        except Exception as error:
            answers.put(str(error) or type(error).__name__)

    for mirror in MIRRORS:
        threading.Thread(target=ask, args=(mirror,), daemon=True).start()
    errors = [answers.get()]
    while errors[-1] and len(errors) < len(MIRRORS):
        errors.append(answers.get())
    if errors[-1]:
        raise WorkFailed(f"no mirror could be reached ({errors[-1]})")


def download(report: Report, folder: str) -> None:
    """Downloads with torchvision, reporting the bytes that arrive; runs watched."""

    def watch() -> None:
        before = 0
        while True:
            with suppress(FileNotFoundError):  # a file renamed between listing and asking
                size = sum(path.stat().st_size for path in Path(folder).rglob("*"))
                if size != before:
                    report(size - before)
                before = size
            time.sleep(0.5)

    threading.Thread(target=watch, daemon=True).start()
    from torchvision.datasets import MNIST

    MNIST(folder, download=True)
