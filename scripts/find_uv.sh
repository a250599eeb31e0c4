#!/usr/bin/env bash
# Prints the path of a usable uv, and installs one into .tools/uv (never into the system's Python) when there is none.
set -euo pipefail
cd -P "$(dirname "$0")/.."
oldest=0.5.0 # the first to know dependency groups and this lock format well

usable() {
  local version
  version=$("$1" --version 2>/dev/null | awk '{print $2}') || return 1
  [[ -n $version && $(printf '%s\n' "$oldest" "$version" | sort -V | head -n 1) == "$oldest" ]]
}

report_if_usable() {
  local candidate
  for candidate in "$(command -v uv || true)" "$HOME/.local/bin/uv" "$PWD/.tools/uv/bin/uv"; do
    if [[ -x $candidate ]] && usable "$candidate"; then
      printf '%s\n' "$candidate"
      exit 0
    fi
  done
}

private_install() {
  rm -rf .tools/uv
  mkdir -p .tools
  printf '*\n' >.tools/.gitignore
  python3 -m venv .tools/uv >/dev/null 2>&1 || return 1
  .tools/uv/bin/python -m pip install -q --disable-pip-version-check "uv>=$oldest" >&2
}

report_if_usable
printf 'setup: installing uv into .tools/uv\n' >&2
if ! private_install; then
  # Debian splits venv and pip from python3.
  if HINT='or install uv yourself and put it on the PATH' \
    scripts/apt_install.sh python3 python3-venv ca-certificates >&2; then
    private_install || true
  fi
fi
report_if_usable
printf 'setup: uv is missing and could not be installed: install python3-venv, or put uv on the PATH\n' >&2
exit 2
