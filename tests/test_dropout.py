"""The CPU's dropout has the law of torch's: the rate, the independence, the gradient."""

import math

import pytest
import torch

from mnist_fast.model import Dropout, dropout_mask


@pytest.mark.parametrize("probability", [0.001, 0.03, 0.5, 0.9])
def test_units_are_dropped_at_the_rate_in_every_place(probability):
    torch.manual_seed(0)
    masks = torch.stack([dropout_mask(torch.empty(500), probability) for _ in range(4000)])
    dropped = (masks == 0).double()
    sd = math.sqrt(probability * (1 - probability))
    assert abs(dropped.mean() - probability) < 5 * sd / math.sqrt(dropped.numel())
    assert (dropped.mean(0) - probability).abs().max() < 5.5 * sd / math.sqrt(len(masks))
    assert set(masks.unique().tolist()) <= {0.0, torch.tensor(1 / (1 - probability)).item()}


def test_units_are_dropped_independently():
    """No correlation at any distance, and the number of dropped units is binomial."""
    torch.manual_seed(0)
    probability, size, count = 0.03, 2000, 2000
    masks = torch.stack([dropout_mask(torch.empty(size), probability) for _ in range(count)])
    dropped = (masks == 0).double()
    variance = probability * (1 - probability)
    centred = dropped - probability
    for lag in (1, 2, 3, 7, 33, 64, 500):
        product = (centred[:, lag:] * centred[:, :-lag]).mean() / variance
        assert abs(product) < 5 / math.sqrt(count * (size - lag)), lag
    between = (centred[1:] * centred[:-1]).mean() / variance
    assert abs(between) < 5 / math.sqrt((count - 1) * size)
    spread = dropped.sum(1).var() / (size * variance)
    assert abs(spread - 1) < 5 * math.sqrt(2 / count)


def test_a_draw_that_falls_short_is_continued(monkeypatch):
    """With far too few draws at once the mask is filled to its end all the same."""
    monkeypatch.setattr(math, "sqrt", lambda _: -1e9)
    torch.manual_seed(0)
    with pytest.raises(RuntimeError):  # the sizes become negative: the patch does reach the code
        dropout_mask(torch.empty(10_000), 0.5)
    monkeypatch.setattr(math, "sqrt", lambda x: -x / 4 * 0.9)
    dropped = dropout_mask(torch.empty(100_000), 0.5) == 0
    assert abs(dropped[-20_000:].double().mean() - 0.5) < 5 * 0.5 / 20_000**0.5


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_passes_where_the_unit_passed(layout):
    torch.manual_seed(0)
    units = torch.rand(8, 4, 6, 6).add(1).contiguous(memory_format=layout).requires_grad_()
    out = Dropout(0.4)(units)
    out.sum().backward()
    assert out.is_contiguous(memory_format=layout)
    torch.testing.assert_close(out, units * units.grad)
    assert 0 < (units.grad == 0).sum() < units.numel()


def test_evaluation_and_probability_zero_change_nothing():
    units = torch.randn(10)
    assert torch.equal(Dropout(0.5).eval()(units), units)
    assert torch.equal(Dropout(0.0)(units), units)


def test_the_generator_decides():
    def draw(seed):
        torch.manual_seed(seed)
        return Dropout(0.5)(torch.ones(100))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_low_precision_keeps_its_type():
    torch.manual_seed(0)
    assert Dropout(0.03)(torch.ones(10, dtype=torch.bfloat16)).dtype == torch.bfloat16
