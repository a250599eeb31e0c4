"""The networks. `python -m mnist_fast.model` prints the layer table of one."""

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mnist_fast.errors import InputError, Parser, run_main
from mnist_fast.files import say

MAX_PARAMETERS = 8_000
IMAGE_SIZE = 28
CLASSES = 10


def conv(inputs: int, outputs: int, kernel: int, padding: int = 0) -> nn.Conv2d:
    """A convolution without bias: the BatchNorm behind it has one."""
    return nn.Conv2d(inputs, outputs, kernel, padding=padding, bias=False)


class Dropout(nn.Dropout):
    """Dropout whose masks are cheap on CPUs, where drawing a number per unit costs more than a
    convolution; elsewhere it is torch's."""

    def forward(self, units: Tensor) -> Tensor:
        """Zeroes each unit with probability p and scales the others by 1 / (1 - p)."""
        if units.device.type != "cpu" or not self.training or not self.p:
            return super().forward(units)
        return units * dropout_mask(units.detach(), self.p)


@torch.library.custom_op("mnist_fast::dropout_mask", mutates_args=())
def dropout_mask(units: Tensor, probability: float) -> Tensor:
    """A mask in shape, type and layout of dense `units`: 0 with a probability, else 1 / (1 - it).

    Walks from dropped unit to dropped unit: of independent trials the number of failures before
    the next success is geometric, and that is the whole part of an exponential variable of rate
    -log(1 - probability) (Devroye: Non-Uniform Random Variate Generation, 1986, X.2). The law is
    the same as with one draw per unit, up to the 53 bits of a draw.
    """
    count, rate = units.numel(), -math.log1p(-probability)
    mask = torch.full((count,), 1 / (1 - probability), dtype=units.dtype)
    last = -1  # position of the last dropped unit so far
    while last < count:
        rest = count - last
        draws = int(rest * probability + 4 * math.sqrt(rest * probability)) + 16  # rarely too few
        gaps = torch.empty(draws, dtype=torch.float64).exponential_(rate).long()
        positions = (gaps + 1).cumsum_(0).add_(last)
        last = int(positions[-1])
        mask[positions[: int(torch.searchsorted(positions, count))]] = 0
    return mask.as_strided(units.shape, units.stride())


@dropout_mask.register_fake
def _(units: Tensor, probability: float) -> Tensor:
    return torch.empty_like(units)


def notebook_layers(dropout: float) -> list[nn.Module]:
    """The notebook's layers in its order, which differs from block to block; 7,640 parameters."""

    def drop() -> nn.Module:
        return Dropout(dropout)

    return [
        *(conv(1, 8, 3), nn.BatchNorm2d(8), drop(), nn.ReLU()),
        *(conv(8, 16, 3), nn.BatchNorm2d(16), drop(), nn.MaxPool2d(2)),
        *(conv(16, 8, 1), nn.BatchNorm2d(8), drop()),
        *(conv(8, 16, 3), nn.ReLU(), nn.BatchNorm2d(16), drop()),
        *(conv(16, 24, 3), nn.ReLU(), nn.BatchNorm2d(24), drop(), nn.AvgPool2d(8)),
        *(conv(24, 32, 1), nn.ReLU(), nn.BatchNorm2d(32), drop()),
        *(conv(32, 16, 1), nn.ReLU(), nn.BatchNorm2d(16), drop()),
        conv(16, CLASSES, 1),
    ]


def record_layers(dropout: float) -> list[nn.Module]:
    """Deeper, with three padded convolutions at full resolution and one pooling; 7,800 parameters.

    Eight channels suffice where strokes are traced, and every width is a multiple of 8, which
    matrix units like. The global average stands behind the widest layer, not before it, so that
    each position casts its vote with all 24 features.
    """

    def block(inputs: int, outputs: int, kernel: int, padding: int) -> list[nn.Module]:
        return [
            conv(inputs, outputs, kernel, padding),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            Dropout(dropout),
        ]

    return [
        *(*block(1, 8, 3, 1), *block(8, 8, 3, 1), *block(8, 8, 3, 1), nn.MaxPool2d(2)),
        *(*block(8, 16, 3, 1), *block(16, 16, 3, 0), *block(16, 16, 3, 0)),
        *(*block(16, 24, 1, 0), nn.AvgPool2d(10)),
        conv(24, CLASSES, 1),
    ]


