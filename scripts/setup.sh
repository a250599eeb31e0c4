#!/usr/bin/env bash
# Brings this machine and .venv to where everything runs: uv, the system libraries that FFCV is built against, the
# locked environment, and a check that every library imports. The second time it only compares a stamp: no network.
#
#   UV_PYTHON=3.12 scripts/setup.sh      another Python (3.11-3.13)
#   FFCV_WHEEL=ffcv-...whl scripts/setup.sh
#                                        a self-contained FFCV (scripts/build_ffcv_wheel.sh), for users who are not root
set -euo pipefail
cd -P "$(dirname "$0")/.."
unset VIRTUAL_ENV # uv would warn about another active environment
export UV_PROJECT_ENVIRONMENT=.venv
stamp=.venv/.setup-stamp # line 1: the folder it was made for, line 2: what it was made from
wheels=.tools/wheels

say() { printf 'setup: %s\n' "$*"; }
die() {
  printf 'setup: %s\n' "$*" >&2
  exit 2
}

made_from() {
  {
    printf '%s\n' "${UV_PYTHON:-}"
    cat pyproject.toml uv.lock
    [[ ! -d $wheels ]] || (cd "$wheels" && find . -name 'ffcv-*.whl' -exec sha256sum {} + | sort)
  } | sha256sum | cut -d' ' -f1
}

python_works() {
  .venv/bin/python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

up_to_date() {
  [[ -f $stamp ]] && [[ $(<"$stamp") == "$PWD"$'\n'"$(made_from)" ]] &&
    .venv/bin/python -m mnist_fast.preflight --quick >/dev/null 2>&1
}

discard_broken_environment() {
  [[ -e .venv || -L .venv ]] || return 0
  if ! python_works; then
    say "replacing a broken .venv"
    rm -rf .venv
  elif [[ -f $stamp && $(head -n 1 "$stamp") != "$PWD" ]]; then
    say "replacing a .venv that was made for $(head -n 1 "$stamp")"
    rm -rf .venv
  else
    rm -f "$stamp" # whatever happens below, a half-made environment is not taken for a whole one
  fi
}

ffcv_wheel() { # prints the self-contained wheel for .venv's Python, if the user has brought one
  local tag
  [[ -d $wheels ]] || return 0
  tag=$(.venv/bin/python -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
  find "$wheels" -name "ffcv-*-$tag-*.whl" | sort | tail -n 1
}

keep_ffcv_wheel() {
  [[ -n ${FFCV_WHEEL:-} ]] || return 0
  [[ -f $FFCV_WHEEL ]] || die "FFCV_WHEEL: there is no file $FFCV_WHEEL"
  mkdir -p "$wheels"
  printf '*\n' >.tools/.gitignore
  cmp -s "$FFCV_WHEEL" "$wheels/$(basename "$FFCV_WHEEL")" || cp "$FFCV_WHEEL" "$wheels/"
}

build_needs() { # the Debian packages that building FFCV still lacks
  command -v g++ >/dev/null || printf 'g++ '
  command -v pkg-config >/dev/null || printf 'pkg-config '
  pkg-config --exists opencv4 2>/dev/null || printf 'libopencv-dev '
  pkg-config --exists libturbojpeg 2>/dev/null || printf 'libturbojpeg0-dev '
  [[ -x .venv/bin/python ]] || return 0
  .venv/bin/python -c 'import os, sys, sysconfig
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    print("python%d.%d-dev" % sys.version_info[:2], end="")'
}

install_build_needs() {
  local needs
  read -ra needs <<<"$(build_needs)"
  ((${#needs[@]})) || return 0
  HINT='then make again; not root at all? build a self-contained FFCV once elsewhere (scripts/build_ffcv_wheel.sh)'\
' and run make setup FFCV_WHEEL=PATH' scripts/apt_install.sh "${needs[@]}" || exit 2
}

synchronise() { # installs the locked environment
  local wheel
  # FFCV last: the Python it is compiled for, and so the headers it needs, are known by then.
  "$uv" sync --locked --extra export --no-install-package ffcv ||
    die "uv could not install the locked environment (see above; UV_PYTHON=/path/to/python3.12 names a Python)"
  # Where Python may not write bytecode (PYTHONDONTWRITEBYTECODE is set in many containers, or .venv belongs to another
  # user), each process would compile torch's sources anew, for 10 s and more.
  export UV_COMPILE_BYTECODE=1
  wheel=$(ffcv_wheel)
  if [[ -n $wheel ]]; then
    "$uv" pip install --python .venv/bin/python --no-deps --reinstall "$wheel" || die "could not install $wheel"
  else
    install_build_needs
    "$uv" sync --locked --extra export || die "uv could not build or install FFCV (see above)"
  fi
}

[[ $(uname -s) == Linux ]] || die "only Linux is supported (FFCV's loader needs it): use a Debian or Ubuntu machine," \
  "virtual machine or container"
keep_ffcv_wheel
up_to_date && exit 0

started=$SECONDS
uv=$(scripts/find_uv.sh)
discard_broken_environment
[[ -d $wheels ]] || install_build_needs # ask for system libraries before gigabytes are fetched
say "installing the locked environment into .venv (several GB the first time)"
synchronise
say "checking that every library imports"
if ! .venv/bin/python -m mnist_fast.preflight; then
  say "trying once more with a new .venv"
  "$uv" cache clean ffcv # it may have been compiled against libraries that have left this machine
  rm -rf .venv           # not uv's --reinstall, which fetches everything again
  synchronise
  .venv/bin/python -m mnist_fast.preflight || exit 2
fi
printf '%s\n%s\n' "$PWD" "$(made_from)" >"$stamp"
say "ready after $((SECONDS - started)) s: $(.venv/bin/python --version) in .venv"
