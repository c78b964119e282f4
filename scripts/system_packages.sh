#!/usr/bin/env bash
# Debian packages that pip cannot bring: the venv module, and the browser in which the tests open every page of the book.
# Called by make when one of them is missing.
set -euo pipefail
packages=(python3-venv chromium)
elevate=()
if [ "$(id -u)" -ne 0 ]; then
  if ! sudo -n true 2>/dev/null; then
    echo "gradclip: these Debian packages are needed once: sudo apt-get install ${packages[*]}" >&2
    exit 1
  fi
  elevate=(sudo -n)
fi
"${elevate[@]}" apt-get update -qq
"${elevate[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}"
