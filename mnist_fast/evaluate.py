"""Exact loss and accuracy over all processes: every image counts once."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from mnist_fast.augment import normalise, scale_pixels
from mnist_fast.errors import RunError
from mnist_fast.model import Network
from mnist_fast.runtime import Runtime

BATCH = 1_000  # images per forward pass


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Mean negative log-likelihood, accuracy in percent, and the images that were counted."""

    loss: float
    accuracy: float
    images: int


@torch.inference_mode()
def predict(network: Network, images: Tensor) -> Tensor:
    """Log-probabilities, float32 (n, 10), of uint8 images (n, 1, 28, 28), in float32 throughout."""
    was_training = network.training
    network.eval()
    parts = [
        network.logits(normalise(scale_pixels(part))).log_softmax(1) for part in images.split(BATCH)
    ]
    network.train(was_training)
    return torch.cat(parts)


def evaluate(
    network: Network, images: Tensor, labels: Tensor, runtime: Runtime, expected: int
) -> Evaluation:
    """Evaluates this process's images and sums over all processes.

    Args:
        network: without DDP around it; the same on every process.
        images: uint8 (n, 1, 28, 28), this process's share, possibly none.
        labels: int64 (n,).
        runtime: the processes.
        expected: images over all processes.

    Raises:
        RunError: another number of images was counted.
    """
    totals = torch.zeros(3, dtype=torch.float64, device=images.device)
    if len(labels):
        scores = predict(network, images)
        totals[0] = F.nll_loss(scores, labels, reduction="sum")
        totals[1] = (scores.argmax(1) == labels).sum()
        totals[2] = len(labels)
    loss, hits, count = runtime.sum(totals).tolist()
    if count != expected:
        raise RunError(f"evaluated {count:.0f} images instead of {expected}")
    return Evaluation(loss / count, 100 * hits / count, int(count))
