"""`python -m mnist_fast.export WEIGHTS`: the network as one file that runs without this code.

The exported network takes uint8 images (batch, 1, 28, 28), white on black, and returns float32
probabilities (batch, 10); normalisation is part of it. A file is kept only after it gave the same
prediction as the network for every test image. docs/export.md shows how each format is used.
"""

import argparse
import importlib.util
import io
import json
import os
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from data_prep import betons
from mnist_fast.augment import normalise, scale_pixels
from mnist_fast.checkpoint import digest
from mnist_fast.data import read_all
from mnist_fast.errors import InputError, Parser, RunError, run_main, some_path
from mnist_fast.evaluate import predict
from mnist_fast.model import CLASSES, IMAGE_SIZE, Network, count_parameters
from mnist_fast.predict import load_network
from mnist_fast.run_folder import make_writable

PROGRAM = "python -m mnist_fast.export"
TOLERANCE = 1e-4  # largest difference of a probability
BATCHES = (0, 1, 7, 1000)  # sizes that the exported network is tried with, the last one repeated
OPSETS = range(17, 24)  # of ONNX; 17 is read by ONNX Runtime 1.13 and newer
NATIVE_OPSET = 18  # the oldest that torch writes itself; onnx converts to older ones
METADATA = "metadata.json"  # name of the extra file inside TorchScript and torch.export files


