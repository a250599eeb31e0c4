"""Finds the one digit in a picture, and shows it as MNIST would: one function per step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from mnist_fast.model import IMAGE_SIZE
from mnist_fast.picture_files import ImageError

# OpenCV does not say of what type its results are.
Grey = NDArray[Any]  # float32 (height, width)
Mask = NDArray[Any]  # uint8 (height, width), often 0 or 255
Box = tuple[int, int, int, int]  # left, top, width, height

DIGIT_BOX = 20  # MNIST's digits fill a box of 20 x 20 pixels
CENTRE = IMAGE_SIZE / 2  # pixel index on which their centre of mass lies
MIN_STROKE = 2.2  # pixels of the 20; MNIST's strokes are 2 to 4 wide
WIDEST = 1.1  # ratio of a digit's width to its height, where two parts make it
MOST_HOLES = 4  # in the digit; an 8 has two
MIN_CONTRAST = 0.08  # between digit and background, of the full range
WIDEST_STROKE = 0.25  # of the longer side
EDGE = 0.05  # of the digit's contrast; fainter pixels do not count for its bounding box

BLANK = "blank: no digit stands out from the background"
SEVERAL = "several digits: crop the picture to one"
CLUTTER = "no digit: it shows a solid shape or a clutter, not strokes on a plain background"


def find_digit(
    grey: Grey, see: Callable[[str, NDArray[Any]], None] = lambda *_: None
) -> NDArray[np.uint8]:
    """The one digit of a picture, as MNIST's authors would have prepared it.

    Args:
        grey: luminance in 0..1, float32 (height, width), dark on light or light on dark.
        see: called with the name and the picture of each step.

    Returns:
        uint8 (28, 28), white on black.

    Raises:
        ImageError: it shows no digit, several, or something else.
    """
    see("picture", grey)
    grey = crop_frame(grey)
    see("without frame", grey)
    ink, noise = flatten_light(grey)
    see("ink", ink)
    mask = threshold(ink, noise)
    see("strokes", mask)
    mask = remove_lines(remove_boxes(remove_hairlines(mask)))
    see("without lines", mask)
    digit = choose_parts(mask)
    see("digit", digit)
    refuse_shapes(digit, grey)
    image = to_mnist(cut_out(ink, digit, noise), digit)
    see("network's input", image)
    return image


# A frame, bars or padding around the picture


def crop_frame(grey: Grey) -> Grey:
    """The picture without flat borders, gallery bars, padding and closed printed boxes."""
    for _ in range(4):
        box = _inner_rectangle(_to_bytes(grey))
        if box is None:
            return grey
        left, top, width, height = box
        inner = grey[top : top + height, left : left + width]
        if np.percentile(inner, 99.5) - np.percentile(inner, 0.5) < MIN_CONTRAST:
            return grey  # a rectangle of one colour is a stroke, not a picture
        grey = inner
    return grey


def _to_bytes(grey: Grey) -> NDArray[np.uint8]:
    return np.rint(np.clip(grey, 0, 1) * 255).astype(np.uint8)


def _inner_rectangle(picture: NDArray[np.uint8]) -> Box | None:
    """The rectangle that a flat border leaves, a little reduced; None where there is no such."""
    tolerance = min(6 + 4 * _noise(picture), 16)
    inside = ~_flat_border(picture, tolerance)
    inside = cv2.morphologyEx(inside, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    contours, _ = cv2.findContours(inside, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    if not contours:
        return None
    left, top, width, height = max(
        (cv2.boundingRect(c) for c in contours), key=lambda b: b[2] * b[3]
    )
    rows, columns = picture.shape
    margin = 1 + min(width, height) // 100
    if (width, height) == (columns, rows) or min(width, height) < 0.2 * min(rows, columns):
        return None
    if not 0.25 < width / height < 4 or min(width, height) < 16 + 2 * margin:
        return None
    outline = inside[top : top + height, left : left + width]
    sides = (outline[margin], outline[-1 - margin], outline[:, margin], outline[:, -1 - margin])
    if min(side.mean() for side in sides) < 0.93 * 255:
        return None
    return left + margin, top + margin, width - 2 * margin, height - 2 * margin


def _noise(picture: Mask) -> float:
    """The standard deviation of a camera's noise (Immerkaer, 1996), with a median for the mean."""
    kernel = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32) / 6
    return 1.4826 * float(np.median(np.abs(cv2.filter2D(picture, cv2.CV_32F, kernel))))


