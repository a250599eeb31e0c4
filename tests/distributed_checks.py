"""What each of N processes does, sees and counts; run by torchrun, and with N = 1 by the tests.

torchrun ... distributed_checks.py BETONS OUT runs every check, writes OUT/results.pt from the main
process, and ends with a training run whose exit status is the script's.
"""

import dataclasses
import hashlib
import sys
from pathlib import Path

import pytest
import torch
from stepping import Trained

from data_prep.betons import load_manifest
from mnist_fast import datasets
from mnist_fast.augment import augment, derive_key
from mnist_fast.cli import load
from mnist_fast.data import ResidentFeed, Sharding, StreamFeed, read_all, share
from mnist_fast.errors import InputError, leave, run_main
from mnist_fast.evaluate import evaluate
from mnist_fast.loop import train
from mnist_fast.model import build_network
from mnist_fast.runtime import STOP_INTERVAL, Runtime

SAMPLES, BATCH = 1_437, 96  # the last of 15 batches has 93 images
CPU = torch.device("cpu")
OPTIONS = ("--dataset", "digits", "--step", "eager", "--wandb", "disabled", "--precision", "no")


def options(betons, *more):
    """The command line of a run on the digits."""
    return [*OPTIONS, "--data_dir", str(betons), "--batch_size", str(BATCH), *more]


def sharding_of(runtime):
    return Sharding(SAMPLES, BATCH, False, runtime.rank, runtime.world_size)


def feeds(betons, runtime):
    """Both feeds of this process."""
    path, sharding = betons / "train.beton", sharding_of(runtime)
    images, labels = read_all(path, range(SAMPLES), CPU)
    return ResidentFeed(images, labels, sharding, 1), StreamFeed(path, sharding, 1, CPU)


def global_batches(betons, runtime, both_feeds):
    """Checksums of each global batch (images, labels, augmented inputs), by feed and epoch."""
    config = load(options(betons, "--recipe", "notebook"))
    seen = {}
    for feed in both_feeds:
        for epoch in (0, 2):
            key = torch.tensor(derive_key(config.seed, epoch, "augment"))
            steps = []
            for batch in feed.epoch(epoch):
                images, labels = batch.gather()
                positions = torch.arange(batch.position, batch.position + len(batch))
                # rounded: sums of floats may depend on how many images are in a tensor
                inputs = (augment(config, images, positions, key) * 1_000).round().int()
                parts = runtime.gather((images, labels, inputs))
                steps.append([checksum(torch.cat(whole)) for whole in zip(*parts, strict=True)])
            seen[feed.name, epoch] = steps
    return seen


def checksum(tensor):
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def gradients(betons, runtime, feed, mode):
    """The gradient of every step of an epoch, at fixed weights and fixed statistics.

    With `mode` compiled, but nothing compiled, to have the flat reduction in place of DDP's.
    """
    config = load(options(betons, "--step", mode, "--label_smoothing", "0.1"))
    runtime.seed(1)
    compile_function, torch.compile = torch.compile, lambda function, **_: function
    try:
        network = build_network("notebook")
        step = Trained(config, network, runtime, sharding_of(runtime))
    finally:
        torch.compile = compile_function
    step.start_epoch(0)
    step.network.eval()
    found = []
    for batch in feed.epoch(0):
        step(batch, 0.0)
        found.append(torch.cat([p.grad.flatten().clone() for p in step.network.parameters()]))
    return torch.stack(found), runtime.sum(step.totals)


def evaluations(betons, runtime):
    """Results over numbers of test images that few numbers of processes divide, by that number."""
    runtime.seed(1)
    network = build_network("notebook")
    images, labels = read_all(betons / "test.beton", range(360), CPU)
    found = {}
    for count in (359, 353, 1):
        part = slice(*share(count, runtime.rank, runtime.world_size))
        found[count] = evaluate(network, images[part], labels[part], runtime, expected=count)
    return found


def other_data(betons, runtime):
    """What is said where the last process finds other, valid betons under the same path."""

    def check(folder):
        manifest = load_manifest(folder)
        if runtime.rank < runtime.world_size - 1:
            return manifest
        train = dataclasses.replace(manifest.train, sha256=manifest.test.sha256)
        return dataclasses.replace(manifest, train=train)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.betons, "check", check)
        try:
            datasets.open_betons(load(options(betons)), runtime)
        except InputError as error:
            return str(error)
    return None


def agreements(betons, runtime):
    """What the processes tell each other."""

    def refuse():
        raise InputError("only the main process looked")

    try:
        runtime.on_main(refuse)
    except InputError as error:
        refused = (str(error), error.shared)

    def look():
        if runtime.rank == runtime.world_size - 1:
            raise InputError("only the last process looked")

    try:
        runtime.on_each(look)
    except InputError as error:
        refused_by_last = (str(error), error.shared)
    # a request of the last process alone is obeyed by all, in the same step
    last = runtime.rank == runtime.world_size - 1
    asked = [runtime.agree_to_stop(last) for _ in range(2 * STOP_INTERVAL)]
    return {
        "broadcast": runtime.gather(runtime.broadcast(("from", runtime.rank))),
        "gather": runtime.gather(runtime.rank),
        "on_main": runtime.gather(runtime.on_main(lambda: runtime.rank)),
        "on_each": runtime.on_each(lambda: runtime.rank),
        "refused": runtime.gather(refused),
        "refused by last": runtime.gather(refused_by_last),
        "other data": runtime.gather(other_data(betons, runtime)),
        "stop": runtime.gather(asked),
    }


def all_checks(betons, runtime):
    both_feeds = feeds(betons, runtime)
    return {
        "batches": global_batches(betons, runtime, both_feeds),
        "ddp": gradients(betons, runtime, both_feeds[0], "eager"),
        "flat": gradients(betons, runtime, both_feeds[0], "compiled"),
        "evaluations": evaluations(betons, runtime),
        "agreements": agreements(betons, runtime),
    }


def status_of(arguments):
    """The exit status that train.py would have."""

    def run():
        train(load(arguments))
        return 0

    return run_main(run, "train.py")


def main(betons, out):
    runtime = Runtime(load(options(betons)))
    runtime.set_precision("no")
    results = all_checks(betons, runtime)
    run_dir = ("--run_dir", str(out / "run"))
    refused = status_of(options(betons, "--batch_size", "125", *run_dir))
    results["refused"] = runtime.gather(refused)
    if runtime.is_main:
        torch.save(results, out / "results.pt")
    if runtime.world_size == 2:  # ends with a loss that is not finite
        last = ("--learning_rate", "1000", "--schedule", "constant", "--epochs", "5")
    else:
        last = ("--validation_split", "353", "--epochs", "1")
    return status_of(options(betons, *last, *run_dir))


if __name__ == "__main__":
    leave(main(*map(Path, sys.argv[1:])))
