"""Pictures as people take and draw them, each made from one MNIST image and a random generator.

Each function of `KINDS` and `UNTUNED` takes uint8 (28, 28), white on black, and returns a picture
of any size, uint8 (height, width) or (height, width, 3). `mnist_fast.pictures` was written with
those of `KINDS` in view. Nobody looked at those of `UNTUNED` while it was written.
"""

import cv2
import numpy as np


def enlarged(image, side):
    """The digit's ink in 0..1, float (side, side), with edges as sharp as a pen's."""
    ink = cv2.resize(image.astype(np.float32) / 255, (side, side), interpolation=cv2.INTER_CUBIC)
    return np.clip((ink - 0.5) * max(1, side / 56) + 0.5, 0, 1)


def on_paper(ink, paper=1.0, pen=0.1):
    """Luminance of ink on paper, which is a number or an array."""
    return paper * (1 - ink) + pen * ink * np.ones_like(paper)


def placed(ink, height, width, rng):
    """The ink somewhere on a sheet of height x width."""
    sheet = np.zeros((height, width), np.float32)
    top = rng.integers(0, height - ink.shape[0] + 1)
    left = rng.integers(0, width - ink.shape[1] + 1)
    sheet[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
    return sheet


def finished(grey, rng, noise=0.0):
    """Adds a camera's noise and rounds to eight bits."""
    grey = grey + rng.normal(0, noise, grey.shape) if noise else grey
    return np.rint(np.clip(grey, 0, 1) * 255).astype(np.uint8)


def uneven(shape, rng, depth=0.35):
    """Light that falls off to one side, 1 - depth to 1."""
    rows, columns = np.mgrid[0 : 1 : shape[0] * 1j, 0 : 1 : shape[1] * 1j]
    angle = rng.uniform(0, 2 * np.pi)
    slope = np.cos(angle) * rows + np.sin(angle) * columns
    return 1 - depth * (slope - slope.min()) / np.ptp(slope)


def dot(grey, rng, radius, value, place=None):
    """Draws a dot, away from the digit's place where one is given."""
    height, width = grey.shape
    for _ in range(100):
        row, column = rng.integers(0, height), rng.integers(0, width)
        if (
            place is None
            or not place[max(0, row - 3 * radius) : row + 3 * radius + 1][
                :, max(0, column - 3 * radius) : column + 3 * radius + 1
            ].any()
        ):
            break
    cv2.circle(grey, (int(column), int(row)), radius, value, -1, cv2.LINE_AA)


# Kinds that the program was written for


def page_with_a_speck(image, rng):
    side = int(rng.integers(84, 280))
    sheet = placed(enlarged(image, side), side + int(rng.integers(0, 300)), side + 120, rng)
    grey = on_paper(sheet, 1.0, rng.uniform(0, 0.4)).astype(np.float32)
    dot(grey, rng, int(rng.integers(1, 2 + side // 70)), rng.uniform(0, 0.5), sheet > 0.1)
    return finished(grey, rng)


def dust(image, rng):
    side = int(rng.integers(84, 300))
    sheet = placed(enlarged(image, side), side + 60, side + 90, rng)
    grey = on_paper(sheet, rng.uniform(0.85, 1), rng.uniform(0, 0.4)).astype(np.float32)
    for _ in range(rng.integers(10, 80)):
        dot(grey, rng, int(rng.integers(0, 2 + side // 150)), rng.uniform(0.3, 0.8))
    return finished(grey, rng, 0.01)


def _photo(image, rng, side, contrast):
    room = int(side * 1.4)
    sheet = placed(enlarged(image, side), room, room, rng)
    light = uneven(sheet.shape, rng, rng.uniform(0, 0.3)) * rng.uniform(0.6, 0.95)
    return light * (1 - contrast * sheet)


def photo_of_28(image, rng):
    grey = _photo(image, rng, 112, rng.uniform(0.3, 0.8))
    small = cv2.resize(grey, (28, 28), interpolation=cv2.INTER_AREA)
    return finished(small, rng, 0.01)


def photo_of_64_and_more(image, rng):
    side = int(rng.integers(64, 600))
    grey = _photo(image, rng, 280, rng.uniform(0.3, 0.8))
    inter = cv2.INTER_AREA if side < grey.shape[0] else cv2.INTER_CUBIC
    return finished(cv2.resize(grey, (side, side), interpolation=inter), rng, 0.015)


def shadow_across(image, rng):
    side = int(rng.integers(84, 300))
    grey = _photo(image, rng, side, rng.uniform(0.4, 0.8))
    rows, columns = np.mgrid[-1 : 1 : grey.shape[0] * 1j, -1 : 1 : grey.shape[1] * 1j]
    angle, shift = rng.uniform(0, 2 * np.pi), rng.uniform(-0.4, 0.4)
    distance = np.cos(angle) * rows + np.sin(angle) * columns + shift
    soft = rng.uniform(0.01, 0.2)
    dark = rng.uniform(0.4, 0.7)
    return finished(grey * (dark + (1 - dark) / (1 + np.exp(-distance / soft))), rng, 0.01)


def _framed(image, rng, value):
    side = int(rng.integers(84, 300))
    grey = _photo(image, rng, side, rng.uniform(0.4, 0.8))
    grey = grey + rng.normal(0, 0.01, grey.shape)
    border = int(rng.integers(2, side // 3))
    return finished(np.pad(grey, border, constant_values=value), rng)


def white_border(image, rng):
    return _framed(image, rng, 1)


def black_border(image, rng):
    return _framed(image, rng, 0)


def bars(image, rng):
    side = int(rng.integers(84, 300))
    grey = _photo(image, rng, side, rng.uniform(0.4, 0.8))
    grey = grey + rng.normal(0, 0.01, grey.shape)
    border = int(rng.integers(4, side // 2))
    sides = [(0, 0), (border, border)]
    if rng.random() < 0.5:
        sides.reverse()
    return finished(np.pad(grey, sides, constant_values=float(rng.integers(0, 2))), rng)


def printed_box(image, rng):
    side = int(rng.integers(84, 240))
    inside = side + int(rng.integers(0, side // 2))
    sheet = placed(enlarged(image, side), inside, inside + int(rng.integers(0, 60)), rng)
    line, outside = int(rng.integers(1, 2 + side // 40)), int(rng.integers(0, side // 4))
    pen, paper = rng.uniform(0, 0.4), rng.uniform(0.85, 1)
    grey = np.pad(on_paper(sheet, paper, pen), line, constant_values=rng.uniform(0, 0.5))
    grey = np.pad(grey, outside, constant_values=paper).astype(np.float32)
    if outside and rng.random() < 0.5:  # a form's lines go on
        for at in (outside, grey.shape[0] - outside - line):
            grey[at : at + line] = 0.2
        for at in (outside, grey.shape[1] - outside - line):
            grey[:, at : at + line] = 0.2
    if rng.random() < 0.5:
        turn = cv2.getRotationMatrix2D((side / 2, side / 2), rng.uniform(-3, 3), 1)
        size = grey.shape[::-1]
        grey = cv2.warpAffine(grey, turn, size, borderMode=cv2.BORDER_CONSTANT, borderValue=paper)
    return finished(grey, rng, 0.01)


def pale_pen_with_a_dark_spot(image, rng):
    side = int(rng.integers(84, 300))
    sheet = placed(enlarged(image, side), side + 40, side + 60, rng)
    paper = rng.uniform(0.8, 1)
    grey = on_paper(sheet, paper, paper - rng.uniform(0.12, 0.25)).astype(np.float32)
    if rng.random() < 0.5:  # where the pen rested
        row, column = rng.permutation(np.argwhere(sheet > 0.9))[0]
        cv2.circle(grey, (int(column), int(row)), 1 + side // 60, 0.05, -1, cv2.LINE_AA)
    else:
        dot(grey, rng, 1 + side // 60, 0.05, sheet > 0.1)
    return finished(grey, rng, 0.008)


def fragment_at_the_edge(image, rng):
    side = int(rng.integers(84, 240))
    sheet = enlarged(image, side)
    other = np.roll(enlarged(np.rot90(image), side), side // 2, int(rng.integers(0, 2)))
    keep = np.zeros_like(other)
    band = side // 14
    keep[:, :band] = keep[:, side - band :] = 1
    if rng.random() < 0.5:
        keep = keep.T
    wide = np.pad(sheet, band * 2)
    wide = np.maximum(wide, cv2.resize(other * keep, wide.shape[::-1]))
    return finished(on_paper(wide, rng.uniform(0.6, 1), 0.15), rng, 0.01)


def thin_pen(image, rng):
    side = 280
    mask = (enlarged(image, side) > 0.5).astype(np.uint8) * 255
    thin = np.zeros_like(mask)
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    while mask.any():  # the skeleton by openings
        opened = cv2.morphologyEx(mask, cv2.MORPH_OPEN, cross)
        thin |= mask & ~opened
        mask = cv2.erode(mask, cross)
    ink = cv2.dilate(thin, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5)))
    ink = cv2.GaussianBlur(ink.astype(np.float32) / 255, (0, 0), 1)
    sheet = placed(ink, side + 40, side + 40, rng)
    return finished(0.8 * uneven(sheet.shape, rng) * (1 - rng.uniform(0.3, 0.7) * sheet), rng, 0.01)


def mnist_itself(image, rng):
    return image


def mnist_dark_on_light(image, rng):
    return 255 - image


KINDS = {
    page_with_a_speck: 98.5,
    dust: 97.5,
    photo_of_28: 96.5,
    photo_of_64_and_more: 98,
    shadow_across: 95,
    white_border: 95,
    black_border: 95,
    bars: 95,
    printed_box: 90,
    pale_pen_with_a_dark_spot: 95,
    fragment_at_the_edge: 95,
    thin_pen: 90,
    mnist_itself: 98.9,
    mnist_dark_on_light: 98.9,
}


# Kinds kept aside


def ruled_paper(image, rng):
    side = int(rng.integers(140, 280))
    sheet = placed(enlarged(image, side), side + 80, side + 80, rng)
    grey = on_paper(sheet, 0.95, 0.15)
    for row in range(int(rng.integers(0, 40)), grey.shape[0], side // 3):
        grey[row : row + 2] = np.minimum(grey[row : row + 2], 0.75)
    return finished(grey, rng, 0.01)


def blackboard(image, rng):
    side = int(rng.integers(84, 300))
    sheet = placed(enlarged(image, side), side + 50, side + 90, rng)
    board = 0.25 * uneven(sheet.shape, rng, 0.5)
    smear = cv2.GaussianBlur(rng.normal(0, 1, sheet.shape), (0, 0), side / 10)
    board = board + 0.04 * smear / np.abs(smear).max()
    return finished(on_paper(sheet * rng.uniform(0.7, 1), board, 0.8), rng, 0.02)


def stained_paper(image, rng):
    side = int(rng.integers(140, 300))
    sheet = placed(enlarged(image, side), side + 100, side + 100, rng)
    stain = np.zeros_like(sheet)
    centre = tuple(int(v) for v in rng.integers(0, sheet.shape[0], 2))
    cv2.circle(stain, centre, int(rng.integers(side // 5, side // 2)), 1, -1)
    stain = cv2.GaussianBlur(stain, (0, 0), side / 40)
    return finished(on_paper(sheet, 0.95 - 0.15 * stain, 0.15), rng, 0.01)


def coloured(image, rng):
    side = int(rng.integers(84, 300))
    sheet = placed(enlarged(image, side), side + 50, side + 50, rng)[..., None]
    paper, pen = rng.uniform(0.75, 1, 3), rng.uniform(0, 0.45, 3)
    return finished(paper * (1 - sheet) + pen * sheet, rng, 0.02)


def strong_jpeg(image, rng):
    grey = finished(_photo(image, rng, int(rng.integers(84, 300)), 0.5), rng, 0.02)
    _, content = cv2.imencode(".jpg", grey, [cv2.IMWRITE_JPEG_QUALITY, 15])
    return cv2.imdecode(content, cv2.IMREAD_GRAYSCALE)


def small_on_a_large_page(image, rng):
    sheet = placed(enlarged(image, 84), 800, 600, rng)
    return finished(on_paper(sheet, 0.93, 0.2), rng, 0.01)


def blurred(image, rng):
    grey = _photo(image, rng, 200, rng.uniform(0.4, 0.8))
    return finished(cv2.GaussianBlur(grey, (0, 0), rng.uniform(2, 5)), rng, 0.01)


def figure_of_a_plotting_library(image, rng):
    axes = cv2.resize(image, (370, 370), interpolation=cv2.INTER_NEAREST)
    if rng.random() < 0.5:
        axes = 255 - axes
    axes = np.pad(axes, 1)
    page = np.full((480, 640), 255, np.uint8)
    page[52:424, 140:512] = axes
    for mark in range(140, 512, 66):
        page[424:430, mark] = 0
        cv2.putText(page, str(mark // 10), (mark - 8, 445), 0, 0.4, 0, 1, cv2.LINE_AA)
        page[mark - 80, 134:140] = 0
    cv2.putText(page, "Label: 5", (290, 40), 0, 0.6, 0, 1, cv2.LINE_AA)
    return page


UNTUNED = [
    ruled_paper,
    blackboard,
    stained_paper,
    coloured,
    strong_jpeg,
    small_on_a_large_page,
    blurred,
    figure_of_a_plotting_library,
]


# What is not one digit


def several_digits(images, rng):
    """Two to four digits in a row on paper."""
    side = int(rng.integers(84, 200))
    row = np.hstack([enlarged(image, side) for image in images[: rng.integers(2, 5)]])
    sheet = placed(row, side + 40, row.shape[1] + 40, rng)
    return finished(on_paper(sheet, rng.uniform(0.7, 1) * uneven(sheet.shape, rng), 0.1), rng, 0.01)


def close_digits(images, rng):
    """Two digits as near to each other as those of a number."""
    side = int(rng.integers(84, 200))
    row = number(images[rng.permutation(len(images))[:2]], side, rng)
    sheet = placed(row, side + 80, row.shape[1] + 80, rng)
    return finished(on_paper(sheet, rng.uniform(0.7, 1) * uneven(sheet.shape, rng), 0.1), rng, 0.01)


def cropped_number(images, rng):
    """A number of two digits, cut out to its ink."""
    row = number(images[rng.permutation(len(images))[:2]], int(rng.integers(84, 200)), rng)
    rows = np.flatnonzero(row.max(1) > 0.3)
    return finished(on_paper(row[rows[0] : rows[-1] + 1], 0.9, 0.1), rng, 0)


def number(images, side, rng):
    """The ink of digits in a row, without the columns around it."""
    digits = [enlarged(image, side) for image in images]
    columns = [np.flatnonzero(digit.max(0) > 0.3) for digit in digits]
    digits = [d[:, c[0] : c[-1] + 1] for d, c in zip(digits, columns, strict=True)]
    gap = np.zeros((side, int(side * rng.uniform(0.04, 0.1))), np.float32)
    return np.hstack([part for digit in digits for part in (gap, digit)][1:])


def hand(images, rng):
    """A hand with spread fingers before a wall."""
    picture = np.full((300, 300), rng.uniform(0.6, 0.95), np.float32)
    skin = float(rng.uniform(0.3, 0.5))
    palm = (150 + int(rng.integers(-20, 20)), 200)
    cv2.ellipse(picture, palm, (55, 60), 0, 0, 360, skin, -1, cv2.LINE_AA)
    cv2.rectangle(picture, (palm[0] - 35, 240), (palm[0] + 35, 300), skin, -1)
    for angle in np.linspace(-1.1, 0.8, 5)[: rng.integers(2, 6)]:
        tip = (palm[0] + int(130 * np.sin(angle)), palm[1] - int(150 * np.cos(angle)))
        cv2.line(picture, palm, tip, skin, 26, cv2.LINE_AA)
    texture = cv2.GaussianBlur(rng.normal(0, 1, picture.shape), (0, 0), 6)
    return finished(cv2.GaussianBlur(picture, (0, 0), 1) + 0.2 * texture, rng, 0.015)


def clutter(images, rng):
    """Lines of all lengths and directions, everywhere."""
    picture = np.full((300, 300), 0.9, np.float32)
    for _ in range(60):
        start, stop = (tuple(int(v) for v in rng.integers(0, 300, 2)) for _ in range(2))
        cv2.line(picture, start, stop, float(rng.uniform(0, 0.6)), 3, cv2.LINE_AA)
    return finished(picture, rng, 0.01)


def blank_paper(images, rng):
    shape = tuple(rng.integers(28, 400, 2))
    return finished(0.85 * uneven(shape, rng), rng, rng.uniform(0.003, 0.03))


def blank_paper_with_dust(images, rng):
    grey = np.full((300, 240), 0.95, np.float32)
    for _ in range(rng.integers(1, 60)):
        dot(grey, rng, int(rng.integers(0, 3)), rng.uniform(0.3, 0.8))
    return finished(grey, rng, 0.01)


def empty_box(images, rng):
    return printed_box(np.zeros((28, 28), np.uint8), rng)


def empty_shadow(images, rng):
    return shadow_across(np.zeros((28, 28), np.uint8), rng)


NO_DIGIT = [
    several_digits,
    close_digits,
    cropped_number,
    hand,
    clutter,
    blank_paper,
    blank_paper_with_dust,
    empty_box,
    empty_shadow,
]
