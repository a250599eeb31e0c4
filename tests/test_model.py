"""The network: the notebook's layers in its order, and the table that describes them."""

import sys

import pytest
import torch
from helpers import ROOT, launch
from torch import nn

from mnist_fast import model
from mnist_fast.errors import InputError
from mnist_fast.model import build_network, count_parameters, layer_table

NOTEBOOK = [
    *("Conv2d 1 8 3", "BatchNorm2d 8", "Dropout", "ReLU"),
    *("Conv2d 8 16 3", "BatchNorm2d 16", "Dropout", "MaxPool2d 2"),  # no ReLU here
    *("Conv2d 16 8 1", "BatchNorm2d 8", "Dropout"),  # nor here
    *("Conv2d 8 16 3", "ReLU", "BatchNorm2d 16", "Dropout"),
    *("Conv2d 16 24 3", "ReLU", "BatchNorm2d 24", "Dropout", "AvgPool2d 8"),
    *("Conv2d 24 32 1", "ReLU", "BatchNorm2d 32", "Dropout"),
    *("Conv2d 32 16 1", "ReLU", "BatchNorm2d 16", "Dropout"),
    "Conv2d 16 10 1",
]


def described(layer):
    """A layer's kind and sizes in words."""
    kind = type(layer).__name__
    if isinstance(layer, nn.Conv2d):
        return f"{kind} {layer.in_channels} {layer.out_channels} {layer.kernel_size[0]}"
    if isinstance(layer, nn.BatchNorm2d):
        return f"{kind} {layer.num_features}"
    return f"{kind} {layer.kernel_size}" if hasattr(layer, "kernel_size") else kind


def test_layers_stand_in_the_notebooks_order():
    network = build_network("notebook", dropout=0.03)
    assert [described(layer) for layer in network.layers] == NOTEBOOK
    assert {layer.p for layer in network.modules() if isinstance(layer, nn.Dropout)} == {0.03}


def test_convolutions_are_plain():
    """No bias, padding, dilation or groups; stride 1: as in the notebook."""
    for layer in build_network("notebook").modules():
        if isinstance(layer, nn.Conv2d):
            assert layer.bias is None
            assert layer.kernel_size[0] == layer.kernel_size[1]
            assert (layer.stride, layer.dilation, layer.groups) == ((1, 1), (1, 1), 1)
            assert layer.padding == (0, 0)


def test_batch_norms_are_torchs_defaults():
    for layer in build_network("notebook").modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert (layer.eps, layer.momentum) == (1e-5, 0.1)
            assert layer.affine
            assert layer.track_running_stats


def test_the_notebooks_network_has_7640_parameters():
    network = build_network("notebook")
    assert sum(parameter.numel() for parameter in network.parameters()) == 7_640
    assert count_parameters(network) == 7_640


@pytest.mark.parametrize("name", sorted(model.NETWORKS))
def test_every_network_is_below_the_limit_and_as_large_as_listed(name):
    network = build_network(name)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count < 8_000
    assert count == model.NETWORKS[name][1]
    images = torch.rand(3, 1, 28, 28)
    assert network(images).shape == (3, 10)
    assert network.logits(images).shape == (3, 10)


@pytest.mark.parametrize(("parameters", "refused"), [(7_999, False), (8_000, True), (9_000, True)])
def test_eight_thousand_parameters_are_refused(monkeypatch, parameters, refused):
    layers = [nn.Linear(parameters, 1, bias=False)]
    monkeypatch.setitem(model.NETWORKS, "wide", (lambda dropout: layers, parameters))
    if not refused:
        assert count_parameters(build_network("wide")) == parameters
        return
    with pytest.raises(ValueError, match=f"{parameters} parameters: the limit is fewer than 8000"):
        build_network("wide")


def test_another_number_of_parameters_than_listed_is_refused(monkeypatch):
    layers, _ = model.NETWORKS["notebook"]
    monkeypatch.setitem(model.NETWORKS, "notebook", (layers, 7_641))
    with pytest.raises(ValueError, match="has 7640 parameters, expected 7641"):
        build_network("notebook")


