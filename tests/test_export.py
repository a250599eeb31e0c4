"""Exported networks: the file computes what the network does, or there is no file."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mnist_fast import export as module
from mnist_fast.errors import InputError, RunError
from mnist_fast.evaluate import predict
from mnist_fast.model import build_network
from mnist_fast.predict import load_network


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A run's folder with weights whose statistics have seen images."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    network = build_network()
    network.train()
    for _ in range(3):
        network(torch.rand(64, 1, 28, 28) * 3)
    details = {"network": "notebook", "dataset": "digits"}
    save_file(network.state_dict(), folder / "weights.safetensors", metadata=details)
    return folder


@pytest.fixture(scope="module")
def images(small_betons):
    return module.read_test_images(small_betons)


@pytest.mark.parametrize("form", module.FORMATS)
def test_the_file_gives_the_networks_predictions(form, weights, images, small_betons, capsys):
    options = ["--format", form, "--data_dir", str(small_betons)]
    assert module.main([str(weights), *options]) == 0
    assert "the same 360 predictions" in capsys.readouterr().out
    suffix, _, read = module.FORMATS[form]
    answer = read(weights / f"mnist_fast{suffix}")
    network, _ = load_network(weights)
    ours = predict(network, images).exp()
    for size in (1, 3, 360):
        with torch.inference_mode():
            theirs = answer(images[:size])
        np.testing.assert_allclose(theirs, ours[:size], atol=1e-5)
    assert [path for path in weights.iterdir() if path.name.startswith(".")] == []


def test_onnx_runs_without_torch(weights, images, small_betons, tmp_path):
    module.main([str(weights), "--data_dir", str(small_betons), "--out", str(tmp_path)])
    np.save(tmp_path / "images.npy", images.numpy())
    code = (
        "import sys, numpy, onnxruntime; assert 'torch' not in sys.modules;"
        "session = onnxruntime.InferenceSession('mnist_fast.onnx');"
        "images = numpy.load('images.npy');"
        "numpy.save('out.npy', session.run(['probabilities'], {'images': images})[0])"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60)
    network, _ = load_network(weights)
    ours = predict(network, images).argmax(1)
    assert np.array_equal(np.load(tmp_path / "out.npy").argmax(1), ours)


@pytest.mark.parametrize("fault", ["other weights", "no answer", "an exception", "not a number"])
def test_nothing_is_left_that_differs(fault, weights, images, tmp_path, monkeypatch):
    other = module.Deployed(build_network().eval())
    answers = {
        "other weights": other,
        "no answer": lambda batch: torch.zeros(len(batch), 10),
        "not a number": lambda batch: torch.full((len(batch), 10), float("nan")),
    }
    suffix, write, _ = module.FORMATS["torchscript"]
    read = lambda path: answers[fault]  # noqa: E731  (an unknown fault raises)
    monkeypatch.setitem(module.FORMATS, "torchscript", (suffix, write, read))
    network, _ = load_network(weights)
    with pytest.raises(RunError):
        module.export(network, images, "torchscript", tmp_path / "x.pt")
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_file_stays_when_the_new_one_fails(weights, images, tmp_path, monkeypatch):
    (tmp_path / "x.pt").write_text("earlier")
    broken = (".pt", lambda *_: None, module.read_torchscript)
    monkeypatch.setitem(module.FORMATS, "torchscript", broken)
    network, _ = load_network(weights)
    with pytest.raises(RunError, match="the export failed"):
        module.export(network, images, "torchscript", tmp_path / "x.pt")
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
