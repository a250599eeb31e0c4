"""`python -m data_prep`: writes the betons that training reads, or verifies them."""

import argparse
import signal
import sys
from pathlib import Path
from typing import NoReturn

from data_prep.betons import Manifest, default_folder, prepare, verify
from data_prep.manifest import DATASETS as SELF_CONTAINED
from data_prep.manifest import MANIFEST_NAME, NAME
from data_prep.sources import DATASETS
from mnist_fast.errors import Parser, run_main, some_path

PROGRAM = "data_prep"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    options = _parse(arguments)
    if options.verify:
        folder = options.out or _folder_to_verify(options.name or options.dataset)
        manifest = verify(folder)
    else:
        manifest = prepare(options.dataset, options.source, options.out, name=options.name)
        folder = options.out or default_folder(manifest.dataset)
    print(_table(manifest))
    note = "" if manifest.published else " (not the published files)"
    print(f"{'verified' if options.verify else 'ready'}: {manifest.dataset}{note} in {folder}")
    if manifest.dataset not in SELF_CONTAINED:
        print(f"train on it with: accelerate launch train.py --data_dir {folder}")
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m data_prep",
        description="Turns MNIST or scikit-learn's digits into train.beton, test.beton and "
        "manifest.json. Exit status: 0 done, 2 bad usage or data, 1 anything else.",
    )
    parser.add_argument(
        "--dataset",
        choices=DATASETS,
        default="mnist",
        help="auto: MNIST if it can be found or downloaded, the digits if not (default: mnist)",
    )
    parser.add_argument(
        "--source",
        type=some_path,
        metavar="ROOT",
        help="folder, .zip or .tar of a data set like MNIST: its four files, a CSV per split, "
        "mnist.npz, pictures in train/0 to test/9, or Parquet "
        "(default: $MNIST_ROOT, then data/, then a download into data/)",
    )
    parser.add_argument(
        "--name",
        type=_name,
        help="what to call data that has no published checksums, for instance mnist for a part of "
        "MNIST (default: custom)",
    )
    parser.add_argument(
        "--out",
        type=some_path,
        metavar="DIR",
        help="folder of the betons (default: data/betons/DATASET)",
    )
    parser.add_argument(
        "--verify", action="store_true", help="write nothing, read and check every sample instead"
    )
    options = parser.parse_args(arguments)
    if options.verify and options.source:
        parser.error("--source cannot be given with --verify")
    return options


def _name(text: str) -> str:
    if not NAME.fullmatch(text) or text in ("digits", "auto"):
        raise argparse.ArgumentTypeError(
            f"{text!r}: use small letters, digits, dots, dashes; digits and auto are taken"
        )
    return text


def _folder_to_verify(dataset: str) -> Path:
    names = ("mnist", "digits") if dataset == "auto" else (dataset,)
    folders = [default_folder(name) for name in names]
    return next((folder for folder in folders if (folder / MANIFEST_NAME).exists()), folders[0])


def _table(manifest: Manifest) -> str:
    lines = [f"{'split':<6}{'samples':>9}{'mean':>8}{'sd':>8}{'MB':>8}  sha256"]
    for name, split in manifest.splits().items():
        lines.append(
            f"{name:<6}{split.samples:>9,}{split.pixel_mean:>8.4f}{split.pixel_sd:>8.4f}"
            f"{split.bytes / 1e6:>8.1f}  {split.sha256[:16]}"
        )
    return "\n".join(lines)


def _stop(signal_number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + signal_number)


if __name__ == "__main__":
    # Both end through the `finally` blocks that stop the writer and remove the temporary files.
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(run_main(main, PROGRAM))
