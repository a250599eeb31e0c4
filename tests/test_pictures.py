"""Finding the digit in pictures as people take them, measured with a network."""

import os

import numpy as np
import pytest
import torch
from drawn_pictures import KINDS, NO_DIGIT, UNTUNED, mnist_dark_on_light, mnist_itself, thin_pen
from PIL import Image

from data_prep.sources import load_digits, load_source
from mnist_fast.evaluate import predict
from mnist_fast.picture_files import ImageError, to_grey
from mnist_fast.pictures import crop_frame, find_digit, flatten_light


def found(picture):
    """What the network would see, or None where the picture is refused."""
    try:
        return find_digit(to_grey(Image.fromarray(picture)))
    except ImageError:
        return None


def shifted(first, second):
    """The least mean difference of two images, one moved by up to two pixels."""
    moves = [(row, column) for row in range(-2, 3) for column in range(-2, 3)]
    rolled = (np.roll(first, move, (0, 1)).astype(int) for move in moves)
    return min(np.abs(image - second).mean() for image in rolled)


def whole(images):
    """The images whose strokes hang together and are thick enough to be enlarged."""
    return [image for image in images if (image > 128).sum() > 60]


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind is not thin_pen], ids=lambda kind: kind.__name__
)
def test_most_pictures_of_each_kind_look_like_the_digit_alone(kind):
    images, rng = whole(load_digits().test_images)[:12], np.random.default_rng(0)
    seen = [(found(image), found(kind(image, rng))) for image in images]
    # of two different digits about 45 in the mean
    near = [b is not None and shifted(b, a) < 25 for a, b in seen if a is not None]
    assert np.mean(near) > 0.7, near


@pytest.mark.parametrize("kind", NO_DIGIT, ids=lambda kind: kind.__name__)
def test_most_of_what_is_not_one_digit_is_refused(kind):
    images, rng = load_digits().test_images[:4], np.random.default_rng(0)
    refused = [found(kind(images, rng)) is None for _ in range(20)]
    assert np.mean(refused) >= 0.7


def test_a_shadow_is_gone_from_the_background():
    rows, columns = np.mgrid[0:200, 0:200]
    shadow = np.where(rows + columns > 220, 0.45, 0.9).astype(np.float32)
    grey = shadow.copy()
    grey[60:140, 90:100] *= 0.3
    ink, noise = flatten_light(grey)
    assert noise < 0.01
    assert ink[65:115, 93:97] == pytest.approx(0.7, abs=0.03)
    paper = np.abs(ink) < 0.03
    assert paper.mean() > 0.9


@pytest.mark.parametrize("frame", [0.0, 0.5, 1.0])
def test_a_frame_is_cut_off_and_a_stroke_is_not(frame):
    rng = np.random.default_rng(0)
    inner = rng.normal(0.8, 0.01, (120, 90)).astype(np.float32)
    inner[30:90, 40:50] = 0.2
    cut = crop_frame(np.pad(inner, 25, constant_values=frame))
    assert 110 <= cut.shape[0] <= 120
    assert 80 <= cut.shape[1] <= 90
    stroke = np.full((200, 200), 0.9, np.float32)
    stroke[50:150, 80:120] = 0.1  # a 1, so to speak: a rectangle of one colour
    assert crop_frame(stroke).shape == (200, 200)


def test_pictures_of_any_size_and_content_end_in_a_digit_or_one_line():
    rng = np.random.default_rng(0)
    for number in range(300):
        size = rng.integers(1, 60, 2) if number % 3 else rng.choice([1, 2, 3, 400], 2)
        paper = np.clip(rng.normal(0.8, 0.01 * (number % 2), size), 0, 1)
        for _ in range(number % 5):
            top, left = (int(rng.integers(0, side)) for side in size)
            paper[top : top + rng.integers(1, 30), left : left + rng.integers(1, 8)] = rng.random()
        try:
            image = find_digit(paper.astype(np.float32))
        except ImageError:
            continue
        assert image.shape == (28, 28)
        assert image.max() > 0


# With a trained network


@pytest.fixture(scope="module")
def network(trained_on_mnist):
    """A network of the default recipe."""
    from mnist_fast.predict import load_network

    return load_network(trained_on_mnist)[0]


def accuracy(network, kind, images, labels):
    """Percentage of pictures read right; a refused one is wrong."""
    rng = np.random.default_rng(0)
    seen = [found(kind(image, rng)) for image in images]
    batch = np.stack([np.zeros((28, 28), np.uint8) if x is None else x for x in seen])
    digits = predict(network, torch.from_numpy(batch)[:, None]).argmax(1).numpy()
    right = [x is not None and d == y for x, d, y in zip(seen, digits, labels, strict=True)]
    return 100 * float(np.mean(right))


@pytest.mark.slow
@pytest.mark.mnist
@pytest.mark.timeout(1800)
def test_many_pictures_of_each_kind_are_read(network, mnist_root):
    """The bars are for 1,000 pictures of each kind: PICTURES=1000. Fewer take less time."""
    data = load_source("mnist", mnist_root)
    count = int(os.environ.get("PICTURES", "400"))
    chosen = np.random.default_rng(1).permutation(len(data.test_labels))[:count]
    images, labels = data.test_images[chosen], data.test_labels[chosen]
    measured = {kind: accuracy(network, kind, images, labels) for kind in [*KINDS, *UNTUNED]}
    print({kind.__name__: value for kind, value in measured.items()})
    low = {kind.__name__: measured[kind] for kind, bar in KINDS.items() if measured[kind] < bar}
    assert not low


@pytest.mark.slow
@pytest.mark.mnist
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", [mnist_itself, mnist_dark_on_light], ids=lambda k: k.__name__)
def test_mnist_as_picture_files_is_read_as_before(kind, network, mnist_root):
    data = load_source("mnist", mnist_root)
    count = int(os.environ.get("PICTURES", "400")) * 5
    images, labels = data.test_images[:count], data.test_labels[:count]
    plain = predict(network, torch.from_numpy(images.copy()).reshape(-1, 1, 28, 28)).argmax(1)
    direct = 100 * float(np.mean(plain.numpy() == labels))
    assert accuracy(network, kind, images, labels) >= 0.995 * direct
