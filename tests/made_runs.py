"""Runs' folders, records and outcomes, made up for tests of pictures and comparisons."""

import json

import torch
from PIL import Image

from mnist_fast.cli import dump, read_recipe
from mnist_fast.config import Config
from mnist_fast.evaluate import Outcome


def make_records(accuracies, held_out="test"):
    return [
        {
            "epoch": epoch,
            "global_step": 100 * epoch,
            "dataset": "mnist",
            "train_loss": 1 / epoch,
            "train_accuracy": accuracy - 0.5,
            f"{held_out}_loss": 0.5 / epoch,
            f"{held_out}_accuracy": accuracy,
            "learning_rate": 0.1,
            "epoch_seconds": 2.0,
            "images_per_second": 30_000.0,
        }
        for epoch, accuracy in enumerate(accuracies, start=1)
    ]


def make_summary(config, records):
    accuracies = [record["test_accuracy"] for record in records]
    return {
        "dataset": "mnist",
        "recipe": config.recipe,
        "seed": config.seed,
        "epochs": len(records),
        "parameters": 7640,
        "world_size": 1,
        "device": "a <b>CPU</b>",
        "precision": "no",
        "test_accuracy": accuracies[-1],
        "best_test_accuracy": max(accuracies),
        "best_epoch": accuracies.index(max(accuracies)) + 1,
        "test_images": 10_000,
        "train_seconds": 30.0,
        "startup_seconds": 8.0,
        "images_per_second": 30_000.0,
        "git_commit": "0123456789abcdef",
    }


def make_run(folder, accuracies=(98.0, 99.1, 99.5), finished=True, recorded="mnist", **choices):
    folder.mkdir(parents=True)
    recipe = choices.get("recipe", "fast")
    config = Config(**(read_recipe(recipe) | {"recipe": recipe, "run_dir": str(folder)} | choices))
    (folder / "config.yaml").write_text(dump(config))
    records = [record | {"dataset": recorded} for record in make_records(accuracies)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines)
    if finished:
        summary = make_summary(config, records)
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def make_outcome(count=500, wrong=30):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (count,), generator=generator)
    predictions = labels.clone()
    predictions[:wrong] = (labels[:wrong] + 1) % 10
    images = torch.randint(256, (wrong, 28, 28), dtype=torch.uint8, generator=generator)
    return Outcome(labels, predictions, torch.arange(wrong), images, torch.linspace(1, 0.2, wrong))


def colours_in(path):
    """Number of colours of a picture, and its size."""
    with Image.open(path) as image:
        return len(image.convert("RGB").getcolors(image.width * image.height)), image.size
