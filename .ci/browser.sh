#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A headless browser for the test of HTML reports: prints the paths of Chromium and of its driver.
# Installs Debian's packages first where they are missing and may be installed; never with --check.
set -euo pipefail

browser() {
    command -v chromium || command -v chromium-browser || command -v google-chrome
}

paths() {
    browser && command -v chromedriver
}

paths && exit
if [[ ${1:-} != --check && $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    echo "browser: installing chromium and chromium-driver" >&2
    export DEBIAN_FRONTEND=noninteractive
    log=$(mktemp)
    { apt-get update && apt-get install -y --no-install-recommends chromium chromium-driver; } \
        >"$log" 2>&1 || tail -n 5 "$log" >&2
    rm -f "$log"
    paths && exit
fi
echo "browser: Chromium or its driver is missing; install them (Debian: apt-get install chromium" \
    "chromium-driver) and put both on PATH" >&2
exit 1
