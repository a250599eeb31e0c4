"""The recipe `fast` in one plain loop, for reading: `accelerate launch examples/plain_loop.py`."""

import argparse
import os

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from ffcv.fields.decoders import IntDecoder, NDArrayDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.reader import Reader
from ffcv.transforms import Squeeze, ToTensor
from torch.nn.functional import nll_loss

from mnist_fast.augment import augment, derive_key, normalise, scale_pixels
from mnist_fast.config import Config
from mnist_fast.errors import leave
from mnist_fast.model import Network, build_network
from mnist_fast.schedule import learning_rate


def open_loader(path: str, batch_size: int, processes: int, **options: object) -> Loader:
    """Reads a beton in batches: images uint8 (batch, 1, 28, 28) and labels int64 (batch,)."""
    image, label = [NDArrayDecoder(), ToTensor()], [IntDecoder(), ToTensor(), Squeeze(1)]
    workers = max(1, len(os.sched_getaffinity(0)) // processes)  # FFCV gives torch as many threads
    return Loader(path, batch_size, workers, pipelines={"image": image, "label": label}, **options)


@torch.no_grad()
def evaluate(network: Network, loader: Loader, accelerator: Accelerator) -> tuple[float, int]:
    """Returns the accuracy in percent and the number of images, over all processes."""
    network.load_state_dict(broadcast(network.state_dict()))  # each process has its own statistics
    network.eval()
    totals = torch.zeros(2, device=accelerator.device)
    for images, labels in loader:
        inputs = normalise(scale_pixels(images.to(accelerator.device)))
        hits = network.logits(inputs).argmax(1) == labels.to(accelerator.device)
        totals += torch.stack([hits.sum(), torch.ones_like(hits).sum()])
    right, count = accelerator.reduce(totals).tolist()
    return 100 * right / count, int(count)


def main() -> None:
    """Trains, and reports each epoch on the screen and to W&B."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data_dir", default="data/betons/mnist", help="folder of the betons")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--wandb", default="offline", choices=["online", "offline", "disabled"])
    args = parser.parse_args()
    config = Config(epochs=args.epochs, schedule="onecycle", learning_rate=0.1, affine_rotation=7,
                    shear=4, translate=0.06, scale_min=0.93, scale_max=1.07)  # fmt: skip
    accelerator = Accelerator(log_with="wandb")
    accelerator.init_trackers("mnist_fast", vars(args), {"wandb": {"mode": args.wandb}})
    set_seed(args.seed)
    rank, processes = accelerator.process_index, accelerator.num_processes
    size = 128 // processes
    shuffled = {"order": OrderOption.RANDOM, "seed": args.seed, "distributed": processes > 1}
    train = open_loader(f"{args.data_dir}/train.beton", size, processes, **shuffled)
    name = f"{args.data_dir}/test.beton"
    share = range(rank, Reader(name).num_samples, processes)  # every test image counts once
    test = open_loader(name, 1000, processes, indices=share, drop_last=False)
    network = build_network("notebook")
    optimizer = torch.optim.SGD(network.parameters(), config.learning_rate, 0.9, nesterov=True)
    model, optimizer = accelerator.prepare(network, optimizer)  # FFCV's loaders stay as they are
    key = torch.tensor(derive_key(args.seed, 0, "augment"), device=accelerator.device)
    position = torch.arange(size, device=accelerator.device) + rank * size
    for epoch in range(args.epochs):
        model.train()
        total = torch.zeros((), device=accelerator.device)
        for step, (images, labels) in enumerate(train, start=epoch * len(train)):
            images, labels = images.to(accelerator.device), labels.to(accelerator.device)
            optimizer.param_groups[0]["lr"] = learning_rate(config, step, len(train))
            with accelerator.autocast():  # no position comes twice: each image is moved anew
                inputs = augment(config, images, position + step * 128, key)
                loss = nll_loss(model(inputs), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.detach()
        train_loss = float(accelerator.reduce(total, "mean")) / len(train)
        accuracy, count = evaluate(network, test, accelerator)
        accelerator.log({"train_loss": train_loss, "test_accuracy": accuracy}, step=epoch + 1)
        accelerator.print(f"epoch {epoch + 1}: {accuracy:.2f} % of {count:,} test images")
    accelerator.end_training()


if __name__ == "__main__":
    main()
    leave(0)  # Python's own end aborts a process whose group still has work under way