class Deployed(nn.Module):
    """The network with its normalisation: pixels in, probabilities out."""

    def __init__(self, network: Network):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Uint8 images (batch, 1, 28, 28) to float32 probabilities (batch, 10)."""
        return self.network.logits(normalise(scale_pixels(images))).softmax(1)


class Checked(nn.Module):
    """A traced network that refuses other inputs; TorchScript compiles this class.

    A trace holds no conditions, so it would take floats in 0..1 and read them wrongly.
    """

    def __init__(self, traced: nn.Module):
        super().__init__()
        self.traced = traced

    def forward(self, images: Tensor) -> Tensor:
        """Uint8 images (batch, 1, 28, 28) to float32 probabilities (batch, 10)."""
        if images.dtype != torch.uint8 or list(images.shape[1:]) != [1, 28, 28]:
            raise ValueError("expected uint8 images of shape (batch, 1, 28, 28)")
        return self.traced(images)


@dataclass(frozen=True)
class Job:
    """The network to be written, and what to write with it.

    Attributes:
        network: in evaluation mode, without gradients.
        metadata: stored in the file, see `describe`.
        opset: of ONNX.
    """

    network: Deployed
    metadata: dict[str, str]
    opset: int = OPSETS[0]


Answer = Callable[[Tensor], Tensor]  # images to probabilities
EXAMPLE = torch.zeros(2, 1, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)


def any_batch() -> tuple[dict[int, torch.export.Dim]]:
    """Marks the first dimension of the images as one of any size."""
    return ({0: torch.export.Dim("batch", min=0)},)


def write_onnx(job: Job, path: Path) -> None:
    """Writes ONNX, with any batch size, in one file."""
    import onnx

    program = torch.onnx.export(
        job.network,
        (EXAMPLE,),
        input_names=["images"],
        output_names=["probabilities"],
        opset_version=max(job.opset, NATIVE_OPSET),
        dynamic_shapes=any_batch(),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    if job.opset < NATIVE_OPSET:
        model = onnx.version_converter.convert_version(model, job.opset)
    # The oldest format of the file that has this opset: older programs read it.
    model.ir_version = onnx.helper.find_min_ir_version_for(model.opset_import)
    graph = model.graph
    parts = (graph.node, graph.input, graph.output, graph.value_info, graph.initializer)
    for part in (graph, *(item for items in parts for item in items)):
        part.ClearField("doc_string")  # both tell where the exporter's source files lie
        part.ClearField("metadata_props")
    onnx.helper.set_model_props(model, job.metadata)
    model.doc_string = f"{job.metadata['input']}\n{job.metadata['output']}"
    onnx.save(model, path)


def read_onnx(path: Path) -> Answer:
    """Runs an ONNX file in ONNX Runtime on the CPU."""
    import onnx
    import onnxruntime

    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def answer(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    return answer


def write_torchscript(job: Job, path: Path) -> None:
    """Writes TorchScript, which C++ programs load with `torch::jit::load`."""
    checked = torch.jit.script(Checked(torch.jit.trace(job.network, (EXAMPLE,))))
    whole = io.BytesIO()
    torch.jit.save(checked, whole, _extra_files={METADATA: json.dumps(job.metadata)})
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w") as target:
        for entry in source.infolist():
            # Only error messages read these files, which hold source lines and their paths.
            if not entry.filename.endswith(".debug_pkl"):
                target.writestr(entry, source.read(entry))


def read_torchscript(path: Path) -> Answer:
    """Runs a TorchScript file."""
    return torch.jit.load(str(path), map_location="cpu")


def write_torch_export(job: Job, path: Path) -> None:
    """Writes a torch.export program, with any batch size, which `torch.export.load` reads."""
    program = torch.export.export(job.network, (EXAMPLE,), dynamic_shapes=any_batch())
    for node in program.graph.nodes:  # all but a node's value tells where its source lies
        node.meta = {key: value for key, value in node.meta.items() if key == "val"}
    torch.export.save(program, path, extra_files={METADATA: json.dumps(job.metadata)})


def read_torch_export(path: Path) -> Answer:
    """Runs a torch.export program."""
    return torch.export.load(path).module()


@dataclass(frozen=True)
class Format:
    """How one format is written and run.

    Attributes:
        suffix: of the file.
        write: writes a job to a file.
        read: makes a file answer.
        libraries: what both import beside torch; names of modules and of packages are the same.
    """

    suffix: str
    write: Callable[[Job, Path], None]
    read: Callable[[Path], Answer]
    libraries: tuple[str, ...] = ()


FORMATS = {
    "onnx": Format(".onnx", write_onnx, read_onnx, ("onnx", "onnxscript", "onnxruntime")),
    "torchscript": Format(".torchscript.pt", write_torchscript, read_torchscript),
    "torch_export": Format(".pt2", write_torch_export, read_torch_export),
}


def check_libraries(forms: Iterable[str]) -> None:
    """Raises `InputError` if a library of one of the formats is not installed."""
    for form in forms:
        missing = [x for x in FORMATS[form].libraries if importlib.util.find_spec(x) is None]
        if missing:
            names = " ".join(missing)
            raise InputError(
                f"--format {form} needs {', '.join(missing)}: run 'make setup', or install with "
                f"'uv pip install {names}' or 'pip install {names}'"
            )


def describe(
    network: Network, dataset: str, accuracy: float, tested_on: betons.Manifest, form: str
) -> dict[str, str]:
    """Returns the metadata of a file, as text by name.

    Args:
        network: the network.
        dataset: what it was trained on.
        accuracy: in percent, on the test images.
        tested_on: the manifest of the betons with these images.
        form: the format.
    """
    libraries = ("torch", *FORMATS[form].libraries)
    return {
        "input": f"images: uint8 (batch, 1, {IMAGE_SIZE}, {IMAGE_SIZE}), pixels from 0 to 255, "
        "one white digit on black per image",
        "output": f"probabilities: float32 (batch, {CLASSES}), one per class",
        "classes": ",".join(map(str, range(CLASSES))),
        "parameters": str(count_parameters(network)),
        "dataset": dataset,
        "test_dataset": tested_on.dataset,
        "test_images": str(tested_on.test.samples),
        "test_accuracy": f"{accuracy:.6g}",
        "data_sha256": betons.data_sha256(tested_on),
        "weights_sha256": digest(network.state_dict()),
        "versions": ", ".join(f"{library} {version(library)}" for library in libraries),
    }


def verify(answer: Answer, images: Tensor, expected: Tensor) -> float:
    """Compares an exported network with the original on every image, in batches of several sizes.

    Args:
        answer: the exported network.
        images: uint8 (n, 1, 28, 28).
        expected: the probabilities that the original gives, float32 (n, 10).

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
        answers = torch.cat([answer(part) for part in images.split(sizes)])
    wrong = int((expected.argmax(1) != answers.argmax(1)).sum())
    difference = float((expected - answers).abs().max())
    if wrong or not difference <= TOLERANCE:
        raise RunError(
            f"the exported network differs: {wrong} of {len(images):,} predictions, "
            f"probabilities by up to {difference:.2g}; no file was written"
        )
    return difference


