"""Random affine maps, elastic distortions, brightness and contrast of a batch, on its device.

Every draw is a pure function of a key (from seed and epoch) and of the image's position in the
epoch, so that it does not depend on how the epoch is cut into batches and shared among processes.
"""

import dataclasses
import hashlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mnist_fast.config import Config

MEAN, SD = 0.1307, 0.3081  # of the pixels of MNIST's training images, scaled to 0..1
DRAWS = 9  # uniform numbers that one image consumes, besides those of the elastic distortion
CONTROL_POINTS = 5  # of the elastic distortion, along each side
ELASTIC = 0x2B992DDFA23249D6  # flips bits of the key: the elastic distortion has draws of its own
_MASK = 0xFFFFFFFF


def derive_key(seed: int, epoch: int, purpose: str) -> int:
    """A 62-bit key for one use of randomness in one epoch of one run."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def _mix(x: Tensor) -> Tensor:
    """Bijective 32-bit hash in int64 (Wellons: Prospecting for Hash Functions, `lowbias32`)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & _MASK
    return x ^ (x >> 16)


def uniform(key: Tensor, positions: Tensor, columns: int) -> Tensor:
    """Counter-based uniform numbers in [0, 1).

    Args:
        key: int64 scalar from `derive_key`.
        positions: int64 (batch,), positions in the epoch.
        columns: numbers per position.

    Returns:
        float32 (batch, columns), multiples of 2**-24.
    """
    counter = positions[:, None] * columns + torch.arange(columns, device=positions.device)
    bits = _mix(_mix((counter + key) & _MASK) ^ (key >> 31))
    return (bits & _MASK).div(256, rounding_mode="floor").float() * 2.0**-24


@dataclasses.dataclass(frozen=True)
class Parameters:
    """The draws of each image; every field is float32 (batch,).

    Angles are radians with torchvision's signs, translations pixels, the others factors.
    `contrast_first` is true where contrast is changed before brightness.
    """

    rotation: Tensor
    angle: Tensor
    shear: Tensor
    scale: Tensor
    translate_x: Tensor
    translate_y: Tensor
    brightness: Tensor
    contrast: Tensor
    contrast_first: Tensor


def draw_parameters(config: Config, draws: Tensor, size: int) -> Parameters:
    """Turns uniform numbers (batch, 9) into parameters, distributed as torchvision's samplers.

    Translations are whole pixels, as in `torchvision.transforms.RandomAffine`.
    """

    def between(column: int, low: float, high: float) -> Tensor:
        return low + (high - low) * draws[:, column]

    def around(column: int, radius: float, centre: float = 0.0) -> Tensor:
        return between(column, centre - radius, centre + radius)

    shift = config.translate * size
    return Parameters(
        rotation=around(0, math.radians(config.rotation)),
        angle=around(1, math.radians(config.affine_rotation)),
        shear=around(2, math.radians(config.shear)),
        scale=between(3, config.scale_min, config.scale_max),
        translate_x=around(4, shift).round(),
        translate_y=around(5, shift).round(),
        brightness=around(6, config.brightness, 1.0),
        contrast=around(7, config.contrast, 1.0),
        contrast_first=draws[:, 8] < 0.5,
    )


def affine_maps(p: Parameters) -> Tensor:
    """Output pixel to input pixel, float32 (batch, 2, 3), origin at the image's centre.

    Inverts x -> T(translate) R(angle) Shear S(scale) R(-rotation) x: torchvision's `rotate` turns
    counter-clockwise, its `affine` clockwise, with the y axis pointing down. Without shear in y the
    linear part [[a, b], [c, d]] has the determinant scale**2, and the inverse is written out.
    """
    cos, sin, tan = p.angle.cos(), p.angle.sin(), p.shear.tan()
    # inverse of the affine map's linear part
    m00, m01 = (cos - sin * tan) / p.scale, (cos * tan + sin) / p.scale
    m10, m11 = -sin / p.scale, cos / p.scale
    # the rotation's inverse behind it
    rc, rs = p.rotation.cos(), p.rotation.sin()
    a, b = rc * m00 - rs * m10, rc * m01 - rs * m11
    c, d = rs * m00 + rc * m10, rs * m01 + rc * m11
    x, y = -(a * p.translate_x + b * p.translate_y), -(c * p.translate_x + d * p.translate_y)
    return torch.stack([a, b, x, c, d, y], dim=1).unflatten(1, (2, 3))


