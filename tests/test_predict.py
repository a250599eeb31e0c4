"""Reading digits from image files: preprocessing, every kind of image, and hostile input."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
import zlib

import helpers
import numpy as np
import pytest
import torch
from drawn_pictures import blank_paper, clutter, several_digits
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from data_prep.sources import load_digits
from mnist_fast import picture_files
from mnist_fast import predict as module
from mnist_fast.checkpoint import digest
from mnist_fast.errors import InputError, run_main
from mnist_fast.model import build_network
from mnist_fast.predict import ImageError, classify, find_sources, load_network, read_image
from mnist_fast.sheet import CELL


def seven(size=(300, 400), ink=0, paper=255, mode="L"):
    """A large seven, off the centre."""
    image = Image.new(mode, size, paper)
    line = [(120, 60), (220, 60), (150, 330)]
    ImageDraw.Draw(image).line(line, fill=ink, width=28, joint="curve")
    return image


def encoded(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def plain():
    """What the seven looks like to the network."""
    return read_image(encoded(seven()))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights of an untrained network, in a folder like a run's."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    state = {k: v.contiguous() for k, v in build_network().state_dict().items()}
    details = {"network": "notebook", "dataset": "digits"}
    save_file(state, folder / "weights.safetensors", metadata=details)
    return folder


# Preprocessing


def test_the_digit_fills_a_20_pixel_box_with_its_mass_in_the_middle(plain):
    assert plain.shape == (28, 28)
    assert plain.dtype == np.uint8
    rows, columns = np.flatnonzero(plain.any(1)), np.flatnonzero(plain.any(0))
    assert rows[-1] - rows[0] + 1 == 20
    assert columns[-1] - columns[0] + 1 < 14  # the aspect ratio is kept
    index = np.arange(28)
    assert (plain.sum(1) * index).sum() / plain.sum() == pytest.approx(14, abs=0.5)
    assert (plain.sum(0) * index).sum() / plain.sum() == pytest.approx(14, abs=0.5)
    assert plain.max() == 255


def transparent(ink, paper=(0, 0, 0, 0)):
    return seven(ink=ink, paper=paper, mode="RGBA")


def soft(ink):
    """Strokes whose edges are of every grey, on a transparent index of a palette."""
    paper = 255 - ink
    grey = seven(ink=ink, paper=paper).resize((90, 120), Image.Resampling.LANCZOS)
    alpha = grey.point(lambda value: 255 if value != paper else 0)
    picture = grey.convert("RGBA")
    picture.putalpha(alpha)
    return picture


def sixteen_bit():
    grey = np.asarray(seven(), np.uint16) * 257
    return Image.fromarray(grey)


def turned():
    """Stored on its side, with the camera's note."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(seven().transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif, quality=95)


KINDS = {
    "light on dark": lambda: encoded(seven(ink=255, paper=0)),
    "low contrast": lambda: encoded(seven(ink=120, paper=180)),
    "one bit": lambda: encoded(seven().convert("1")),
    "palette": lambda: encoded(seven().convert("P")),
    "colour": lambda: encoded(seven(ink=(200, 0, 0), paper=(255, 255, 200), mode="RGB")),
    "16 bit": lambda: encoded(sixteen_bit()),
    "jpeg": lambda: encoded(seven(), "JPEG", quality=90),
    "cmyk": lambda: encoded(seven(paper=(255, 255, 255), mode="RGB").convert("CMYK"), "JPEG"),
    "dark strokes, transparent": lambda: encoded(transparent((0, 0, 0, 255))),
    "light strokes, transparent": lambda: encoded(transparent((255, 255, 255, 255))),
    "soft dark strokes, transparent": lambda: encoded(soft(0)),
    "soft light strokes, transparent": lambda: encoded(soft(255)),
    "a card, transparent": lambda: encoded(transparent((0, 0, 0, 255), (255, 255, 255, 254))),
    "camera rotation": turned,
    "large": lambda: encoded(seven().resize((3000, 4000))),
    "small": lambda: encoded(seven().resize((60, 80), Image.Resampling.LANCZOS)),
    "on a wide sheet": lambda: encoded(on_a_sheet()),
    "noisy": lambda: encoded(noisy()),
}