def export(job: Job, form: str, path: Path, images: Tensor, expected: Tensor) -> float:
    """Writes one format, verifies it as it lies on the disk, and only then gives it its name.

    Args:
        job: what to write.
        form: the format.
        path: of the file.
        images: uint8 (n, 1, 28, 28), to verify it with.
        expected: the network's probabilities, float32 (n, 10).

    Returns:
        The largest difference of a probability.

    Raises:
        RunError: it could not be written, or does not compute what the network does.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        temporary = Path(folder) / path.name
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecations inside the exporters
                FORMATS[form].write(job, temporary)
                difference = verify(FORMATS[form].read(temporary), images, expected)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except RunError:
            raise
        except Exception as error:  # exporters raise many kinds
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise RunError(f"{form}: the export failed: {reason[0]}") from error
    return difference


def read_test_set(folder: Path) -> tuple[Tensor, Tensor, betons.Manifest]:
    """Checks the test set; returns images uint8 (n, 1, 28, 28), labels int64 (n,), manifest."""
    manifest = betons.check(folder)
    rows = range(manifest.test.samples)
    images, labels = read_all(folder / manifest.test.file, rows, torch.device("cpu"))
    return images, labels, manifest


def some_opset(text: str) -> int:
    """The type of `--opset`."""
    if text not in map(str, OPSETS):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {OPSETS[0]} to {OPSETS[-1]}")
    return int(text)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = Parser(
        prog=PROGRAM,
        description="Writes the network in other formats, each verified on the test images: "
        "uint8 images (batch, 1, 28, 28) in, probabilities (batch, 10) out. "
        "docs/export.md shows how each is used.",
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
        "--opset",
        type=some_opset,
        default=OPSETS[0],
        metavar="N",
        help=f"ONNX operator set, {OPSETS[0]} to {OPSETS[-1]} (default: {OPSETS[0]}, which the "
        "most programs read)",
    )
    parser.add_argument(
        "--data_dir",
        type=some_path,
        metavar="DIR",
        help="folder of the betons with the test images (default: data/betons/DATASET)",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exports the weights named on the command line."""
    options = parse(arguments)
    check_libraries(options.format)
    network, details = load_network(options.weights)
    dataset = details.get("dataset", "mnist")
    folder = options.data_dir or betons.default_folder(dataset)
    images, labels, manifest = read_test_set(folder)
    paths = output_paths(options)
    probabilities = predict(network, images).exp()
    accuracy = 100 * float((probabilities.argmax(1) == labels).float().mean())
    metadata = {form: describe(network, dataset, accuracy, manifest, form) for form in paths}
    deployed = Deployed(network.requires_grad_(False)).eval()
    for form, path in paths.items():
        job = Job(deployed, metadata[form], options.opset)
        difference = export(job, form, path, images, probabilities)
        print(
            f"{path}: {path.stat().st_size:,} bytes; the same {len(images):,} predictions, "
            f"probabilities within {difference:.1g}"
        )
    return 0


def output_paths(options: argparse.Namespace) -> dict[str, Path]:
    """The file of each format, in a folder that can be written.

    Raises:
        InputError: it cannot, or a folder has the file's name.
    """
    weights = options.weights
    out = options.out or (weights if weights.is_dir() else weights.parent)
    paths = {form: out / f"mnist_fast{FORMATS[form].suffix}" for form in options.format}
    make_writable(out, "folder with --out")
    for path in paths.values():
        if path.is_dir():
            fault = f"{path}: a folder is in the file's place"
            raise InputError(f"{fault}: move it, or choose another folder with --out")
    return paths


if __name__ == "__main__":
    raise SystemExit(run_main(main, PROGRAM))