NETWORKS = {"notebook": (notebook_layers, 7_640), "record": (record_layers, 7_800)}


class Network(nn.Module):
    """Images (batch, 1, 28, 28), normalised floats, to log-probabilities (batch, 10)."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def logits(self, images: Tensor) -> Tensor:
        """Images (batch, 1, 28, 28) to unnormalised scores (batch, 10)."""
        return self.layers(images).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        """Images (batch, 1, 28, 28) to log-probabilities (batch, 10), in float32."""
        return self.logits(images).float().log_softmax(dim=1)


def check_name(name: str) -> None:
    """Refuses an unknown network.

    Raises:
        InputError: no network has this name.
    """
    if name not in NETWORKS:
        raise InputError(f"network {name}: unknown, the networks are {', '.join(NETWORKS)}")


def build_network(name: str = "notebook", dropout: float = 0.0) -> Network:
    """Builds a network by name, initialised by torch's defaults from the global generator.

    Raises:
        InputError: an unknown name.
        ValueError: the network has not the number of parameters it is listed with, or too many.
    """
    check_name(name)
    layers, expected = NETWORKS[name]
    network = Network(layers(dropout))
    count = check_parameters(network)
    if count != expected:
        raise ValueError(f"network {name} has {count} parameters, expected {expected}")
    return network


def count_parameters(network: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def check_parameters(network: nn.Module) -> int:
    """Counts the parameters; raises `ValueError` at 8,000 or more."""
    count = count_parameters(network)
    if count >= MAX_PARAMETERS:
        raise ValueError(f"{count} parameters: the limit is fewer than {MAX_PARAMETERS}")
    return count


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """One row of the layer table; sizes in pixels of the input image."""

    name: str
    kernel: int | None
    stride: int | None
    padding: int | None
    output_shape: tuple[int, ...]
    receptive_field: int
    jump: int
    parameters: int


def layer_table(network: Network) -> Iterator[LayerRow]:
    """Rows of the layer table, in the order of the forward pass.

    The receptive field r and the jump j (distance of neighbouring outputs) of a layer with kernel k
    and stride s are r + (k - 1) j and j s (Araujo, Norris, Sim: Computing Receptive Fields of
    Convolutional Neural Networks, Distill 2019).
    """
    field, jump = 1, 1
    images = torch.zeros(1, 1, IMAGE_SIZE, IMAGE_SIZE)
    was_training = network.training
    network.eval()
    for layer in network.layers:
        with torch.no_grad():
            images = layer(images)
        kernel, stride, padding = (
            _side(layer, key) for key in ("kernel_size", "stride", "padding")
        )
        if kernel is not None and stride is not None:
            field, jump = field + (kernel - 1) * jump, jump * stride
        shape = tuple(images.shape[1:])
        yield LayerRow(
            type(layer).__name__,
            kernel,
            stride,
            padding,
            shape,
            field,
            jump,
            count_parameters(layer),
        )
    network.train(was_training)


def _side(layer: nn.Module, key: str) -> int | None:
    """The side length of a layer's square attribute."""
    value = getattr(layer, key, None)
    return value[0] if isinstance(value, tuple) else value


def format_table(network: Network) -> str:
    """The layer table as text."""
    rows = [["#", "layer", "kernel", "stride", "pad", "output", "receptive", "jump", "parameters"]]
    for number, layer in enumerate(layer_table(network), start=1):
        output = "x".join(map(str, layer.output_shape))
        sides = ["" if v is None else str(v) for v in (layer.kernel, layer.stride, layer.padding)]
        numbers = [str(layer.receptive_field), str(layer.jump), f"{layer.parameters:,}"]
        rows.append([str(number), layer.name, *sides, output, *numbers])
    rows.append(["", "total", "", "", "", "", "", "", f"{count_parameters(network):,}"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 1 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def main() -> int:
    """Prints the layer table of the network named on the command line."""
    parser = Parser(prog="python -m mnist_fast.model", description=main.__doc__)
    parser.add_argument(
        "network", nargs="?", default="notebook", help=f"one of {', '.join(NETWORKS)}"
    )
    say(format_table(build_network(parser.parse_args().network)))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main(main, "python -m mnist_fast.model"))
