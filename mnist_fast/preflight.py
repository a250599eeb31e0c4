"""Names each library that is missing or broken, in one line each, instead of a traceback.

    python -m mnist_fast.preflight [--quick] [LIBRARY ...]

Exit status: 0 all there, 2 otherwise. `make setup` runs it; other programs may call
`missing_libraries`. Only the standard library is imported at the top, so that this file runs
wherever Python does.
"""

import argparse
import ctypes
import importlib
import importlib.machinery
import importlib.util
import re
import sys
from collections.abc import Iterable
from pathlib import Path

# Import name -> name of the Python package.
LIBRARIES = {
    "torch": "torch",
    "torchvision": "torchvision",
    "accelerate": "accelerate",
    "numba": "numba",
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "ffcv": "ffcv",
    "wandb": "wandb",
    "jsonargparse": "jsonargparse",
    "yaml": "pyyaml",
    "psutil": "psutil",
    "safetensors": "safetensors",
    "matplotlib": "matplotlib",
    "sklearn": "scikit-learn",
}

# Beginning of a shared library's name -> Debian package, or what else brings it.
SHARED_LIBRARIES = {
    "libopencv_": "libopencv-dev",
    "libturbojpeg.so": "libturbojpeg0-dev",
    "libgomp.so": "libgomp1",
    "libstdc++.so": "libstdc++6",
    "libGL.so": "libgl1",
    "libgthread-2.0.so": "libglib2.0-0",
}

_NO_SHARED_LIBRARY = re.compile(r"(lib[^\s:/]+\.so[^\s:]*): cannot open shared object file")


def missing_libraries(libraries: Iterable[str] = LIBRARIES, *, quick: bool = False) -> list[str]:
    """Return one line per missing or broken library, each with what to do; none if all is well.

    Args:
        libraries: import names, from `LIBRARIES`.
        quick: only look for the packages and load FFCV's compiled part (well under a second),
            instead of importing everything (about ten seconds).
    """
    lines = [] if (3, 11) <= sys.version_info[:2] <= (3, 13) else [_unsupported_python()]
    check = _find if quick else _import
    for name in libraries:
        try:
            check(name)
        except Exception as error:  # whatever a broken library raises, the caller gets one line
            lines.append(_explain(name, error))
    return lines


def _import(name: str) -> None:
    importlib.import_module(name)


def _find(name: str) -> None:
    """Look `name` up without importing it; load FFCV's compiled part for its system libraries."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:  # no origin: an empty folder
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    if name == "ffcv":
        folder = Path(spec.origin).parent
        suffixes = importlib.machinery.EXTENSION_SUFFIXES
        compiled = [path for s in suffixes if (path := folder / f"_libffcv{s}").exists()]
        if not compiled:
            raise ImportError("it has no compiled part for this Python")
        ctypes.CDLL(str(compiled[0]))


def _explain(name: str, error: Exception) -> str:
    package = LIBRARIES.get(name, name)
    text = " ".join(str(error).split()) or type(error).__name__
    if found := _NO_SHARED_LIBRARY.search(text):
        return _explain_shared_library(package, found.group(1))
    if isinstance(error, ModuleNotFoundError) and error.name:
        absent = error.name.split(".")[0]
        if absent == name:
            return f"the Python package {package} is missing: run 'make setup'"
        absent = LIBRARIES.get(absent, absent)
        return f"the Python package {absent}, which {package} needs, is missing: run 'make setup'"
    if "torchvision::nms" in text:
        return (
            "torchvision does not fit torch (one is a CPU build, the other a CUDA build):"
            " run 'make setup' instead of installing one of them by hand"
        )
    return f"the Python package {package} is broken ({text[:200]}): run 'make setup'"


def _explain_shared_library(package: str, library: str) -> str:
    for beginning, debian in SHARED_LIBRARIES.items():
        if library.startswith(beginning):
            remedy = f"run 'sudo apt-get install {debian}'"
            if package == "ffcv":
                remedy += ", or without root install the wheel of scripts/build_ffcv_wheel.sh"
            return f"the system library {library}, which {package} needs, is missing: {remedy}"
    if library.startswith("libcuda.so"):
        return f"{library}, which {package} needs, is missing: install the NVIDIA driver"
    return (
        f"the shared library {library}, which {package} needs, is missing: run 'make setup',"
        " or install the system package that holds it"
    )


def _unsupported_python() -> str:
    version = ".".join(map(str, sys.version_info[:2]))
    return f"Python {version} is not supported (3.11, 3.12 and 3.13 are): run 'make setup'"


def main() -> int:
    """Print the lines of `missing_libraries` and return the exit status."""
    parser = argparse.ArgumentParser(description="Names each missing or broken library.")
    parser.add_argument("--quick", action="store_true", help="look without importing everything")
    parser.add_argument("libraries", nargs="*", metavar="LIBRARY", help=", ".join(LIBRARIES))
    arguments = parser.parse_args()
    lines = missing_libraries(arguments.libraries or LIBRARIES, quick=arguments.quick)
    for line in lines:
        print(f"preflight: {line}", file=sys.stderr)
    return 2 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