def test_an_unknown_network_is_refused():
    with pytest.raises(InputError, match="resnet: unknown, the networks are notebook"):
        build_network("resnet")


def test_outputs_are_log_probabilities_in_float32():
    network = build_network("notebook", dropout=0.1)
    images = torch.randn(5, 1, 28, 28)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = network(images)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.exp().sum(1), torch.ones(5))
    torch.testing.assert_close(network.eval()(images), network.logits(images).log_softmax(1))


def test_the_same_seed_gives_the_same_weights():
    def weights(seed):
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in build_network("notebook").parameters()])

    with torch.random.fork_rng():
        assert torch.equal(weights(1), weights(1))
        assert not torch.equal(weights(1), weights(2))


# The layer table


def reach(layers, size):
    """Receptive field and jump of a stack of layers, measured by differentiating through it.

    Every weight is 1 and the maximum is replaced by the mean, so that no gradient is 0 by chance.
    Returns the widths of the input that the first output sees, and the distance of the first two.
    """
    stack = []
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.ones_(layer.weight)
            stack.append(layer)
        elif isinstance(layer, nn.MaxPool2d | nn.AvgPool2d):
            stack.append(nn.AvgPool2d(layer.kernel_size))
    images = torch.ones(1, 1, size, size, requires_grad=True)
    row = nn.Sequential(*stack)(images)[0].sum(0)[0]
    seen = []
    for output in row[:2]:
        (gradient,) = torch.autograd.grad(output, images, retain_graph=True)
        seen.append(gradient[0, 0].abs().sum(0).nonzero().flatten().tolist())
    return len(seen[0]), seen[1][0] - seen[0][0]


def test_receptive_fields_and_jumps_are_what_gradients_see():
    network = build_network("notebook")
    table = list(layer_table(network))
    fields = [row.receptive_field for row in table]
    assert fields[NOTEBOOK.index("AvgPool2d 8")] == 28  # the whole image
    assert fields == sorted(fields)
    for number, layer in enumerate(network.layers, start=1):
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
            row = table[number - 1]
            measured = reach(network.layers[:number], size=48)
            assert (row.receptive_field, row.jump) == measured, f"layer {number}"


def test_the_table_holds_kernels_strides_shapes_and_parameters():
    network = build_network("notebook")
    table = list(layer_table(network))
    assert [row.name for row in table] == [type(layer).__name__ for layer in network.layers]
    assert sum(row.parameters for row in table) == 7_640
    shapes = {row.output_shape for row in table}
    assert {(8, 26, 26), (16, 24, 24), (16, 12, 12), (16, 10, 10), (24, 8, 8)} <= shapes
    assert table[-1].output_shape == (10, 1, 1)
    pool = table[NOTEBOOK.index("MaxPool2d 2")]
    assert (pool.kernel, pool.stride, pool.output_shape) == (2, 2, (16, 12, 12))
    assert (table[0].kernel, table[0].stride) == (3, 1)
    assert table[1].kernel is None


def test_the_table_leaves_the_network_as_it_was():
    network = build_network("notebook").train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    list(layer_table(network))
    assert network.training
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.timeout(60)
def test_the_module_prints_the_table():
    done = launch(sys.executable, "-m", "mnist_fast.model", cwd=ROOT, timeout=50)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == (
        ["#", "layer", "kernel", "stride", "pad", "output", "receptive", "jump", "parameters"]
    )
    assert lines[1].split() == ["1", "Conv2d", "3", "1", "0", "8x26x26", "3", "1", "72"]
    assert [line.split()[1] for line in lines[1:-1]] == [name.split()[0] for name in NOTEBOOK]
    assert lines[-1].split() == ["total", "7,640"]


def test_the_module_refuses_an_unknown_network(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["model", "resnet"])
    with pytest.raises(InputError, match="resnet"):
        model.main()
