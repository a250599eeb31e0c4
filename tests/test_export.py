"""Exported networks: the file computes what the network does, says what it is, and no more."""

import dataclasses
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers import ROOT, train_script
from safetensors.torch import save_file

from mnist_fast import export as module
from mnist_fast.checkpoint import digest
from mnist_fast.errors import InputError, RunError
from mnist_fast.evaluate import predict
from mnist_fast.model import build_network
from mnist_fast.predict import load_network

FORMS = list(module.FORMATS)


def save_weights(folder, name="notebook"):
    """Weights of a network whose statistics have seen images."""
    torch.manual_seed(0)
    network = build_network(name)
    network.train()
    for _ in range(3):
        network(torch.rand(64, 1, 28, 28) * 3)
    details = {"network": name, "dataset": "digits"}
    save_file(network.state_dict(), folder / "weights.safetensors", metadata=details)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A run's folder with its weights."""
    return save_weights(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def images(small_betons):
    return module.read_test_set(small_betons)[0]


@pytest.fixture(scope="module")
def exported(weights, small_betons, tmp_path_factory):
    """A folder with the network in every format."""
    folder = tmp_path_factory.mktemp("exported")
    options = ["--data_dir", str(small_betons), "--out", str(folder)]
    assert module.main([str(weights), *options, "--format", *FORMS]) == 0
    return folder


def file_of(form, folder):
    return folder / f"mnist_fast{module.FORMATS[form].suffix}"


def expected_of(weights, images):
    return predict(load_network(weights)[0], images).exp()


# What it computes


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [0, 1, 3, 360, 10_001])
def test_every_batch_gives_the_networks_probabilities(form, size, exported, weights, images):
    batch = images.repeat(28, 1, 1, 1)[:size]
    answer = module.FORMATS[form].read(file_of(form, exported))
    found = answer(batch)
    assert found.shape == (size, 10)
    expected = expected_of(weights, images).repeat(28, 1)[:size]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "wrong",
    [
        *("floats in 0..1", "floats in 0..255", "signed", "long"),
        *("no channel", "one image alone", "three channels", "32 x 32"),
    ],
)
def test_other_inputs_are_refused(form, wrong, exported, images):
    batch = images[:8]
    other = {
        "floats in 0..1": batch.float() / 255,
        "floats in 0..255": batch.float(),
        "signed": batch.to(torch.int8),
        "long": batch.long(),
        "no channel": batch[:, 0],
        "one image alone": batch[0],
        "three channels": batch.repeat(1, 3, 1, 1),
        "32 x 32": torch.zeros(8, 1, 32, 32, dtype=torch.uint8),
    }[wrong]
    answer = module.FORMATS[form].read(file_of(form, exported))
    answer(batch)
    with pytest.raises(Exception, match=r"(?i)expected|guard|invalid|mismatch"):
        answer(other)


def test_no_gradients_are_asked_for(exported, images):
    for form in FORMS:
        answer = module.FORMATS[form].read(file_of(form, exported))
        assert not answer(images[:2]).requires_grad


# What it tells


def metadata_of(form, path):
    """What a user reads with the format's own library."""
    extra = {module.METADATA: ""}
    if form == "onnx":
        import onnxruntime

        return onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    if form == "torchscript":
        torch.jit.load(path, _extra_files=extra)
    else:
        torch.export.load(path, extra_files=extra)
    return json.loads(extra[module.METADATA])


@pytest.mark.parametrize("form", FORMS)
def test_the_file_says_what_it_is(form, exported, weights, small_betons):
    images, labels, manifest = module.read_test_set(small_betons)
    found = metadata_of(form, file_of(form, exported))
    right = int((expected_of(weights, images).argmax(1) == labels).sum())
    assert float(found["test_accuracy"]) == pytest.approx(100 * right / 360, abs=1e-3)
    assert found["test_images"] == "360"
    assert found["dataset"] == found["test_dataset"] == "digits"
    assert found["classes"] == "0,1,2,3,4,5,6,7,8,9"
    assert found["parameters"] == "7640"
    assert found["weights_sha256"] == digest(load_network(weights)[0].state_dict())
    assert found["data_sha256"] == module.betons.data_sha256(manifest)
    assert re.search(r"uint8 \(batch, 1, 28, 28\).*0 to 255.*white.*on black", found["input"])
    assert "float32 (batch, 10)" in found["output"]
    assert f"torch {version('torch')}" in found["versions"]
    assert ("onnx " in found["versions"]) == (form == "onnx")


