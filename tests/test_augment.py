"""Augmentation: its maths against torchvision's transforms, its draws against torchvision's."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as vision
from scipy import stats
from torchvision.transforms import ColorJitter, InterpolationMode, RandomAffine, RandomRotation
from torchvision.transforms.functional import _get_inverse_affine_matrix

from data_prep.sources import load_digits
from mnist_fast import augment
from mnist_fast.augment import (
    DRAWS,
    MEAN,
    SD,
    Parameters,
    affine_maps,
    derive_key,
    displacements,
    draw_parameters,
    jitter,
    normalise,
    scale_pixels,
    uniform,
    warp,
)
from mnist_fast.config import Config

SIZE = 28
COUNT = 200
NONE = {
    **dict.fromkeys(("rotation", "angle", "shear", "translate_x", "translate_y"), 0.0),
    **dict.fromkeys(("scale", "brightness", "contrast"), 1.0),
    "contrast_first": 0.0,
}
STRONG = Config(
    rotation=60,
    affine_rotation=50,
    shear=30,
    translate=0.2,
    scale_min=0.6,
    scale_max=1.5,
    elastic=2.0,
    brightness=0.8,
    contrast=0.8,
)


@pytest.fixture(scope="module")
def digits():
    """uint8 images (200, 1, 28, 28)."""
    return torch.from_numpy(load_digits().train_images[:COUNT]).unsqueeze(1)


@pytest.fixture(scope="module")
def pixels(digits):
    """Float images in 0..1 (200, 1, 28, 28)."""
    return digits.float() / 255


def drawn(config=STRONG, count=COUNT, seed=0):
    """The parameters of the first images of an epoch."""
    key = torch.tensor(derive_key(seed, 0, "augment"))
    return draw_parameters(config, uniform(key, torch.arange(count), DRAWS), SIZE)


def only(parameters, *names):
    """Parameters without what is not named."""
    count = len(parameters.scale)
    rest = {k: torch.full((count,), v) for k, v in NONE.items() if k not in names}
    rest["contrast_first"] = parameters.contrast_first
    return dataclasses.replace(parameters, **rest)


def constant(count=1, **values):
    """The same parameters for each of `count` images; angles in radians."""
    given = {k: torch.full((count,), float(v)) for k, v in (NONE | values).items()}
    given["contrast_first"] = given["contrast_first"] > 0
    return Parameters(**given)


def affine_of(image, p, i, mode):
    """torchvision's `affine` with the parameters of image i."""
    return vision.affine(
        image,
        angle=math.degrees(p.angle[i]),
        translate=[int(p.translate_x[i]), int(p.translate_y[i])],
        scale=float(p.scale[i]),
        shear=[math.degrees(p.shear[i]), 0.0],
        interpolation=mode,
    )


def assert_same_pixels(ours, theirs, resampling):
    """Equal but for rounding; in nearest, a pixel on the border of two may fall to the other."""
    differ = (ours - theirs).abs() > 1e-4
    allowed = 1e-4 if resampling == "nearest" else 0.0
    assert differ.float().mean() <= allowed


# The maps


@pytest.mark.parametrize("resampling", ["nearest", "bilinear"])
def test_rotation_is_torchvisions(pixels, resampling):
    p = only(drawn(), "rotation")
    mode = InterpolationMode(resampling)
    theirs = [
        vision.rotate(x, math.degrees(a), mode) for x, a in zip(pixels, p.rotation, strict=True)
    ]
    ours = warp(pixels, affine_maps(p), resampling, fill=0.0)
    assert_same_pixels(ours, torch.stack(theirs), resampling)


@pytest.mark.parametrize("resampling", ["nearest", "bilinear"])
@pytest.mark.parametrize(
    "names",
    [
        ("angle",),
        ("shear",),
        ("scale",),
        ("translate_x", "translate_y"),
        ("angle", "shear", "scale", "translate_x", "translate_y"),
    ],
)
def test_affine_maps_are_torchvisions(pixels, resampling, names):
    p = only(drawn(), *names)
    mode = InterpolationMode(resampling)
    theirs = [affine_of(image, p, i, mode) for i, image in enumerate(pixels)]
    ours = warp(pixels, affine_maps(p), resampling, fill=0.0)
    assert not torch.equal(ours, pixels)
    assert_same_pixels(ours, torch.stack(theirs), resampling)