def _flat_border(picture: Mask, tolerance: float) -> Mask:
    """What is connected to a corner and has its colour."""
    rows, columns = picture.shape
    filled = np.zeros((rows + 2, columns + 2), np.uint8)
    flags = 4 | cv2.FLOODFILL_FIXED_RANGE | cv2.FLOODFILL_MASK_ONLY | (255 << 8)
    for seed in ((0, 0), (columns - 1, 0), (0, rows - 1), (columns - 1, rows - 1)):
        if not filled[seed[1] + 1, seed[0] + 1]:
            cv2.floodFill(picture, filled, seed, 0, tolerance, tolerance, flags)
    return filled[1:-1, 1:-1]


# Light


def flatten_light(grey: Grey) -> tuple[Grey, float]:
    """Removes shadow and uneven light, and makes the strokes positive.

    Returns:
        The part of the background's light that the ink takes away, about 0 on the background and
        at most 1; and the standard deviation of the background's noise.
    """
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    colour = float(np.median(border))
    is_flat = np.mean(np.abs(border - colour) < 0.01) > 0.9  # drawn or scanned
    small = _reduced(grey)
    wide = np.full_like(small, round(255 * colour)) if is_flat else _wide_median(small)
    if _is_light_on_dark(small, wide):
        grey, colour, small = 1 - grey, 1 - colour, ~small
    background = np.full_like(grey, colour) if is_flat else _without_strokes(small, grey.shape)
    ink: Grey = 1 - grey / np.maximum(background, 0.05)
    if not is_flat and min(grey.shape) > 100:
        ink = cv2.GaussianBlur(ink, (0, 0), min(min(grey.shape) / 250, 2))
    paper, noise = _paper(ink)
    return (ink - paper).astype(np.float32), noise


def _paper(ink: Grey) -> tuple[float, float]:
    """The commonest value of the background, and the standard deviation around it.

    The deviation is that of lower values: those above it hold the edges of strokes.
    """
    levels = _to_bytes((ink + 1) / 2)
    split, _ = cv2.threshold(levels, 0, 255, cv2.THRESH_OTSU)
    counts = np.bincount(levels[levels <= split], minlength=256).astype(np.float32)
    commonest = int(np.argmax(cv2.blur(counts[None], (5, 1))))
    near = ink[np.abs(levels.astype(int) - commonest) <= 2]
    paper = float(np.median(near if near.size else ink))
    below = paper - ink[ink < paper]
    few = below.size < 0.02 * ink.size
    return paper, 0.0 if few else 1.4826 * float(np.median(below))


