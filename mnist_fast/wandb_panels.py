"""What a run shows on W&B: pictures, tables, the summary and where the run computes.

Where W&B's own types are needed, the module comes as an argument: only `tracking` imports it.
"""

import os
from collections.abc import Sequence
from typing import Any

from mnist_fast.evaluate import Outcome
from mnist_fast.model import LayerRow
from mnist_fast.pages import tile

DIGITS = list("0123456789")
SLURM = (
    *("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"),
    *("SLURM_NNODES", "SLURM_NTASKS", "SLURM_RESTART_COUNT", "SLURM_JOB_NODELIST"),
)
# Validation metrics keep plain numbers in W&B's summary: a sweep reads them there.
SUMMARISED = (
    *("train_accuracy", "test_accuracy", "train_loss", "test_loss"),
    *("gradient_norm", "epoch_seconds", "images_per_second"),
)


def show_inputs(wandb: Any, samples: Any, layers: Sequence[LayerRow]) -> dict[str, Any]:
    """Training images as the network sees them, and the network's layers.

    Args:
        wandb: the module.
        samples: uint8 (2, n, 28, 28), training images before and after augmentation.
        layers: rows of the layer table.
    """
    caption = "the first training images as the network sees them"
    columns = ["#", "layer", "kernel", "stride", "padding", "output"]
    columns += ["receptive field", "jump", "parameters"]
    rows = [[number, *_cells(layer)] for number, layer in enumerate(layers, start=1)]
    page, _ = tile(samples[1], columns=8)
    return {
        "augmented_batch": wandb.Image(page, caption=caption),
        "layers": wandb.Table(columns=columns, data=rows),
    }


def show_outcome(wandb: Any, outcome: Outcome, held_out: str) -> dict[str, Any]:
    """The confusion matrix, and a table of the surest of the misread digits.

    Args:
        wandb: the module.
        outcome: what the network makes of the evaluation images.
        held_out: test or validation.
    """
    matrix = wandb.plot.confusion_matrix(
        y_true=outcome.labels.tolist(),
        preds=outcome.predictions.tolist(),
        class_names=DIGITS,
        title=f"{held_out} images by label and prediction",
    )
    table = wandb.Table(columns=["position", "image", "label", "prediction", "probability"])
    columns = (outcome.misread, outcome.probabilities)
    values = zip(outcome.images, *(column.tolist() for column in columns), strict=True)
    for image, position, probability in values:
        label, guess = outcome.labels[position], outcome.predictions[position]
        row = (int(label), int(guess), probability)
        table.add_data(position, wandb.Image(image.numpy()), *row)
    return {"confusion_matrix": matrix, "misread": table}


def summarise(summary: dict[str, Any], records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What W&B's summary is to hold at the end.

    `min`, `max` and `last` of the summarised metrics are over all epochs, because W&B counts those
    since the last resume alone in an offline run; what `summary.json` says under the same name, of
    the whole run, stands under `final/`.
    """
    whole = {f"final/{key}" if key in SUMMARISED else key: summary[key] for key in summary}
    for name in SUMMARISED:
        if values := [r[name] for r in records if r.get(name) is not None]:
            whole[name] = {"min": min(values), "max": max(values), "last": values[-1]}
    return whole


def slurm_facts() -> dict[str, str]:
    """What SLURM says about the job, by variable in lower case; empty outside a job."""
    return {name.lower(): os.environ[name] for name in SLURM if name in os.environ}


def _cells(layer: LayerRow) -> list[Any]:
    output = "x".join(map(str, layer.output_shape))
    sides = [layer.name, layer.kernel, layer.stride, layer.padding, output]
    return [*sides, layer.receptive_field, layer.jump, layer.parameters]