def test_onnx_is_of_the_common_opset_and_names_what_goes_in_and_out(exported):
    model = onnx.load(file_of("onnx", exported))
    assert model.ir_version == 8
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 17)]
    assert "uint8" in model.doc_string
    shapes = []
    for value in (*model.graph.input, *model.graph.output):
        dims = value.type.tensor_type.shape.dim
        shapes.append((value.name, [dim.dim_param or dim.dim_value for dim in dims]))
    assert shapes == [("images", ["batch", 1, 28, 28]), ("probabilities", ["batch", 10])]


def test_another_opset_can_be_chosen(tmp_path, small_betons):
    save_weights(tmp_path, "record")
    opset = module.OPSETS[-1]
    module.main([str(tmp_path), "--data_dir", str(small_betons), "--opset", str(opset)])
    model = onnx.load(file_of("onnx", tmp_path))
    assert [known.version for known in model.opset_import] == [opset]
    assert model.ir_version == onnx.helper.find_min_ir_version_for(model.opset_import)


@pytest.mark.parametrize("opset", ["16", "99", "-1", "1e1", ""])
def test_an_opset_that_cannot_be_written_is_refused(opset, weights):
    with pytest.raises(InputError, match=r"--opset: .* is not one of 17 to 2"):
        module.main([str(weights), "--opset", opset])


# What it must not tell


def contents(name, content):
    """Every file inside a file, decompressed: (name, bytes), texts of pickles and JSON spelled."""
    if not zipfile.is_zipfile(io.BytesIO(content)):
        yield name, content
        return
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for entry in archive.namelist():
            yield from contents(f"{name}/{entry}", entry.encode() + b"\n" + archive.read(entry))


def plain(content):
    """Bytes with the escapes of JSON and Python's `repr` undone."""
    return content.replace(b'\\"', b'"').replace(b"\\'", b"'").replace(b"\\n", b"\n")


def source_lines():
    """Lines of our code, and of torch's layers, that are too long to be in a file by chance.

    TorchScript has classes of its own, which bear the names of torch's.
    """
    folder = Path(torch.__file__).parent / "nn"
    files = [*(ROOT / "mnist_fast").rglob("*.py"), folder / "functional.py"]
    files += (folder / "modules").glob("*.py")
    lines = {line.strip() for file in files for line in file.read_text().splitlines()}
    return [line.encode() for line in lines if len(line) > 24 and not line.endswith("(Module):")]


def betraying(name, content, folders):
    """What in a file tells where, or from which source, it was made."""
    content = plain(content)
    places = [str(folder).encode() for folder in folders]
    places += [b"site-packages", b"dist-packages", b".py(", b'File "']
    return [(name, found) for found in [*places, *source_lines()] if found in content]


@pytest.mark.parametrize("form", FORMS)
def test_no_path_and_no_source_line_is_inside(form, exported, weights):
    folders = [ROOT, Path.home(), sys.prefix, sys.base_prefix, exported, weights]
    path = file_of(form, exported)
    found = [
        fault
        for name, content in contents(path.name, path.read_bytes())
        for fault in betraying(name, content, folders)
    ]
    assert found == []


def test_the_search_finds_what_torch_writes_by_itself(weights, tmp_path):
    """Else the test above would pass whatever it looks at."""
    network = module.Deployed(load_network(weights)[0])
    batch = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
    torch.jit.trace(network, (batch,)).save(str(tmp_path / "a.pt"))
    torch.export.save(torch.export.export(network, (batch,)), tmp_path / "a.pt2")
    for name in ("a.pt", "a.pt2"):
        files = list(contents(name, (tmp_path / name).read_bytes()))
        found = {fault for file in files for _, fault in betraying(*file, [ROOT])}
        assert str(ROOT).encode() in found
    assert any(b"self.network" in line for line in found)


