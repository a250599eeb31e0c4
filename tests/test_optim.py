"""Muon: orthogonal updates, and momentum as in SGD."""

import math

import pytest
import torch
from torch import nn

from mnist_fast.model import build_network
from mnist_fast.optim import Muon, orthogonalise

SHAPES = [(8, 9), (16, 72), (32, 24), (10, 16), (1, 5), (5, 1)]


def test_singular_values_come_close_to_1_and_their_vectors_stay():
    torch.manual_seed(0)
    matrices = [torch.randn(shape) for shape in SHAPES]
    for matrix, found in zip(matrices, orthogonalise(matrices), strict=True):
        assert found.shape == matrix.shape
        left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
        inner = left.T @ found.double() @ right.T
        values = inner.diagonal()
        assert 0.4 < values.min() <= values.max() < 1.3
        torch.testing.assert_close(inner, values.diag(), rtol=0, atol=1e-4)


def test_the_scale_of_a_gradient_does_not_matter():
    torch.manual_seed(0)
    matrix = torch.randn(16, 72)
    torch.testing.assert_close(
        orthogonalise([matrix]), orthogonalise([1e-3 * matrix]), atol=1e-3, rtol=0
    )


def test_a_gradient_of_zeros_moves_nothing():
    (found,) = orthogonalise([torch.zeros(4, 6)])
    assert torch.equal(found, torch.zeros(4, 6))


@pytest.mark.parametrize("nesterov", [True, False])
def test_it_is_sgd_but_for_the_weights(nesterov):
    """Vectors move as in SGD; weights by the orthogonal factor of what SGD would move them by."""
    torch.manual_seed(0)
    network, other = build_network(), build_network()
    other.load_state_dict(network.state_dict())
    ours = Muon(network.parameters(), 0.1, momentum=0.8, nesterov=nesterov)
    theirs = torch.optim.SGD(other.parameters(), 0.1, momentum=0.8, nesterov=nesterov)
    for _ in range(3):
        before = [parameter.detach().clone() for parameter in network.parameters()]
        for mine, plain, start in zip(
            network.parameters(), other.parameters(), before, strict=True
        ):
            mine.grad = torch.randn_like(mine)
            plain.grad = mine.grad.clone()
            plain.data.copy_(start)
        ours.step()
        theirs.step()
        for mine, plain, start in zip(
            network.parameters(), other.parameters(), before, strict=True
        ):
            if mine.dim() == 1:
                torch.testing.assert_close(mine, plain)
                continue
            (factor,) = orthogonalise([(start - plain).flatten(1)])
            scale = math.sqrt(max(1, factor.shape[0] / factor.shape[1]))
            expected = start - 0.1 * scale * factor.view_as(mine)
            torch.testing.assert_close(mine, expected, rtol=0, atol=1e-5)


def test_weight_decay_does_not_depend_on_gradients():
    weight = nn.Parameter(torch.ones(3, 4))
    optimizer = Muon([weight], torch.tensor(0.5), weight_decay=0.1)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight.data, torch.full((3, 4), 0.95))