def displacements(config: Config, key: Tensor, positions: Tensor, size: int) -> Tensor:
    """Elastic distortions in pixels, float32 (batch, 2, size, size), x before y.

    The points of a 5 x 5 grid over the image move by up to `config.elastic` pixels in x and in y,
    uniformly and each by itself; what lies between them follows by bicubic interpolation. (Simard,
    Steinkraus, Platt: Best Practices for Convolutional Neural Networks, 2003, smooth a displacement
    per pixel instead.)
    """
    draws = uniform(key ^ ELASTIC, positions, 2 * CONTROL_POINTS**2)
    moves = ((2 * draws - 1) * config.elastic).unflatten(1, (2, CONTROL_POINTS, CONTROL_POINTS))
    basis = interpolation_basis(size, draws.device)
    return basis @ moves @ basis.T


def interpolation_basis(size: int, device: torch.device) -> Tensor:
    """Weight of each control point along a side for each pixel, float32 (size, 5).

    Bicubic interpolation is linear, and the same along either side.
    """
    unit = torch.eye(CONTROL_POINTS, device=device)[None, None]
    return F.interpolate(unit, (size, CONTROL_POINTS), mode="bicubic", align_corners=True)[0, 0]


def warp(
    images: Tensor,
    maps: Tensor,
    resampling: str,
    fill: float,
    displaced: Tensor | None = None,
) -> Tensor:
    """Resamples images under affine maps.

    Args:
        images: float (batch, channels, size, size).
        maps: output pixel to input pixel, (batch, 2, 3), origin at the centre.
        resampling: nearest, bilinear or bicubic.
        fill: value outside the image.
        displaced: pixels added to where a map leads, (batch, 2, size, size), x before y.
    """
    size = images.shape[-1]
    # theta maps coordinates scaled to -1..1: only the shift changes its unit
    theta = torch.cat([maps[:, :, :2], maps[:, :, 2:] * (2 / size)], dim=2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    if displaced is not None:
        grid = grid + displaced.permute(0, 2, 3, 1) * (2 / size)
    warped = F.grid_sample(images - fill, grid, resampling, "zeros", align_corners=False)
    return warped + fill


def jitter(images: Tensor, p: Parameters) -> Tensor:
    """Brightness and contrast in random order, images float in 0..1 (batch, 1, size, size).

    Brightness multiplies; contrast blends with the image's own mean; both clip to 0..1, as
    torchvision's `adjust_brightness` and `adjust_contrast` do.
    """
    brightness, contrast = p.brightness[:, None, None, None], p.contrast[:, None, None, None]

    def brighten(x: Tensor) -> Tensor:
        return (x * brightness).clamp(0, 1)

    def stretch(x: Tensor) -> Tensor:
        mean = x.mean(dim=(1, 2, 3), keepdim=True)
        return (mean + (x - mean) * contrast).clamp(0, 1)

    first = p.contrast_first[:, None, None, None]
    other = brighten(torch.where(first, stretch(images), images))
    return torch.where(first, other, stretch(other))


def scale_pixels(images: Tensor) -> Tensor:
    """Uint8 pixels 0..255 to float32 0..1."""
    return images.float() / 255


def normalise(images: Tensor) -> Tensor:
    """Pixels in 0..1 to MNIST's zero mean and unit variance."""
    return (images - MEAN) / SD


def warps(config: Config) -> bool:
    """Whether the recipe moves pixels at all."""
    ranges = (config.rotation, config.affine_rotation, config.shear, config.translate)
    return any((*ranges, config.elastic)) or (config.scale_min, config.scale_max) != (1.0, 1.0)


def augment(
    config: Config,
    images: Tensor,
    positions: Tensor,
    key: Tensor,
) -> Tensor:
    """Augmented and normalised images.

    Args:
        config: strengths and resampling.
        images: uint8 (batch, 1, size, size).
        positions: int64 (batch,), positions of the images in the epoch.
        key: int64 scalar from `derive_key`.

    Returns:
        float32, shape of `images`, normalised.
    """
    pixels = scale_pixels(images)
    jitters = bool(config.brightness or config.contrast)
    if warps(config) or jitters:
        size = images.shape[-1]
        p = draw_parameters(config, uniform(key, positions, DRAWS), size)
        if warps(config):
            moves = displacements(config, key, positions, size) if config.elastic else None
            pixels = warp(pixels, affine_maps(p), config.resampling, config.fill / 255, moves)
        if jitters:
            pixels = jitter(pixels, p)
    return normalise(pixels)
