#!/usr/bin/env bash
# Installs Debian packages where this user may (root, or sudo without a password).
#
#   scripts/apt_install.sh PACKAGE...
#
# Exits 0 when all of them are installed afterwards. Otherwise it says in one line what to run, followed by $HINT, and
# exits 1. Packages that are there already cost no network and no privilege.
set -euo pipefail

missing=()
for package in "$@"; do
  status=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
  [[ $status == installed ]] || missing+=("$package")
done
((${#missing[@]})) || exit 0

give_up() {
  printf 'missing system packages, and %s: run "sudo apt-get install -y %s"%s\n' \
    "$1" "${missing[*]}" "${HINT:+ - ${HINT}}" >&2
  exit 1
}

command -v apt-get >/dev/null || give_up "there is no apt-get here (the names are Debian's and Ubuntu's)"
if ((EUID == 0)); then
  as_root=()
elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
  as_root=(sudo -n)
else
  give_up "this user is not root and has no sudo without a password"
fi

apt() {
  timeout 900 "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get -q -y -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 "$@" </dev/null
}

log=$(mktemp)
trap 'rm -f "$log"' EXIT
printf 'installing with apt-get: %s\n' "${missing[*]}"
apt update >"$log" 2>&1 || true # one broken third-party source must not stop the rest
if ! apt install --no-install-recommends "${missing[@]}" >>"$log" 2>&1; then
  tail -n 20 "$log" >&2
  give_up "apt-get failed (see above)"
fi
