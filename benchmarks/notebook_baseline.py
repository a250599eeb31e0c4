"""The class-room notebook's pipeline: what everything else is measured against.

    python benchmarks/notebook_baseline.py --steps 50

torchvision's random transforms on PIL images, one image at a time; a DataLoader with four workers;
the same network; SGD through torch's defaults; and `.item()` in every step, which waits for the
device. Our own writing of what such notebooks do.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.records import count
from mnist_fast.augment import MEAN, SD
from mnist_fast.errors import Parser, run_main
from mnist_fast.model import build_network

WORKERS = 4
RUN_AHEAD = 2 * WORKERS  # batches that they prepare during a pause: taken before measuring


class Images(Dataset[tuple[Tensor, int]]):
    """Images as torchvision's MNIST hands them out: one PIL image at a time, transformed."""

    def __init__(self, images: Tensor, labels: Tensor, transform: Any):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One transformed image (1, 28, 28) and its label."""
        from PIL import Image

        image = Image.fromarray(self.images[index, 0].numpy())
        return self.transform(image), int(self.labels[index])


def notebook_transforms() -> Any:
    """The notebook's transforms, for PIL images."""
    from torchvision import transforms as T

    return T.Compose(
        [
            T.RandomRotation((-7.0, 7.0), fill=(1,)),
            T.RandomAffine(7, shear=10, translate=(0.1, 0.1), scale=(0.8, 1.2)),
            T.ColorJitter(brightness=0.4, contrast=0.4),
            T.ToTensor(),
            T.Normalize((MEAN,), (SD,)),
        ]
    )


def open_loader(images: Tensor, labels: Tensor, batch_size: int, on_gpu: bool) -> DataLoader[Any]:
    """The notebook's DataLoader over uint8 images (n, 1, 28, 28) and labels (n,), on the CPU."""
    dataset = Images(images, labels, notebook_transforms())
    return DataLoader(
        dataset, batch_size=batch_size, shuffle=True, num_workers=WORKERS, pin_memory=on_gpu
    )


def endless(loader: DataLoader[Any]) -> Iterator[Any]:
    """Batches of epoch after epoch."""
    while True:
        yield from loader


def notebook_network() -> nn.Module:
    """The network with torch's own dropout, as the notebook has it, not ours."""
    network = build_network("notebook", dropout=0.03)
    for index, layer in enumerate(network.layers):
        if isinstance(layer, nn.Dropout):
            network.layers[index] = nn.Dropout(layer.p)
    return network


class Baseline:
    """The notebook's training loop, a few steps at a time.

    Args:
        images: uint8 (n, 1, 28, 28), on the CPU.
        labels: int64 (n,).
        device: where the network is trained.
        batch_size: images per step.
    """

    def __init__(self, images: Tensor, labels: Tensor, device: torch.device, batch_size: int = 128):
        self.device, self.batch_size = device, batch_size
        loader = open_loader(images, labels, batch_size, device.type == "cuda")
        self.batches = endless(loader)
        self.network = notebook_network().to(device)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.01, momentum=0.9)
        self.loss, self.correct, self.seen = 0.0, 0, 0

    def run(self, steps: int) -> None:
        """Trains some steps."""
        self.network.train()
        for _ in range(steps):
            inputs, labels = next(self.batches)
            inputs, labels = inputs.to(self.device), labels.to(self.device)
            self.optimizer.zero_grad()
            scores = self.network(inputs)
            loss = F.nll_loss(scores, labels)
            self.loss += loss.item()
            loss.backward()
            self.optimizer.step()
            self.correct += scores.argmax(1).eq(labels).sum().item()
            self.seen += len(labels)


def main() -> int:
    """Measures the baseline alone."""
    from benchmarks.throughput import load_images

    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=count, default=50, help="measured steps (default: 50)")
    parser.add_argument("--batch_size", type=count, default=128, help="images (default: 128)")
    parser.add_argument("--data_dir", type=Path, default=Path("data/betons/mnist"))
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, labels = load_images(options.data_dir)
    baseline = Baseline(images, labels, device, options.batch_size)
    baseline.run(RUN_AHEAD)
    started = time.perf_counter()
    baseline.run(options.steps)
    seconds = time.perf_counter() - started
    rate = options.steps * options.batch_size / seconds
    print(f"{rate:,.0f} images/s, {len(labels) / rate:.1f} s per epoch of {len(labels):,} images")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, "benchmarks/notebook_baseline.py"))