def on_a_sheet():
    sheet = Image.new("L", (900, 500), 255)
    sheet.paste(seven(), (500, 50))
    return sheet


def noisy():
    noise = np.random.default_rng(0).normal(0, 5, (400, 300))
    pixels = np.asarray(seven(ink=40, paper=200), np.float32) + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_looks_the_same(kind, plain):
    image = read_image(KINDS[kind]())
    # the mean difference of unrelated digits is about 40; one of a seven shifted by a pixel, 19
    assert np.abs(image.astype(int) - plain).mean() < 9, kind


def test_what_is_like_mnist_already_only_moves():
    for image in load_digits().test_images[:20]:
        moved = read_image(encoded(Image.fromarray(np.roll(image, (2, -1), (0, 1)))))
        straight = read_image(encoded(Image.fromarray(image)))
        assert np.array_equal(moved, straight)
        # the same grey levels, stretched to 255, but for edges too faint to count
        levels = np.sort(image * (255 / image.max()), axis=None)[-100:]
        assert np.sort(straight, axis=None)[-100:] == pytest.approx(levels, abs=2)


# Faults


def bomb(width, height):
    """A PNG of so many pixels in a few hundred bytes, without its content."""

    def chunk(kind, body):
        checksum = zlib.crc32(kind + body).to_bytes(4, "big")
        return len(body).to_bytes(4, "big") + kind + body + checksum

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


