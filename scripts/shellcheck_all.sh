#!/usr/bin/env bash
# Runs shellcheck on every shell script of the repository, and says so when it cannot.
set -euo pipefail
cd -P "$(dirname "$0")/.."

if ! command -v shellcheck >/dev/null && ! scripts/apt_install.sh shellcheck; then
  printf 'shellcheck is not available: the shell scripts were not checked\n' >&2
  exit 0
fi
mapfile -t files < <(
  find . \( -name .git -o -name .venv -o -name .tools -o -name data -o -name runs \) -prune \
    -o \( -name '*.sh' -o -path ./.ci/run \) -type f -print | sort
)
shellcheck -x "${files[@]}"
printf 'shellcheck: %d scripts\n' "${#files[@]}"
