"""A run's data: the checked betons, the training feed, and the images that are evaluated."""

import dataclasses
from pathlib import Path

import psutil
import torch
from torch import Tensor

from data_prep import betons
from data_prep.manifest import Manifest
from mnist_fast.augment import MEAN, SD, augment, derive_key
from mnist_fast.config import Config
from mnist_fast.data import ResidentFeed, Sharding, StreamFeed, keep_for_training, read_all, share
from mnist_fast.errors import InputError
from mnist_fast.evaluate import Outcome, evaluate, inspect
from mnist_fast.files import say
from mnist_fast.model import Network
from mnist_fast.records import Evaluation
from mnist_fast.runtime import Runtime

RESIDENT_FRACTION = 0.25  # of the device's free memory that a resident data set may take
Feed = ResidentFeed | StreamFeed


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
    """This process's share of the evaluated images.

    Attributes:
        images: uint8 (n, 1, 28, 28) on the device.
        labels: int64 (n,).
        total: images over all processes.
    """

    images: Tensor
    labels: Tensor
    total: int

    @property
    def part(self) -> tuple[Tensor, Tensor]:
        """Images and labels."""
        return self.images, self.labels

    def evaluate(self, network: Network, runtime: Runtime, translations: int = 0) -> Evaluation:
        """Evaluates a network, the same on every process, on the images of all processes."""
        return evaluate(network, *self.part, runtime, self.total, translations)

    def inspect(self, network: Network, runtime: Runtime) -> Outcome:
        """A network's predictions for the images of all processes."""
        return inspect(network, *self.part, runtime)


@dataclasses.dataclass(frozen=True)
class Data:
    """All the data of a run.

    Attributes:
        manifest, folder: of the betons.
        sharding: of the training images.
        feed: hands out the training images.
        evaluation_set: this process's share of the evaluated images.
    """

    manifest: Manifest
    folder: Path
    sharding: Sharding
    feed: Feed
    evaluation_set: EvaluationSet

    @property
    def sha256(self) -> str:
        """The checksum that stands for both betons."""
        return betons.data_sha256(self.manifest)


def open_data(config: Config, runtime: Runtime) -> Data:
    """Checks a run's data and opens it on the device.

    Raises:
        InputError: the data is missing, damaged or unsuitable.
    """
    manifest, folder = open_betons(config, runtime)
    sharding = cut(config, manifest, runtime)
    feed = open_feed(config, manifest, folder, sharding, runtime.device)
    evaluation_set = open_evaluation_set(config, manifest, folder, runtime)
    return Data(manifest, folder, sharding, feed, evaluation_set)


def open_betons(config: Config, runtime: Runtime) -> tuple[Manifest, Path]:
    """The checked manifest and its folder; the main process prepares the data where it is missing.

    The folder decides the data set's name, whatever --dataset says.

    Raises:
        InputError: no data, data that fails its checksums, or other data on another machine.
    """
    folder = runtime.on_main(lambda: find_betons(config))
    manifests = runtime.on_each(lambda: betons.check(folder))
    if len({betons.data_sha256(manifest) for manifest in manifests}) > 1:
        fault = f"{folder} holds different data on different machines"
        raise InputError(f"{fault}: copy one folder to all", shared=True)
    return manifests[runtime.rank], folder


def find_betons(config: Config) -> Path:
    """The folder of the betons, written first where there is none."""
    root = Path("data/betons")
    names = ["mnist", "digits"] if config.dataset == "auto" else [config.dataset]
    candidates = [Path(config.data_dir)] if config.data_dir else [root / name for name in names]
    for folder in candidates:
        if (folder / "manifest.json").exists():
            return folder
    out = Path(config.data_dir) if config.data_dir else None
    manifest = betons.prepare(config.dataset, None, out)
    folder = out or root / manifest.dataset
    say(f"data: {folder} had no manifest.json, so {manifest.dataset} was prepared there")
    return folder


def cut(config: Config, manifest: Manifest, runtime: Runtime) -> Sharding:
    """The sharding: global batches of the training images, and each process's part of them.

    Raises:
        InputError: some process could not train on its part.
    """
    kept = keep_for_training(manifest.train.samples, config.validation_split)
    shape = (config.batch_size, config.drop_last)
    return Sharding(kept, *shape, runtime.rank, runtime.world_size)


def open_feed(
    config: Config, manifest: Manifest, folder: Path, sharding: Sharding, device: torch.device
) -> Feed:
    """The training feed, as chosen; `auto` is resident where the images fit."""
    path = folder / manifest.train.file
    if choose_feed(config.feed, path, device) == "stream":
        return StreamFeed(path, sharding, config.seed, device)
    images, labels = read_all(path, range(sharding.samples), device)
    return ResidentFeed(images, labels, sharding, config.seed)


def choose_feed(wanted: str, path: Path, device: torch.device) -> str:
    """The feed's name: as wanted, or by the device's free memory."""
    if wanted != "auto":
        return wanted
    on_gpu = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available
    return "resident" if path.stat().st_size <= RESIDENT_FRACTION * free else "stream"


def open_evaluation_set(
    config: Config, manifest: Manifest, folder: Path, runtime: Runtime
) -> EvaluationSet:
    """The test images, or the held-out training images: then the test set is not even opened."""
    file, first, total = manifest.test.file, 0, manifest.test.samples
    if held_out := config.validation_split:
        first = keep_for_training(manifest.train.samples, held_out)
        file, total = manifest.train.file, held_out
    start, stop = share(total, runtime.rank, runtime.world_size)
    rows = range(first + start, first + stop)
    return EvaluationSet(*read_all(folder / file, rows, runtime.device), total)


@torch.inference_mode()
def preview(config: Config, feed: Feed, most: int = 32) -> Tensor:
    """The first training images of the run before and after augmentation.

    Args:
        config: the run's choices.
        feed: of the training images.
        most: images at most.

    Returns:
        uint8 (2, n, 28, 28) on the CPU.
    """
    batch = next(iter(feed.epoch(0)))
    before = batch.gather_images()[:most]
    positions = torch.arange(batch.position, batch.position + len(before), device=before.device)
    key = torch.tensor(derive_key(config.seed, 0, "augment"), device=before.device)
    after = augment(config, before, positions, key) * SD + MEAN
    pixels = (after * 255).round().clamp(0, 255).to(torch.uint8)
    return torch.stack([before, pixels])[:, :, 0].cpu()
