#!/usr/bin/env bash
# Sets up everything a fresh Debian 12 machine lacks: Debian packages and the project's own
# virtual environment (.venv) with the pinned toolchain. Each step is skipped when its result is
# already there, so a second call takes no time and a failed call goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(g++ git make ccache clang-format-14
          python3 python3-venv python3-dev
          libgtest-dev libgmock-dev libbenchmark-dev
          libcli11-dev libtomlplusplus-dev nlohmann-json3-dev libpcre2-dev libutf8proc-dev)

# fail STEP WHAT-TO-DO: the one line a user needs.
fail() {
  echo "setup: $1 failed. $2 Then run the same command again; finished steps are kept." >&2
  exit 1
}

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

install_debian_packages() {
  local missing=()
  for package in "${packages[@]}"; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)" = installed ] ||
      missing+=("$package")
  done
  [ ${#missing[@]} = 0 ] && return
  echo "setup: installing Debian packages: ${missing[*]}"
  local log=build/setup-apt.log
  mkdir -p build
  as_root apt-get update -qq >"$log" 2>&1 ||
    fail "apt-get update" "Check the network and /etc/apt/sources.list (log: $log)."
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}" >>"$log" 2>&1 ||
    fail "apt-get install ${missing[*]}" "Read $log, install these packages by hand if need be."
}

# install_pins FILE: pip-installs a pin file once per content of that file.
install_pins() {
  local file=$1 name stamp
  name=$(basename "$file" .txt)
  stamp=.venv/.$name-$(sha256sum "$file" | cut -c1-16)
  [ -e "$stamp" ] && return
  echo "setup: installing tools/$name.txt into .venv (the toolchain is 5 GB and takes minutes)"
  mkdir -p build
  .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off -r "$file" \
    >"build/setup-$name.log" 2>&1 ||
    fail "pip install -r $file" "Check the network and free disk space (log: build/setup-$name.log)."
  touch "$stamp"
}

install_debian_packages
if [ ! -x .venv/bin/python ]; then
  /usr/bin/python3 -m venv .venv || fail "python3 -m venv .venv" "Remove .venv and check python3-venv."
fi
install_pins tools/toolchain.txt
[ "${1:-}" = --without-oracles ] || install_pins tools/oracles.txt