# Runtimes: the examples of docs/export.md, each in its own process


def examples():
    """The page's examples by the title above them: language and text."""
    page = (ROOT / "docs" / "export.md").read_text()
    pattern = r"^### (.*?)\n.*?^```(python|js)\n(.*?)^```"
    return {
        title: (language, text)
        for title, language, text in re.findall(pattern, page, re.DOTALL | re.MULTILINE)
    }


def run_example(title, folder, python=sys.executable, modules=None):
    """Runs an example beside the exported files and `images.npy`; returns its probabilities."""
    language, text = examples()[title]
    assert len([line for line in text.splitlines() if line]) == 4
    if language == "js":
        (folder / "node_modules").symlink_to(modules)
        (folder / "example.mjs").write_text(JS_BEFORE + text + JS_AFTER)
        command = ["node", "example.mjs"]
    else:
        save = "import numpy; numpy.asarray(probabilities, 'f4').tofile('out.bin')\n"
        (folder / "example.py").write_text(text + save)
        command = [python, "example.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return np.fromfile(folder / "out.bin", np.float32).reshape(-1, 10)


JS_BEFORE = """import fs from "node:fs";
const pixels = new Uint8Array(fs.readFileSync("images.npy")).slice(128);
"""
JS_AFTER = """
fs.writeFileSync("out.bin", new Uint8Array(probabilities.data.buffer));
"""


@pytest.fixture
def place(exported, images, tmp_path):
    """A folder with the files of the examples."""
    for form in FORMS:
        (tmp_path / file_of(form, exported).name).symlink_to(file_of(form, exported))
    np.save(tmp_path / "images.npy", images.numpy())
    return tmp_path


HERE = ["ONNX Runtime", "OpenCV", "PyTorch: TorchScript", "PyTorch: torch.export"]


@pytest.mark.parametrize("title", HERE)
def test_an_example_of_the_page_reads_every_digit(title, place, weights, images):
    found = run_example(title, place)
    np.testing.assert_allclose(found, expected_of(weights, images), atol=1e-5)


def test_every_example_of_the_page_is_tried():
    assert list(examples()) == [*HERE[:1], "ONNX Runtime Web", "OpenVINO", *HERE[1:]]


# Faults


@pytest.mark.parametrize("fault", ["other weights", "no answer", "an exception", "not a number"])
def test_nothing_is_left_that_differs(fault, weights, images, tmp_path, monkeypatch):
    other = module.Deployed(build_network().eval())
    answers = {
        "other weights": other,
        "no answer": lambda batch: torch.zeros(len(batch), 10),
        "not a number": lambda batch: torch.full((len(batch), 10), float("nan")),
    }
    read = lambda path: answers[fault]  # noqa: E731  (an unknown fault raises)
    broken = dataclasses.replace(module.FORMATS["torchscript"], read=read)
    monkeypatch.setitem(module.FORMATS, "torchscript", broken)
    with pytest.raises(RunError):
        export_to(tmp_path / "x.pt", weights, images)
    assert list(tmp_path.iterdir()) == []


def export_to(path, weights, images):
    """TorchScript at a path, or an error."""
    network, _ = load_network(weights)
    job = module.Job(module.Deployed(network).eval(), {})
    module.export(job, "torchscript", path, images, predict(network, images).exp())


def test_an_earlier_file_stays_when_the_new_one_fails(weights, images, tmp_path, monkeypatch):
    (tmp_path / "x.pt").write_text("earlier")
    broken = dataclasses.replace(module.FORMATS["torchscript"], write=lambda *_: None)
    monkeypatch.setitem(module.FORMATS, "torchscript", broken)
    with pytest.raises(RunError, match="the export failed"):
        export_to(tmp_path / "x.pt", weights, images)
    assert (tmp_path / "x.pt").read_text() == "earlier"


def test_without_test_images_nothing_is_exported(weights, tmp_path):
    with pytest.raises(InputError, match=r"manifest\.json"):
        module.main([str(weights), "--data_dir", str(tmp_path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["a file", "/proc", "a folder in the file's place"])
def test_a_place_that_cannot_be_written_is_refused_first(
    place, weights, small_betons, tmp_path, monkeypatch
):
    out = module.Path("/proc") if place == "/proc" else tmp_path / "out"
    if place == "a file":
        out.write_text("mine")
    elif place != "/proc":
        (out / "mnist_fast.onnx").mkdir(parents=True)
    monkeypatch.setattr(module, "export", None)
    with pytest.raises(InputError, match=f"{out}.*--out"):
        module.main([str(weights), "--data_dir", str(small_betons), "--out", str(out)])
    if place == "a folder in the file's place":
        assert [path.name for path in out.iterdir()] == ["mnist_fast.onnx"]


def test_an_unknown_format_is_bad_usage(weights):
    with pytest.raises(InputError, match="invalid choice"):
        module.main([str(weights), "--format", "pickle"])


@pytest.mark.parametrize("library", module.FORMATS["onnx"].libraries)
def test_a_missing_library_is_named_with_the_command(library, weights, monkeypatch):
    find_spec = importlib.util.find_spec
    hide = lambda name, *rest: None if name == library else find_spec(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hide)
    with pytest.raises(InputError, match=f"onnx needs {library}: run 'make setup'.*{library}'$"):
        module.main([str(weights), "--format", "torchscript", "onnx"])
    module.check_libraries(["torchscript", "torch_export"])


# Other runtimes, on the real test set: docs/export.md tells how to make the folder RUNTIMES


@pytest.fixture(scope="module")
def mnist_place(mnist_betons, tmp_path_factory):
    """A network after one epoch of MNIST in every format, the test images, and its answers."""
    folder = tmp_path_factory.mktemp("mnist-run")
    options = ("--epochs", "1", "--wandb", "disabled", "--data_dir", mnist_betons)
    done = train_script(*options, "--run_dir", folder, cwd=folder, timeout=300)
    assert done.returncode == 0, done.stderr
    module.main([str(folder), "--data_dir", str(mnist_betons), "--format", *FORMS])
    images = module.read_test_set(mnist_betons)[0]
    np.save(folder / "images.npy", images.numpy())
    return folder, images


def runtime_of(name):
    """Where a runtime lies that this environment does not have; skips the test without it."""
    if not os.environ.get("RUNTIMES"):
        pytest.skip("RUNTIMES is not set: docs/export.md tells how to install other runtimes")
    path = Path(os.environ["RUNTIMES"]).absolute() / name
    if not path.exists():
        pytest.skip(f"RUNTIMES has no {name}: docs/export.md tells how to install it")
    return path


@pytest.mark.slow
@pytest.mark.mnist
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("title", "where"),
    [
        *((title, None) for title in HERE),
        ("ONNX Runtime", "onnxruntime-1.17"),
        ("ONNX Runtime Web", "web/node_modules"),
        ("OpenVINO", "openvino"),
        ("OpenCV", "opencv-4.6"),
        ("OpenCV", "opencv-4.10"),
    ],
)
def test_a_runtime_makes_the_same_10_000_predictions(title, where, mnist_place):
    folder, images = mnist_place
    for name in ("node_modules", "out.bin"):
        (folder / name).unlink(missing_ok=True)
    path = runtime_of(where) if where else None
    python = path / "bin" / "python" if path and title != "ONNX Runtime Web" else sys.executable
    found = run_example(title, folder, python, modules=path)
    expected = expected_of(folder, images)
    assert found.shape == (10_000, 10)
    assert (found.argmax(1) != expected.argmax(1).numpy()).sum() == 0
    np.testing.assert_allclose(found, expected, atol=module.TOLERANCE)
