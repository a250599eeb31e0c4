"""Pages of digits: what is on them, and where."""

import dataclasses
import io

import numpy as np
import pytest
from made_runs import make_outcome
from PIL import Image

from mnist_fast.pages import before_and_after, misread, tile


def make_samples(count):
    return np.random.default_rng(1).integers(0, 256, (2, count, 28, 28), np.uint8)


def test_each_misread_digit_is_shown_below_its_label_and_prediction():
    outcome = make_outcome(500, 50)
    page = misread(outcome, "test")
    title, *texts = [text for *_, text in page.texts]
    assert title == "50 test images misread, shown: the 40 surest"
    assert len(texts) == 40
    label, guess = int(outcome.labels[9]), int(outcome.predictions[9])
    assert texts[9].startswith(f"{label} read as {guess}\n")
    x, y = page.texts[10][0]  # the title is the first
    shown = page.pixels[int(y) : int(y) + 28, int(x) - 14 : int(x) + 14]
    assert np.array_equal(255 - shown, outcome.images[9])


PAGES = {
    "misread": lambda: misread(make_outcome(9_000, 8_000), "validation"),
    "one misread": lambda: misread(make_outcome(500, 1), "test"),
    "samples": lambda: before_and_after(make_samples(32)),
    "few samples": lambda: before_and_after(make_samples(4)),
    "two samples": lambda: before_and_after(make_samples(2)),
}


@pytest.mark.parametrize("draw", PAGES.values(), ids=PAGES)
def test_texts_lie_beside_the_digits_and_within_the_page(draw):
    """Digits keep their sharp edges: a pixel is a square of dots of one shade."""
    page = draw()
    with Image.open(io.BytesIO(page.png())) as picture:
        dots = np.asarray(picture)
    plain = page.pixels.repeat(page.scale, 0).repeat(page.scale, 1)
    assert dots.shape == plain.shape
    drawn = dots != plain
    assert drawn.any()
    assert not drawn[[0, -1]].any()
    assert not drawn[:, [0, -1]].any()
    framed = dataclasses.replace(page, texts=[])
    with Image.open(io.BytesIO(framed.png())) as picture:
        texts = dots != np.asarray(picture)
    assert not (texts & (plain < 255)).any()


def test_tiles_by_rows_with_gaps_and_margins():
    images = np.arange(3, dtype=np.uint8)[:, None, None].repeat(2, 1).repeat(2, 2)
    page, corners = tile(255 - images, 2, gap=(1, 2), margins=(3, 0, 1, 1))
    assert corners == [(1, 3), (5, 3), (1, 6)]
    assert page.shape == (3 + 2 + 1 + 2 + 1, 1 + 2 + 2 + 2)
    assert [page[y, x] for x, y in corners] == [255, 254, 253]
    assert (page[:3] == 255).all()