FAULTS = {
    "empty": (b"", "empty file"),
    "text": (b"#!/bin/sh\nrm -rf /\n", "not an image"),
    "truncated gif": (encoded(seven(), "GIF")[:300], "damaged"),
    "truncated webp": (encoded(noisy(), "WEBP")[:300], "damaged|not an image"),
    "truncated tiff": (encoded(noisy(), "TIFF")[:3000], "damaged|not an image"),
    "truncated bmp": (encoded(noisy(), "BMP")[:3000], "damaged"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    "truncated png": (encoded(noisy())[:2000], "damaged"),
    "truncated jpeg": (encoded(noisy(), "JPEG")[:900], "damaged"),
    "header alone": (encoded(seven())[:16], "not an image|damaged"),
    "flipped bytes": (encoded(noisy())[:500] + b"\xff" * 99 + encoded(noisy())[599:], "damaged"),
    "bomb": (bomb(12_000, 8_000), "12000 x 8000 pixels: more than 64 million"),
    "huge bomb": (bomb(30_000, 30_000), "more than 64 million pixels"),
    "blank": (encoded(Image.new("L", (50, 50), 255)), "blank"),
    "one pixel": (encoded(Image.new("L", (1, 1), 0)), "blank"),
    "noise alone": (
        encoded(Image.fromarray(np.random.default_rng(0).integers(118, 138, (99, 99), np.uint8))),
        "blank",
    ),
    "nothing visible": (encoded(Image.new("RGBA", (9, 9), (0, 0, 0, 0))), "transparent"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_image_is_one_line(name, tmp_path):
    content, message = FAULTS[name]
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=message) as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for name, message in {
        tmp_path / "pipe.png": "not a regular file",
        "/dev/zero": "not a regular file",
        tmp_path / "missing.png": "No such file",
        tmp_path / ("x" * 300): "name too long",
    }.items():
        with pytest.raises(ImageError, match=message):
            read_image(module.Path(name))


def test_bad_images_do_not_stop_the_others(weights, tmp_path, capsys):
    for name, (content, _) in FAULTS.items():
        (tmp_path / f"{name}.png").write_bytes(content)
    for name in ("a.png", "b.JPG", "z\n\x1b[31m.png"):
        (tmp_path / name).write_bytes(encoded(seven(), "JPEG" if "JPG" in name else "PNG"))
    (tmp_path / "notes.txt").write_text("no image, and said to be none")
    assert module.main([str(weights), str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == len(FAULTS) + 1
    assert len(said.out.splitlines()) == 3
    assert "\x1b" not in said.out


# The network


def test_the_answer_is_the_networks(weights, plain):
    network, details = load_network(weights)
    assert details["dataset"] == "digits"
    (answer,) = classify(network, [("x", encoded(seven()))])
    with torch.inference_mode():
        pixels = (torch.from_numpy(plain)[None, None] / 255 - 0.1307) / 0.3081
        expected = network(pixels)[0].exp()
    assert answer["digit"] == int(expected.argmax())
    assert answer["probability"] == pytest.approx(float(expected.max()), abs=1e-6)
    assert answer["probabilities"] == pytest.approx(expected.tolist(), abs=1e-6)


def pickled(path):
    torch.save({"weights": torch.zeros(3)}, path)


def truncated(path):
    whole = path.parent / "whole"
    save_file(build_network().state_dict(), whole, metadata={"network": "notebook"})
    path.write_bytes(whole.read_bytes()[:-50])


def of_another_network(path):
    save_file(build_network("record").state_dict(), path, metadata={"network": "notebook"})


def damaged(path):
    state = build_network().state_dict()
    save_file(state, path, metadata={"network": "notebook", "sha256": digest(state)})
    content = bytearray(path.read_bytes())
    content[20_000] ^= 1
    path.write_bytes(content)


def not_finite(path):
    state = build_network().state_dict()
    next(iter(state.values())).fill_(float("nan"))
    save_file(state, path, metadata={"network": "notebook"})


@pytest.mark.parametrize(
    "write, message",
    [
        (pickled, "not a whole safetensors file"),
        (truncated, "not a whole safetensors file"),
        (of_another_network, "not the weights of the network notebook"),
        (damaged, "its checksum differs"),
        (not_finite, "not a finite number"),
        (lambda path: save_file({"x": torch.zeros(1)}, path), "no weights of one of the networks"),
        (lambda path: path.write_bytes(b""), "not a whole safetensors file"),
        (lambda path: None, "No such file"),
        (os.mkfifo, "plain file"),
    ],
)
def test_bad_weights_are_refused(write, message, tmp_path):
    path = tmp_path / "weights.safetensors"
    write(path)
    with pytest.raises(InputError, match=message) as caught:
        load_network(path)
    assert len(str(caught.value)) < len(str(path)) + 200


def test_weights_that_give_no_number_are_an_error(tmp_path, capsys):
    state = build_network().state_dict()
    state["layers.0.weight"].fill_(3e38)
    save_file(state, tmp_path / "weights.safetensors", metadata={"network": "notebook"})
    (tmp_path / "one.png").write_bytes(encoded(seven()))
    for options in ([], ["--json"]):
        with pytest.raises(InputError, match="no finite probabilities"):
            module.main([str(tmp_path), str(tmp_path / "one.png"), *options])
        assert capsys.readouterr().out == ""


# The command

PROGRAM = (sys.executable, "-W", "ignore", "-m", "mnist_fast.predict")


def command(*arguments, given=b"", cwd, **environment):
    """`python -m mnist_fast.predict`: exit status, output and error lines."""
    done = subprocess.run(
        [*PROGRAM, *map(str, arguments)],
        input=given,
        capture_output=True,
        timeout=100,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(helpers.ROOT), **environment},
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode().splitlines()


def test_a_name_that_the_terminal_cannot_show_is_escaped(weights, tmp_path):
    (tmp_path / "größe.png").write_bytes(encoded(seven()))
    status, output, errors = command(weights, "größe.png", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert (status, errors) == (0, [])
    assert output.startswith(r"gr\xf6\xdfe.png")


def test_the_command_reads_names_from_standard_input_and_gives_json(weights, tmp_path):
    (tmp_path / "one.png").write_bytes(encoded(seven()))
    names = b"one.png\nmissing.png\n\n"
    status, out, errors = command(weights, "-", "--json", given=names, cwd=tmp_path)
    good, bad = json.loads(out)
    assert status == 1
    assert good["file"] == "one.png"
    assert sum(good["probabilities"]) == pytest.approx(1, abs=1e-5)
    assert bad == {"file": "missing.png", "error": "No such file or directory"}
    assert errors == ["python -m mnist_fast.predict: missing.png: No such file or directory"]


def test_bad_weights_end_the_command_with_status_2_and_one_line(tmp_path, capsys):
    arguments = [str(tmp_path / "none"), "x.png"]
    assert run_main(lambda: module.main(arguments), module.PROGRAM) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m mnist_fast.predict: error: ")


def test_an_image_on_standard_input(weights, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(encoded(seven())))
    monkeypatch.setattr("sys.stdin", stream)
    ((name, content),) = find_sources(["-"])
    assert name == "standard input"
    assert read_image(content).shape == (28, 28)


def test_a_folder_without_images_gets_its_line(weights, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "one.png").write_bytes(encoded(seven()))
    assert module.main([str(weights), str(tmp_path / "empty"), str(tmp_path / "one.png")]) == 1
    said = capsys.readouterr()
    assert said.err.endswith("empty: folder without files\n")
    assert len(said.out.splitlines()) == 1


def test_no_image_is_bad_usage(weights):
    with pytest.raises(InputError, match="--help"):
        module.main([str(weights)])


def test_an_empty_standard_input_gets_its_line(weights, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    assert module.main([str(weights), "-"]) == 1
    assert capsys.readouterr().err.endswith("standard input: empty file\n")


FORMS = ["BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000", "ICO", "PCX"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_told_by_its_content(form, plain, tmp_path):
    (tmp_path / "named.png").write_bytes(encoded(seven((240, 240)), form))
    expected = read_image(encoded(seven((240, 240))))
    found = read_image(tmp_path / "named.png")
    assert np.abs(found.astype(int) - expected).mean() < 9


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_every_mode_is_read_also_from_large_files(mode, plain):
    image = seven().resize((1200, 1600))
    if mode in ("I;16", "F"):
        values = np.asarray(image)
        deep = values.astype(np.uint16) * 257 if mode == "I;16" else values.astype(np.float32) / 255
        image = Image.fromarray(deep)
    else:
        image = image.convert("RGB" if mode in ("CMYK", "YCbCr") else "L").convert(mode)
    assert np.abs(read_image(encoded(image, "TIFF")).astype(int) - plain).mean() < 9


@pytest.mark.parametrize("form", ["BMP", "GIF", "TIFF", "WEBP"])
def test_every_form_is_read_from_standard_input(form, weights, monkeypatch, capsys):
    stream = io.TextIOWrapper(io.BytesIO(encoded(seven(), form)))
    monkeypatch.setattr("sys.stdin", stream)
    assert module.main([str(weights), "-"]) == 0
    assert capsys.readouterr().out.startswith("standard input  ")


def test_a_heic_image_names_the_package_that_reads_it(monkeypatch):
    monkeypatch.setattr(picture_files, "_formats", lambda: ("PNG", "JPEG"))
    with pytest.raises(ImageError, match="HEIC image: install pillow-heif"):
        read_image(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99))


def test_in_a_folder_only_resource_forks_and_thumbnails_are_left_out(tmp_path):
    kept = ["a.png", "b.HEIC", "notes.txt", "no_suffix", "sub/c.webp", ".hidden.png"]
    left_out = ["._a.png", ".DS_Store", "Thumbs.db", "__MACOSX/._a.png", "@eaDir/a.png/x.jpg"]
    for name in [*kept, *left_out]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = [os.path.relpath(name, tmp_path) for name, _ in find_sources([str(tmp_path)])]
    assert sorted(found) == sorted(kept)


def test_links_to_folders_are_followed_once(tmp_path):
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "folder"
    for place in (elsewhere, folder):
        place.mkdir()
        (place / "a.png").write_bytes(b"x")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "itself").symlink_to(folder)
    (elsewhere / "back").symlink_to(folder)
    found = [name for name, _ in find_sources([str(folder)])]
    assert found == [f"{folder}/a.png", f"{folder}/linked/a.png"]


def test_a_folder_that_cannot_be_read_gets_its_line(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    (tmp_path / "a.png").write_bytes(b"x")
    scan, listdir = os.scandir, os.listdir

    def refuse(action):
        def act(path):
            if str(path).endswith("locked"):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return action(path)

        return act

    monkeypatch.setattr(os, "scandir", refuse(scan))
    monkeypatch.setattr(os, "listdir", refuse(listdir))
    found = [path for _, path in find_sources([str(tmp_path)])]
    assert found == [tmp_path / "a.png", tmp_path / "locked"]
    with pytest.raises(ImageError, match=r"^Permission denied$"):
        picture_files.read_grey(found[1])


@pytest.mark.parametrize("form", ["GIF", "TIFF", "WEBP", "PNG"])
def test_of_several_pages_none_is_guessed(form, tmp_path):
    pages = [Image.new("L", (40, 40), value) for value in (0, 90, 255)]
    pages[0].save(tmp_path / "pages", format=form, save_all=True, append_images=pages[1:])
    with pytest.raises(ImageError, match=r"^3 pages: save the one that is meant by itself$"):
        picture_files.read_grey(tmp_path / "pages")


def test_a_camera_s_second_picture_is_no_page(tmp_path):
    pages = [Image.new("RGB", (40, 40), value) for value in ("white", "red")]
    pages[0].save(tmp_path / "pages", format="MPO", save_all=True, append_images=pages[1:])
    assert picture_files.read_grey(tmp_path / "pages").min() > 0.9


def test_twelve_bits_in_a_file_of_sixteen_are_bright_enough(plain):
    grey = (np.asarray(seven(), np.uint16) // 255 * 2000 + 1000).astype(np.uint16)
    assert np.abs(read_image(encoded(Image.fromarray(grey))).astype(int) - plain).mean() < 9


def test_what_is_not_one_digit_is_said(weights, tmp_path, capsys):
    rng = np.random.default_rng(0)
    images = load_digits().test_images[:4]
    for kind in (several_digits, clutter, blank_paper):
        Image.fromarray(kind(images, rng)).save(tmp_path / f"{kind.__name__}.png")
    assert module.main([str(weights), str(tmp_path), "--json"]) == 1
    said = {os.path.basename(r["file"]): r["error"] for r in json.loads(capsys.readouterr().out)}
    assert said["several_digits.png"].startswith("several digits")
    assert said["clutter.png"].startswith("no digit")
    assert said["blank_paper.png"].startswith("blank")


# The sheet


def test_the_sheet_has_a_row_for_each_picture(weights, tmp_path, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "good.png").write_bytes(encoded(seven()))
    (pictures / "bad.png").write_bytes(b"x")
    sheet = tmp_path / "sheet.png"
    assert module.main([str(weights), str(pictures), "--sheet", str(sheet)]) == 1
    with Image.open(sheet) as image:
        drawn = np.asarray(image.convert("L"))
    assert drawn.shape[0] == 24 + 2 * CELL
    background = drawn[-1, -1]
    bad, good = drawn[24 : 24 + CELL], drawn[24 + CELL :]
    assert (bad[:, : 6 * CELL] == background).all()
    for column in range(7):  # each step has drawn something
        assert np.ptp(good[:, column * CELL : (column + 1) * CELL]) > 100


@pytest.mark.parametrize("name", ["sheet.jpg", "missing/sheet.png", "folder.png", "mine.png"])
def test_a_sheet_that_cannot_be_written_is_bad_usage(name, weights, tmp_path):
    """Nor does it replace a file: the shell may put a picture in its place."""
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "mine.png").write_bytes(encoded(seven()))
    with pytest.raises(InputError, match="--sheet"):
        module.main([str(weights), "x.png", "--sheet", str(tmp_path / name)])


def test_a_closed_standard_input_is_bad_usage(weights, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)  # what Python makes of <&-
    with pytest.raises(InputError, match="standard input is closed"):
        module.main([str(weights), "-"])


@pytest.mark.parametrize("option", [(), ("--json",)])
def test_a_full_disk_for_the_output_is_one_line(option, weights, tmp_path):
    (tmp_path / "one.png").write_bytes(encoded(seven()))
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*PROGRAM, str(weights), str(tmp_path / "one.png"), *option],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=100,
            cwd=helpers.ROOT,
        )
    assert done.returncode == 1
    assert done.stderr == f"{module.PROGRAM}: error: standard output: No space left on device\n"


def test_ctrl_c_leaves_no_traceback(weights):
    process = subprocess.Popen(
        [*PROGRAM, str(weights), "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=helpers.ROOT,
    )
    try:
        deadline = time.monotonic() + 60
        while "/numpy/" not in module.Path(f"/proc/{process.pid}/maps").read_text():
            assert time.monotonic() < deadline  # it imports
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == (b"", b"")
        assert process.returncode == -signal.SIGINT
    finally:
        process.kill()