def _reduced(grey: Grey) -> Mask:
    rows, columns = grey.shape
    factor = max(1, -(-max(rows, columns) // 256))
    size = (-(-columns // factor), -(-rows // factor))
    return _to_bytes(cv2.resize(grey, size, interpolation=cv2.INTER_AREA))


def _wide_median(small: Mask) -> Mask:
    """What most of the picture around each pixel looks like."""
    return cv2.medianBlur(small, max(3, min(int(0.7 * min(small.shape)) | 1, 255)))


def _closed(small: Mask) -> Mask:
    """Dark strokes filled with what is around them; what is wide, as a shadow, stays."""
    side = int(WIDEST_STROKE * max(small.shape)) | 1
    padded = cv2.copyMakeBorder(small, side, side, side, side, cv2.BORDER_REPLICATE)
    closed = cv2.morphologyEx(padded, cv2.MORPH_CLOSE, np.ones((side, side), np.uint8))
    return closed[side:-side, side:-side]


def _is_light_on_dark(small: Mask, wide: Mask) -> bool:
    """Whether narrow parts that differ from their surroundings are lighter rather than darker.

    The third power gives weight to strokes over texture.
    """
    darker = np.minimum(cv2.subtract(wide, small), cv2.subtract(_closed(small), small))
    lighter = np.minimum(cv2.subtract(small, wide), cv2.subtract(_closed(~small), ~small))
    return float((lighter.astype(np.float64) ** 3).sum()) > float(
        (darker.astype(np.float64) ** 3).sum()
    )


def _without_strokes(small: Mask, shape: tuple[int, ...]) -> Grey:
    """The background of dark strokes, as large as `shape`."""
    calm = cv2.medianBlur(small, 5) if min(small.shape) > 60 else small
    smooth = cv2.blur(_closed(calm), (3, 3)).astype(np.float32) / 255
    return cv2.resize(smooth, (shape[1], shape[0]), interpolation=cv2.INTER_LINEAR)


# Strokes


def threshold(ink: Grey, noise: float) -> Mask:
    """Pixels of strokes: above half the ink's level, and what is connected and above a quarter."""
    lowest = max(4 * noise, MIN_CONTRAST / 2)
    level = _level(ink, lowest)
    if level < max(MIN_CONTRAST, 5 * noise):
        raise ImageError(BLANK)
    weak = np.where(ink > max(lowest, 0.25 * level), 255, 0).astype(np.uint8)
    count, labels = cv2.connectedComponents(weak, connectivity=8)
    strong = np.zeros(count, bool)
    strong[labels[ink > 0.5 * level]] = True
    strong[0] = False
    return np.where(strong[labels], 255, 0).astype(np.uint8)


def _level(ink: Grey, lowest: float) -> float:
    """The darkness of most of the ink: what is small, like a dark spot, does not count."""
    values = ink[ink > lowest]
    return float(np.percentile(values, 70)) if len(values) else 0.0


def remove_hairlines(mask: Mask) -> Mask:
    """Takes away what is much thinner than most strokes, as the edge of a shadow."""
    distance = cv2.distanceTransform(mask, cv2.DIST_L2, 3)
    stroke = 2 * float(np.percentile(distance[mask > 0], 90))
    size = int(stroke / 4)
    return _opened(mask, size, size) if size > 1 else mask


def remove_boxes(mask: Mask) -> Mask:
    """Takes away printed boxes that touch nothing of what they hold."""
    labels, parts = _parts(mask)
    boxes = [part.label for part in parts if _is_box(labels, part, parts)]
    return np.where(np.isin(labels, boxes), 0, mask) if boxes else mask


def remove_lines(mask: Mask) -> Mask:
    """Takes away the lines of printed boxes and forms; one line alone may be a 1, and stays."""
    rows, columns = mask.shape
    if min(rows, columns) < 40:
        return mask
    lines = _long_lines(mask)
    lines[int(0.25 * rows) : -int(0.25 * rows), int(0.25 * columns) : -int(0.25 * columns)] = 0
    for left, top, width, height in _box_outlines(mask):
        within = slice(top, top + height), slice(left, left + width)
        lines[within] |= _long_lines(mask[within])
    wider: Mask = cv2.dilate(lines, np.ones((3, 3), np.uint8))
    rest: Mask = mask & ~wider
    _, _, stats, _ = cv2.connectedComponentsWithStats(rest)
    is_left = stats[1:, cv2.CC_STAT_HEIGHT].max(initial=0) > 0.2 * rows
    is_stroke = min(cv2.boundingRect(lines)[2:]) < 0.2 * min(rows, columns)  # one line alone
    return mask if is_stroke and not is_left else rest


def _long_lines(mask: Mask) -> Mask:
    """Thin lines along most of the width or height."""
    rows, columns = mask.shape
    thick = 3 + min(rows, columns) // 40
    across = _opened(mask, int(0.75 * columns), 1)
    down = _opened(mask, 1, int(0.75 * rows))
    return _thin(across, _opened(mask, 1, thick)) | _thin(down, _opened(mask, thick, 1))


def _thin(lines: Mask, thick: Mask) -> Mask:
    """Those lines that are thin along most of their length, without where strokes cross them."""
    count, labels = cv2.connectedComponents(lines)
    total = np.bincount(labels.ravel(), minlength=count)
    thin = np.bincount(labels[thick == 0], minlength=count)
    is_thin = thin > 0.7 * total
    is_thin[0] = False
    return np.where(is_thin[labels] & (thick == 0), 255, 0).astype(np.uint8)


def _opened(mask: Mask, width: int, height: int) -> Mask:
    return cv2.morphologyEx(mask, cv2.MORPH_OPEN, np.ones((height, width), np.uint8))


def _box_outlines(mask: Mask) -> list[Box]:
    """The boxes of large parts that have ink along all four sides."""
    labels, parts = _parts(mask)
    large = [part for part in parts if part.size > 0.4 * min(mask.shape)]
    return [(p.left, p.top, p.width, p.height) for p in large if _has_four_sides(labels, p)]


# Which of the parts are the digit


@dataclass(frozen=True)
class Part:
    """One connected component: its label, box and number of pixels."""

    label: int
    left: int
    top: int
    width: int
    height: int
    area: int
    at_edge: bool

    @property
    def size(self) -> int:
        """The longer side."""
        return max(self.width, self.height)


def choose_parts(mask: Mask) -> Mask:
    """The digit's strokes: the largest part that is not cut off, and what belongs to it."""
    labels, parts = _parts(mask)
    if not parts:
        raise ImageError(BLANK)
    whole = [part for part in parts if not part.at_edge]
    largest = max(parts, key=_importance)
    main = max(whole, key=_importance, default=largest)
    if _importance(main) < 0.15 * _importance(largest):
        main = largest
    if main.size < max(5, 0.04 * max(mask.shape)):
        raise ImageError(BLANK)
    kept = _grow(labels, main, [part for part in parts if part.at_edge <= main.at_edge])
    digit = np.where(np.isin(labels, [part.label for part in kept]), 255, 0).astype(np.uint8)
    _refuse_several(kept, [part for part in parts if part not in kept])
    return digit


def _parts(mask: Mask) -> tuple[NDArray[np.int32], list[Part]]:
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    rows, columns = mask.shape
    parts = []
    for label in range(1, count):
        left, top, width, height, area = map(int, stats[label])
        at_edge = left == 0 or top == 0 or left + width == columns or top + height == rows
        parts.append(Part(label, left, top, width, height, area, at_edge))
    return labels.astype(np.int32), parts


def _importance(part: Part) -> float:
    return part.area * part.size


def _is_box(labels: NDArray[np.int32], part: Part, parts: list[Part]) -> bool:
    """Whether a part is a printed box: ink along all four sides, around another part or thin."""
    if part.size < 0.1 * min(labels.shape):
        return False
    others = (other for other in parts if other is not part)
    holds = any(_contains(part, other) and other.size > 0.2 * part.size for other in others)
    is_thin = part.area < 0.12 * part.width * part.height
    if not holds and not is_thin:
        return False
    return _has_four_sides(labels, part)


def _has_four_sides(labels: NDArray[np.int32], part: Part) -> bool:
    within = labels[part.top : part.top + part.height, part.left : part.left + part.width]
    shape, band = within == part.label, max(1, part.size // 10)
    ends = shape[:band].any(0), shape[-band:].any(0)
    sides = *ends, shape[:, :band].any(1), shape[:, -band:].any(1)
    return min(float(side.mean()) for side in sides) > 0.8


def _contains(outer: Part, inner: Part) -> bool:
    return (
        outer.left < inner.left
        and outer.top < inner.top
        and inner.left + inner.width < outer.left + outer.width
        and inner.top + inner.height < outer.top + outer.height
    )


def _grow(labels: NDArray[np.int32], main: Part, parts: list[Part]) -> list[Part]:
    """The main part and all that are near it, or near one of those, and not as small as dust."""
    kept, left = [main], [p for p in parts if p is not main and p.area > 0.02 * main.area]
    reach = 0.2 * main.size
    while left:
        region = np.where(np.isin(labels, [part.label for part in kept]), 0, 255).astype(np.uint8)
        distance = cv2.distanceTransform(region, cv2.DIST_L2, 5)
        near = [part for part in left if distance[labels == part.label].min() <= reach]
        if not near:
            break
        kept += near
        left = [part for part in left if part not in near]
    return kept


def _refuse_several(kept: list[Part], others: list[Part]) -> None:
    """Refuses a second digit: a large part away from the main one, or beside it.

    What the picture's edge cuts off may be anything, but not where the digit is cut off too.
    """
    main = kept[0]
    second = [part for part in others if part.at_edge <= main.at_edge]
    second += [part for part in kept[1:] if _is_beside(part, main)]
    if any(part.height > 0.5 * main.height and part.area > 0.25 * main.area for part in second):
        raise ImageError(SEVERAL)


def _is_beside(one: Part, other: Part) -> bool:
    """Whether two parts share next to no column and are too wide together for one digit.

    The two strokes of an open 4 are beside each other too.
    """
    left, right = min(one.left, other.left), max(one.left + one.width, other.left + other.width)
    top, end = min(one.top, other.top), max(one.top + one.height, other.top + other.height)
    shared = one.width + other.width - (right - left)
    return shared <= 0.1 * min(one.width, other.width) and right - left > WIDEST * (end - top)


def refuse_shapes(digit: Mask, grey: Grey) -> None:
    """Refuses what no pen writes: thick shapes, parts of a solid object, and tangles."""
    size = max(cv2.boundingRect(digit)[2:])
    is_thick = _stroke_width(digit) > 0.5 * size
    if is_thick or _holes(digit, size) > MOST_HOLES or _is_part_of_more(digit, grey):
        raise ImageError(CLUTTER)


def _holes(digit: Mask, size: int) -> int:
    """The number of holes in the strokes, without those of a grainy pen."""
    contours, tree = cv2.findContours(digit, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    inner = (c for c, (_, _, _, parent) in zip(contours, tree[0], strict=True) if parent >= 0)
    return sum(cv2.contourArea(contour) > max(8, 0.001 * size**2) for contour in inner)


def _is_part_of_more(digit: Mask, grey: Grey) -> bool:
    """Whether the strokes are fingers, so to speak, of something wide of one colour."""
    stroke = _stroke_width(digit)
    if stroke < max(6, 0.08 * max(cv2.boundingRect(digit)[2:])) or digit.all():
        return False
    inner = cv2.distanceTransform(digit, cv2.DIST_L2, 3) > stroke / 4
    values = grey[inner]
    middle = float(np.median(values))
    tolerance = 0.25 * abs(middle - float(np.median(grey[digit == 0])))
    if np.mean(np.abs(values - middle) < tolerance) < 0.85:
        return False
    smooth = cv2.GaussianBlur(grey, (0, 0), 1)
    same = np.where(np.abs(smooth - middle) < tolerance, 255, 0).astype(np.uint8)
    width = max(3, int(2 * stroke))
    wide = _opened(same, width, width)
    more = cv2.morphologyEx(wide | (digit & same), cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8))
    _, labels = cv2.connectedComponents(more)
    touched = np.unique(labels[(digit > 0) & (labels > 0)])
    shape = np.isin(labels, touched)
    border = np.concatenate([shape[0], shape[-1], shape[:, 0], shape[:, -1]])
    # a shadow, which may have the ink's colour too, goes on beyond the picture
    return bool(shape.sum() > 1.7 * np.count_nonzero(digit) and border.mean() < 0.12)


def _stroke_width(digit: Mask) -> float:
    """The mean width of strokes in pixels, from their pixels' distance to the background."""
    padded = cv2.copyMakeBorder(digit, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    distance = cv2.distanceTransform(padded, cv2.DIST_L2, 5)
    return max(1.0, 4 * float(distance[padded > 0].mean()) - 2)


# As in MNIST


def cut_out(ink: Grey, digit: Mask, noise: float) -> Grey:
    """The digit's ink in 0..1 without anything else; pale strokes become as dark as strong ones."""
    is_drawn_so = noise == 0 and max(ink.shape) <= IMAGE_SIZE  # the grey levels are meant
    level = float(np.percentile(ink[digit > 0], 100 if is_drawn_so else 75))
    near = cv2.dilate(digit, np.ones((3, 3), np.uint8))
    faintest = max(EDGE * level, 3 * noise)
    return np.where((near > 0) & (ink > faintest), np.clip(ink / level, 0, 1), 0).astype(np.float32)


def to_mnist(ink: Grey, digit: Mask) -> NDArray[np.uint8]:
    """What MNIST's authors did to their scans (http://yann.lecun.com/exdb/mnist).

    The digit's bounding box is scaled, aspect ratio kept, into 20 x 20 pixels, with grey levels
    from anti-aliasing, and put into 28 x 28 pixels with its centre of mass in the middle. Strokes
    thinner than MNIST's are thickened first.
    """
    left, top, width, height = cv2.boundingRect((ink > 0).astype(np.uint8))
    ink = ink[top : top + height, left : left + width]
    ink = thicken(ink, _stroke_width(digit))
    scale = DIGIT_BOX / max(ink.shape)
    height, width = (max(1, round(side * scale)) for side in ink.shape)
    if (height, width) != ink.shape:
        method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        ink = cv2.resize(ink, (width, height), interpolation=method)
    return _centred(np.clip(ink / ink.max(), 0, 1))


def thicken(ink: Grey, stroke: float) -> Grey:
    """Widens strokes that would become thinner than `MIN_STROKE` in MNIST's size."""
    scale = DIGIT_BOX / max(ink.shape)
    if stroke * scale >= MIN_STROKE:
        return ink
    finer = max(1, round(6 * scale))  # a small picture is enlarged for it
    if finer > 1:
        ink = cv2.resize(ink, None, fx=finer, fy=finer, interpolation=cv2.INTER_LINEAR)
    more = round(finer * (MIN_STROKE / scale - stroke))
    if more < 1:
        return ink
    ink = cv2.copyMakeBorder(ink, more, more, more, more, cv2.BORDER_CONSTANT, value=0)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (more + 1, more + 1))
    ink = cv2.dilate(ink, kernel)
    left, top, width, height = cv2.boundingRect((ink > EDGE).astype(np.uint8))
    return ink[top : top + height, left : left + width]


def _centred(ink: Grey) -> NDArray[np.uint8]:
    """Puts a digit of at most 20 x 20 pixels into 28 x 28, its centre of mass in the middle."""
    corner = []
    for axis, size in enumerate(ink.shape):
        mass = ink.sum(axis=1 - axis)
        centre = float((mass * np.arange(size)).sum() / mass.sum())
        corner.append(min(max(round(CENTRE - centre), 0), IMAGE_SIZE - size))
    top, left = corner
    canvas = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.float32)
    canvas[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
    return np.rint(canvas * 255).astype(np.uint8)
