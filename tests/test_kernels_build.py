"""Compiled code in the homes that people have, and what Python and the kernels share."""

import re
import shutil
import subprocess

import pytest
from helpers import ROOT

from mnist_fast.kernels import abi, build

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler (g++)"),
]
KERNELS = ROOT / "mnist_fast" / "kernels"


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "code.cpp"
    path.write_text('extern "C" int answer() { return 42; }\n')
    return path


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home of the test's own, with no XDG_CACHE_HOME; and an empty folder for temporary files."""
    folder, temporary = tmp_path / "home", tmp_path / "temporary"
    folder.mkdir()
    temporary.mkdir()
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(build.tempfile, "tempdir", None)  # it is read once
    return folder


@pytest.fixture
def mounted():
    """Mounts file systems, and takes them away again."""
    done = []

    def mount(folder, options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("may not mount file systems")
        done.append(folder)

    yield mount
    for folder in done:  # lazily: what was loaded from there may still be in use
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def files_in(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_code_is_kept_in_the_users_cache(source, home):
    assert build.load_cpp(source, []).answer() == 42
    (path,) = files_in(home)
    assert path.parent == home / ".cache" / "mnist_fast" / "cpu"


def test_xdg_cache_home_comes_first(source, home, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert build.load_cpp(source, []).answer() == 42
    assert files_in(tmp_path / "elsewhere")
    assert not files_in(home)


@pytest.mark.parametrize(
    "options", ["size=4k", "size=1m,noexec", "size=1m,ro"], ids=["full", "noexec", "read-only"]
)
def test_a_home_that_takes_or_runs_no_code_is_done_without(source, home, mounted, options):
    mounted(home, options)
    if "4k" in options:
        with pytest.raises(OSError, match="No space left"):
            (home / "ballast").write_bytes(bytes(64_000))
    assert build.load_cpp(source, []).answer() == 42
    assert not files_in(home.parent / "temporary")  # and nothing is left behind


def test_without_a_home_it_is_compiled_for_the_process(source, home, monkeypatch):
    monkeypatch.setenv("HOME", "/nonexistent/home")
    assert build.load_cpp(source, []).answer() == 42
    assert not files_in(home.parent / "temporary")


def test_the_reason_given_is_the_true_one(source, home, mounted):
    """Not that of the linker, which only says that it failed."""
    mounted(home, "size=4k")
    mounted(home.parent / "temporary", "size=4k")
    with pytest.raises(build.BuildError, match="No space left on device"):
        build.load_cpp(source, [])


def test_a_compilers_error_is_one_line(source, home):
    source.write_text("this is not C++\n")
    with pytest.raises(build.BuildError, match=": error: ") as caught:
        build.load_cpp(source, [])
    assert len(str(caught.value).splitlines()) == 1


# Structs


def fields_of(text, name):
    """Names of a C++ struct's data members, in their order."""
    body = re.search(rf"struct {name} {{(.*?)\n}};", text, re.DOTALL)[1].split("\n\n")[0]
    body = re.sub(r"//[^\n]*|\b(const|unsigned)\b", "", body)
    found = []
    for statement in body.split(";"):
        names = statement.strip().split(maxsplit=1)[1:]  # behind the type
        found += [part.strip().lstrip("*").strip() for part in ",".join(names).split(",")]
    return [field for field in found if field]


@pytest.mark.parametrize(
    ("file", "name", "struct"),
    [
        ("augment.h", "Ranges", abi.Ranges),
        ("cpu.cpp", "Layer", abi.Layer),
        ("cpu.cpp", "TrainArguments", abi.TrainArguments),
        ("cpu.cpp", "PredictArguments", abi.PredictArguments),
        ("cpu.cpp", "AugmentArguments", abi.AugmentArguments),
        ("hopper.cu", "HopperArguments", abi.HopperArguments),
    ],
)
def test_both_sides_have_the_same_fields(file, name, struct):
    text = (KERNELS / file).read_text()
    assert fields_of(text, name) == [field for field, _ in struct._fields_]


def test_both_kernels_have_the_same_layers():
    text = (KERNELS / "hopper.cu").read_text()
    assert fields_of(text, "Layer") == [field for field, _ in abi.LAYER_SHAPE]