def test_the_composed_map_is_the_product_of_torchvisions_matrices():
    """First the rotation, then the affine map; inverted, because outputs look up inputs."""
    p = drawn()
    for i, ours in enumerate(affine_maps(p).double()):
        rotation = _get_inverse_affine_matrix(
            [0.0, 0.0], -math.degrees(p.rotation[i]), [0.0, 0.0], 1.0, [0.0, 0.0]
        )
        affine = _get_inverse_affine_matrix(
            [0.0, 0.0],
            math.degrees(p.angle[i]),
            [float(p.translate_x[i]), float(p.translate_y[i])],
            float(p.scale[i]),
            [math.degrees(p.shear[i]), 0.0],
        )
        first, second = (_square(matrix) for matrix in (rotation, affine))
        torch.testing.assert_close(ours, (first @ second)[:2], rtol=1e-5, atol=1e-4)


def _square(matrix):
    rows = torch.tensor(matrix, dtype=torch.float64).reshape(2, 3)
    return torch.cat([rows, torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)])


@pytest.mark.parametrize("resampling", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_the_composed_map_equals_two_maps_where_these_are_exact(pixels, resampling, quarters):
    """Quarter turns and whole pixels do not resample, so one pass must equal torchvision's two."""
    p = constant(
        COUNT, rotation=math.pi / 2, angle=quarters * math.pi / 2, translate_x=3, translate_y=-2
    )
    theirs = vision.affine(vision.rotate(pixels, 90), 90.0 * quarters, [3, -2], 1.0, [0.0])
    ours = warp(pixels, affine_maps(p), resampling, fill=0.0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("resampling", ["nearest", "bilinear", "bicubic"])
def test_the_identity_changes_nothing(pixels, resampling):
    ours = warp(pixels, affine_maps(constant(COUNT)), resampling, fill=0.3)
    torch.testing.assert_close(ours, pixels, rtol=0, atol=2e-5)


def test_resampling_modes_differ_as_they_should(pixels):
    maps = affine_maps(only(drawn(), "rotation"))
    nearest, bilinear, bicubic = (
        warp(pixels, maps, mode, fill=0.0) for mode in ("nearest", "bilinear", "bicubic")
    )
    assert np.isin(nearest.numpy(), pixels.unique().numpy()).all()  # it only moves values
    assert not np.isin(bilinear.numpy(), pixels.unique().numpy()).all()
    assert bilinear.min() >= -1e-6
    assert bilinear.max() <= 1 + 1e-6
    assert bicubic.min() < -0.01  # it overshoots
    assert (bicubic - bilinear).abs().mean() < (nearest - bilinear).abs().mean()


@pytest.mark.parametrize("resampling", ["nearest", "bilinear"])
def test_the_fill_stands_where_the_image_does_not_reach(pixels, resampling):
    p = constant(COUNT, translate_x=5, translate_y=-3)
    moved = warp(pixels, affine_maps(p), resampling, fill=0.25)
    expected = torch.full_like(pixels, 0.25)
    expected[:, :, :-3, 5:] = pixels[:, :, 3:, :-5]
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-5)


def test_the_fill_is_torchvisions_in_nearest(pixels):
    p = only(drawn(), "rotation")
    theirs = [
        vision.rotate(x, math.degrees(a), fill=[1 / 255])
        for x, a in zip(pixels, p.rotation, strict=True)
    ]
    ours = warp(pixels, affine_maps(p), "nearest", fill=1 / 255)
    assert_same_pixels(ours, torch.stack(theirs), "nearest")


# Brightness and contrast


@pytest.mark.parametrize("contrast_first", [False, True])
def test_jitter_is_torchvisions_in_either_order(pixels, contrast_first):
    p = drawn()
    p = dataclasses.replace(p, contrast_first=torch.full((COUNT,), contrast_first))
    theirs = []
    for image, brightness, contrast in zip(pixels, p.brightness, p.contrast, strict=True):
        steps = [
            lambda x, b=brightness: vision.adjust_brightness(x, float(b)),
            lambda x, c=contrast: vision.adjust_contrast(x, float(c)),
        ]
        for step in reversed(steps) if contrast_first else steps:
            image = step(image)
        theirs.append(image)
    torch.testing.assert_close(jitter(pixels, p), torch.stack(theirs), rtol=0, atol=1e-5)


def test_the_order_of_the_jitter_matters_and_is_each_images_own(pixels):
    p = dataclasses.replace(drawn(), brightness=torch.full((COUNT,), 1.7))
    mixed = jitter(pixels, p)
    orders = [
        jitter(pixels, dataclasses.replace(p, contrast_first=torch.full((COUNT,), flag)))
        for flag in (False, True)
    ]
    for i, flag in enumerate(p.contrast_first):
        assert torch.equal(mixed[i], orders[int(flag)][i])
        assert not torch.equal(orders[0][i], orders[1][i])


# The distributions: n is such that a range 5 % off would be found


def equal_in_distribution(ours, theirs):
    assert stats.ks_2samp(ours, theirs).pvalue > 1e-3


def torchvisions_affine(config, count):
    """Angle, x and y translation, scale and x shear, as `RandomAffine` draws them."""
    torch.manual_seed(0)
    angle, shear = config.affine_rotation, config.shear
    shift, scales = [config.translate] * 2, [config.scale_min, config.scale_max]
    drawn = [
        RandomAffine.get_params([-angle, angle], shift, scales, [-shear, shear], [SIZE, SIZE])
        for _ in range(count)
    ]
    return np.array([(a, x, y, scale, s[0]) for a, (x, y), scale, s in drawn]).T


def test_rotations_are_distributed_as_torchvisions():
    torch.manual_seed(0)
    theirs = [RandomRotation.get_params([-60.0, 60.0]) for _ in range(5_000)]
    equal_in_distribution(drawn(count=5_000).rotation.rad2deg(), theirs)


def test_affine_parameters_are_distributed_as_torchvisions():
    ours = drawn(count=5_000)
    angle, x, y, scale, shear = torchvisions_affine(STRONG, 5_000)
    equal_in_distribution(ours.angle.rad2deg(), angle)
    equal_in_distribution(ours.scale, scale)
    equal_in_distribution(ours.shear.rad2deg(), shear)
    for mine, theirs in ((ours.translate_x, x), (ours.translate_y, y)):
        pixels = np.arange(-6, 7)  # 0.2 of 28 is 5.6: the outermost are rarer
        table = [[(np.asarray(v) == pixel).sum() for pixel in pixels] for v in (mine, theirs)]
        assert np.sum(table) == 10_000
        assert min(table[0]) > 0
        assert stats.chi2_contingency(table).pvalue > 1e-3


def test_jitter_is_distributed_as_torchvisions():
    torch.manual_seed(0)
    theirs = [ColorJitter.get_params([0.2, 1.8], [0.2, 1.8], None, None) for _ in range(5_000)]
    ours = drawn(count=5_000)
    equal_in_distribution(ours.brightness, [factor for _, factor, _, _, _ in theirs])
    equal_in_distribution(ours.contrast, [factor for _, _, factor, _, _ in theirs])
    first = sum(int(order.tolist().index(1) < order.tolist().index(0)) for order, *_ in theirs)
    table = [[int(ours.contrast_first.sum()), first], [5_000, 5_000]]
    assert stats.chi2_contingency(table).pvalue > 1e-3
    assert stats.binomtest(int(ours.contrast_first.sum()), 5_000, 0.5).pvalue > 1e-3


def test_parameters_are_independent_of_each_other():
    p = drawn(count=5_000)
    columns = [getattr(p, field.name).double() for field in dataclasses.fields(p)]
    correlations = torch.corrcoef(torch.stack(columns)) - torch.eye(len(columns))
    assert correlations.abs().max() < 4 / math.sqrt(5_000)


def displaced(strength, count=COUNT):
    key = torch.tensor(derive_key(1, 0, "augment"))
    return displacements(Config(elastic=strength), key, torch.arange(count), SIZE)


@pytest.mark.parametrize("resampling", ["nearest", "bilinear"])
def test_elastic_distortions_are_torchvisions(pixels, resampling):
    moves = displaced(1.5)
    theirs = [
        vision.elastic_transform(
            image, displacement.permute(1, 2, 0)[None] * 2 / SIZE, InterpolationMode(resampling)
        )
        for image, displacement in zip(pixels, moves, strict=True)
    ]
    ours = warp(pixels, affine_maps(constant(COUNT)), resampling, 0.0, moves)
    assert_same_pixels(ours, torch.stack(theirs), resampling)


def test_elastic_distortions_interpolate_points_of_a_grid():
    """The corners are points: uniform up to the strength, on their own; others are near theirs."""
    moves = displaced(1.5, count=20_000)
    corners = moves[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].flatten(1)
    for column in corners.T:
        assert stats.kstest(column, "uniform", (-1.5, 3)).pvalue > 1e-4
    assert (torch.corrcoef(corners.T) - torch.eye(8)).abs().max() < 0.03
    steps = moves.diff(dim=3).abs()
    assert steps.max() < 1.5  # of neighbouring pixels: points are 6.75 pixels apart
    assert (displaced(3.0) / displaced(1.5)).allclose(torch.tensor(2.0), rtol=1e-3)


def test_nothing_is_drawn_where_the_recipe_asks_for_nothing():
    p = drawn(Config(dropout=0.0))
    for name, value in NONE.items():
        if name != "contrast_first":
            assert torch.equal(getattr(p, name), torch.full((COUNT,), value)), name


# The numbers behind it


def numbers(positions, seed=1, epoch=0, columns=DRAWS):
    key = torch.tensor(derive_key(seed, epoch, "augment"))
    return uniform(key, torch.as_tensor(positions), columns)


def test_uniform_numbers_are_uniform():
    u = numbers(torch.arange(20_000))
    assert u.dtype == torch.float32
    assert u.min() >= 0
    assert u.max() < 1
    for column in u.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-4
    assert len(u.unique()) > 0.98 * u.numel()


@pytest.mark.parametrize("batch", [1, 7, 128, 1_000])
def test_draws_do_not_depend_on_how_the_epoch_is_cut(batch):
    whole = numbers(torch.arange(1_000))
    parts = [numbers(part) for part in torch.arange(1_000).split(batch)]
    assert torch.equal(torch.cat(parts), whole)
    shuffled = torch.randperm(1_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(numbers(shuffled), whole[shuffled])


def test_draws_differ_by_seed_epoch_position_and_purpose():
    draws = [
        numbers(range(100), seed=1, epoch=0),
        numbers(range(100), seed=1, epoch=1),
        numbers(range(100), seed=2, epoch=0),  # must not be seed 1, epoch 1
        numbers(range(100, 200), seed=1, epoch=0),
    ]
    for one, other in itertools.combinations(draws, 2):
        assert (one != other).float().mean() > 0.99
    keys = {derive_key(s, e, p) for s in (1, 2, 11) for e in (0, 1) for p in ("order", "augment")}
    assert len(keys) == 12
    assert all(0 <= key < 2**62 for key in keys)


def test_draws_are_the_same_on_every_machine_and_in_every_version():
    """Written down once: a change here changes every recorded result."""
    assert derive_key(1, 0, "augment") == 4585095844191289980
    assert (numbers([0, 59_999], columns=3) * 2**24).long().tolist() == [
        [1235541, 8024604, 16398378],
        [1123753, 7392779, 4123598],
    ]


# The whole pass


def pass_over(config, images, first=0, epoch=0):
    positions = torch.arange(first, first + len(images))
    return augment.augment(config, images, positions, torch.tensor(derive_key(1, epoch, "augment")))


def test_off_only_normalises(digits):
    plain = pass_over(Config(), digits)
    torch.testing.assert_close(plain, (digits.float() / 255 - 0.1307) / 0.3081)
    assert torch.equal(plain, normalise(scale_pixels(digits)))
    assert (MEAN, SD) == (0.1307, 0.3081)


@pytest.mark.parametrize("resampling", ["nearest", "bilinear"])
def test_the_pass_is_torchvisions_chain(digits, pixels, resampling):
    """Rotation and affine map in one resampling, jitter, then the normalisation behind it."""
    config = dataclasses.replace(STRONG, rotation=0, elastic=0, resampling=resampling)
    p = draw_parameters(config, numbers(torch.arange(COUNT)), SIZE)
    chain = []
    for i, image in enumerate(pixels):
        image = affine_of(image, p, i, InterpolationMode(resampling))
        factors = {
            vision.adjust_brightness: float(p.brightness[i]),
            vision.adjust_contrast: float(p.contrast[i]),
        }
        order = list(factors.items())
        for adjust, factor in reversed(order) if p.contrast_first[i] else order:
            image = adjust(image, factor)
        chain.append(vision.normalize(image, [0.1307], [0.3081]))
    ours = pass_over(config, digits)
    # a nearest pixel that falls elsewhere moves its image's mean, hence the contrast of all of it
    close = torch.isclose(ours, torch.stack(chain), rtol=0, atol=1e-3)
    assert close.float().mean() >= (0.99 if resampling == "nearest" else 1.0)


def test_the_pass_does_not_depend_on_how_the_epoch_is_cut(digits):
    whole = pass_over(STRONG, digits)
    parts = [pass_over(STRONG, part, first=64 * i) for i, part in enumerate(digits.split(64))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-6)
    assert not torch.equal(pass_over(STRONG, digits, epoch=1), whole)


def test_the_fill_is_in_pixel_values():
    config = Config(translate=1.0, fill=51)
    inked = torch.full((50, 1, SIZE, SIZE), 255, dtype=torch.uint8)
    values = pass_over(config, inked).unique()
    torch.testing.assert_close(values, normalise(torch.tensor([51 / 255, 1.0])))


@pytest.mark.parametrize(
    "choice",
    ["rotation", "affine_rotation", "shear", "translate", "elastic", "brightness", "contrast"],
)
def test_each_choice_alone_has_an_effect(digits, choice):
    value = {"rotation": 20, "affine_rotation": 20, "shear": 20, "elastic": 2}.get(choice, 0.3)
    changed = pass_over(Config(**{choice: value}), digits)
    assert not torch.allclose(changed, pass_over(Config(), digits))


@pytest.mark.parametrize("scales", [{"scale_min": 0.7}, {"scale_max": 1.3}])
def test_each_scale_alone_has_an_effect(digits, scales):
    assert not torch.allclose(pass_over(Config(**scales), digits), pass_over(Config(), digits))
