"""`python -m mnist_fast.export WEIGHTS`: the network as one file that runs without this code.

The exported network takes uint8 images (batch, 1, 28, 28), white on black, and returns float32
probabilities (batch, 10); normalisation is part of it. A file is left only after it gave the same
prediction as the network for every test image.
"""

import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_prep import betons
from mnist_fast.augment import normalise, scale_pixels
from mnist_fast.data import read_all
from mnist_fast.errors import InputError, Parser, RunError, run_main, some_path
from mnist_fast.evaluate import predict
from mnist_fast.model import IMAGE_SIZE, Network
from mnist_fast.predict import load_network
from mnist_fast.run_folder import make_writable

PROGRAM = "python -m mnist_fast.export"
TOLERANCE = 1e-4  # largest difference of a probability
BATCHES = (1, 7, 1000)  # sizes that the exported network is tried with, the last one repeated


class Deployed(nn.Module):
    """The network with its normalisation: pixels in, probabilities out."""

    def __init__(self, network: Network):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Uint8 images (batch, 1, 28, 28) to float32 probabilities (batch, 10)."""
        return self.network.logits(normalise(scale_pixels(images))).softmax(1)


Answer = Callable[[Tensor], Tensor]  # images to probabilities


def write_onnx(network: Deployed, example: Tensor, path: Path) -> None:
    """ONNX, with any batch size, in one file."""
    batch = torch.export.Dim("batch", min=1)
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["probabilities"]}
    program = torch.onnx.export(
        network, (example,), dynamo=True, verbose=False, dynamic_shapes=({0: batch},), **names
    )
    assert program is not None
    program.save(str(path), external_data=False)


def read_onnx(path: Path) -> Answer:
    """Runs an ONNX file in ONNX Runtime on the CPU."""
    import onnx
    import onnxruntime

    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def answer(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    return answer


def write_torchscript(network: Deployed, example: Tensor, path: Path) -> None:
    """TorchScript, which C++ programs load with `torch::jit::load`."""
    torch.jit.trace(network, (example,)).save(str(path))


def read_torchscript(path: Path) -> Answer:
    """Runs a TorchScript file."""
    return torch.jit.load(str(path), map_location="cpu")


def write_torch_export(network: Deployed, example: Tensor, path: Path) -> None:
    """A torch.export program, with any batch size, which `torch.export.load` reads."""
    batch = torch.export.Dim("batch", min=1)
    torch.export.save(torch.export.export(network, (example,), dynamic_shapes=({0: batch},)), path)


def read_torch_export(path: Path) -> Answer:
    """Runs a torch.export program."""
    return torch.export.load(path).module()


# format: file suffix, writer, reader
FORMATS = {
    "onnx": (".onnx", write_onnx, read_onnx),
    "torchscript": (".torchscript.pt", write_torchscript, read_torchscript),
    "torch_export": (".pt2", write_torch_export, read_torch_export),
}


def verify(answer: Answer, network: Network, images: Tensor) -> float:
    """Compares an exported network with the original on every image, in batches of several sizes.

    Args:
        answer: the exported network.
        network: the original.
        images: uint8 (n, 1, 28, 28).

    Returns:
        The largest difference of a probability.

    Raises:
        RunError: a prediction differs, or a probability by more than 1e-4.
    """
    sizes: list[int] = []
    rest = len(images)
    while rest > 0:
        sizes.append(min(BATCHES[min(len(sizes), len(BATCHES) - 1)], rest))
        rest -= sizes[-1]
    with torch.inference_mode():
        ours = predict(network, images).exp()
        theirs = torch.cat([answer(part) for part in images.split(sizes)])
    wrong = int((ours.argmax(1) != theirs.argmax(1)).sum())
    difference = float((ours - theirs).abs().max())
    if wrong or not difference <= TOLERANCE:
        raise RunError(
            f"the exported network differs: {wrong} of {len(images):,} predictions, "
            f"probabilities by up to {difference:.2g}; nothing was left"
        )
    return difference


def export(network: Network, images: Tensor, form: str, path: Path) -> float:
    """Writes one format, verifies it as it lies on the disk, and only then gives it its name.

    Returns:
        The largest difference of a probability.

    Raises:
        RunError: it could not be written, or does not compute what the network does.
    """
    _, write, read = FORMATS[form]
    deployed = Deployed(network.eval()).eval()
    example = torch.zeros(2, 1, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        temporary = Path(folder) / path.name
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecations inside the exporters
                write(deployed, example, temporary)
                difference = verify(read(temporary), network, images)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except RunError:
            raise
        except Exception as error:  # exporters raise many kinds
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise RunError(f"{form}: the export failed: {reason[0]}") from error
    return difference


def read_test_images(folder: Path) -> Tensor:
    """The checked test images, uint8 (n, 1, 28, 28)."""
    manifest = betons.check(folder)
    images, _ = read_all(
        folder / manifest.test.file, range(manifest.test.samples), torch.device("cpu")
    )
    return images


def main(arguments: Sequence[str] | None = None) -> int:
    """Exports the weights named on the command line."""
    parser = Parser(
        prog=PROGRAM,
        description="Writes the network in other formats, each verified on the test images: "
        "uint8 images (batch, 1, 28, 28) in, probabilities (batch, 10) out.",
    )
    parser.add_argument(
        "weights", type=some_path, help="weights.safetensors of a run, or its folder"
    )
    parser.add_argument(
        "--out",
        type=some_path,
        metavar="DIR",
        help="folder of the files (default: that of the weights)",
    )
    parser.add_argument(
        "--format",
        nargs="+",
        choices=list(FORMATS),
        default=["onnx"],
        help="one or more formats (default: onnx)",
    )
    parser.add_argument(
        "--data_dir",
        type=some_path,
        metavar="DIR",
        help="folder of the betons with the test images (default: data/betons/DATASET)",
    )
    options = parser.parse_args(arguments)
    network, details = load_network(options.weights)
    weights = options.weights
    out = options.out or (weights if weights.is_dir() else weights.parent)
    folder = options.data_dir or betons.default_folder(details.get("dataset", "mnist"))
    images = read_test_images(folder)
    paths = {form: out / f"mnist_fast{FORMATS[form][0]}" for form in options.format}
    make_writable(out, "folder with --out")
    for path in paths.values():
        if path.is_dir():
            fault = f"{path}: a folder is in the file's place"
            raise InputError(f"{fault}: move it, or choose another folder with --out")
    for form, path in paths.items():
        difference = export(network, images, form, path)
        print(
            f"{path}: {path.stat().st_size:,} bytes; the same {len(images):,} predictions, "
            f"probabilities within {difference:.1g}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main(main, PROGRAM))
