"""Exact loss and accuracy over all processes: every image counts once."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mnist_fast.augment import normalise, scale_pixels
from mnist_fast.errors import RunError
from mnist_fast.model import CLASSES, Network
from mnist_fast.records import Evaluation

if TYPE_CHECKING:  # it loads accelerate, which predicting a single image does not need
    from mnist_fast.runtime import Runtime

BATCH = 1_000  # images per forward pass, which the CPU's caches like
# All test images at once: some 30 launches per evaluation where an epoch of captured steps makes
# 1,900, so that capturing these too would not be seen
GPU_BATCH = 16_384
MOST_MISREAD = 100  # images that `inspect` hands back


@torch.inference_mode()
def predict(network: Network, images: Tensor) -> Tensor:
    """Log-probabilities, float32 (n, 10), of uint8 images (n, 1, 28, 28), in float32 throughout."""
    was_training = network.training
    network.eval()
    size = GPU_BATCH if images.is_cuda else BATCH
    parts = [
        network.logits(normalise(scale_pixels(part))).log_softmax(1) for part in images.split(size)
    ]
    network.train(was_training)
    return torch.cat(parts)


def predict_translated(network: Network, images: Tensor, pixels: int) -> Tensor:
    """As `predict`, of the mean probability over all translations by up to `pixels` pixels.

    These are (2 pixels + 1)**2 forward passes; what moves in from outside is black.
    """
    size, span = images.shape[-1], range(2 * pixels + 1)
    padded = F.pad(images, (pixels,) * 4)
    parts = [predict(network, padded[..., y : y + size, x : x + size]) for y in span for x in span]
    return torch.stack(parts).logsumexp(0) - math.log(len(parts))


def evaluate(
    network: Network,
    images: Tensor,
    labels: Tensor,
    runtime: Runtime,
    expected: int,
    translations: int = 0,
) -> Evaluation:
    """Evaluates this process's images and sums over all processes.

    Args:
        network: without DDP around it; the same on every process.
        images: uint8 (n, 1, 28, 28), this process's share, possibly none.
        labels: int64 (n,).
        runtime: the processes.
        expected: images over all processes.
        translations: pixels, see `predict_translated`; 0 is the plain forward pass.

    Raises:
        RunError: another number of images was counted.
    """
    totals = torch.zeros(3, dtype=torch.float64, device=images.device)
    if len(labels):
        if translations:
            scores = predict_translated(network, images, translations)
        else:
            scores = predict(network, images)
        totals[0] = F.nll_loss(scores, labels, reduction="sum")
        totals[1] = (scores.argmax(1) == labels).sum()
        totals[2] = len(labels)
    loss, hits, count = runtime.sum(totals).tolist()
    if count != expected:
        raise RunError(f"evaluated {count:.0f} images instead of {expected}")
    return Evaluation(loss / count, 100 * hits / count, int(count))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A network's predictions for all evaluation images.

    Attributes:
        labels, predictions: int64 (n,), in the order of the data set.
        misread: int64 (k,), positions of the images read wrongly with the highest probability, the
            highest first; at most 100 of them.
        images: uint8 (k, 28, 28), these images.
        probabilities: float32 (k,), of the wrong predictions.
    """

    labels: Tensor
    predictions: Tensor
    misread: Tensor
    images: Tensor
    probabilities: Tensor

    @property
    def errors(self) -> int:
        """Number of images read wrongly, also those whose images are not kept."""
        return int((self.labels != self.predictions).sum())

    def confusion(self) -> Tensor:
        """Number of images by label (rows) and prediction (columns), int64 (10, 10)."""
        cells = self.labels * CLASSES + self.predictions
        return torch.bincount(cells, minlength=CLASSES**2).reshape(CLASSES, CLASSES)


def inspect(network: Network, images: Tensor, labels: Tensor, runtime: Runtime) -> Outcome:
    """Predictions for all evaluation images, on every process; arguments as for `evaluate`."""
    probabilities, predictions = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    if len(labels):
        probabilities, predictions = predict(network, images).exp().max(1)
        probabilities, predictions = probabilities.cpu(), predictions.cpu()
    wrong = (predictions != labels.cpu()).nonzero()[:, 0]
    wrong = wrong[probabilities[wrong].argsort(descending=True)][:MOST_MISREAD]
    pixels = images[wrong.to(images.device), 0].cpu()
    parts = runtime.gather((labels.cpu(), predictions, wrong, pixels, probabilities[wrong]))
    all_labels, all_predictions, positions, all_pixels, surest = zip(*parts, strict=True)
    first = torch.tensor([0, *map(len, all_labels)]).cumsum(0)  # shares are contiguous, by rank
    misread = torch.cat([part + start for part, start in zip(positions, first, strict=False)])
    order = torch.cat(surest).argsort(descending=True)[:MOST_MISREAD]
    return Outcome(
        torch.cat(all_labels),
        torch.cat(all_predictions),
        misread[order],
        torch.cat(all_pixels)[order],
        torch.cat(surest)[order],
    )
