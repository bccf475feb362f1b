# SPDX-License-Identifier: Apache-2.0
"""What another vLLM would break: `make compat VLLM=0.34.0`, in a minute and without an engine.

Two looks at its Python. Names: every name that the product imports is looked for in the syntax
trees. Contracts: the tests of the seams run on it, over the compiled operations of the installed
vLLM. Exit status 0 only if nothing breaks.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from tests.vllm_names import ROOT, SEAMS, has, product_files, vllm_names

CONTRACTS = "tests/integration/test_seams.py"


def broken_names(folder: Path) -> list[str]:
    """A line for each name that is gone, and where it is used."""
    gone: dict[str, list[str]] = {}
    names = vllm_names(product_files())
    for name in names:
        if not has(folder, name):
            gone.setdefault(name.dotted, []).append(name.where)
    print(f"names      {len({n.dotted for n in names})} imported, {len(gone)} gone")
    return [f"{name}\n    used at {', '.join(places)}" for name, places in sorted(gone.items())]


def broken_contracts(folder: Path) -> list[str]:
    """A line for each contract that does not hold, why, and the seams that rest on it."""
    report = folder / "contracts.xml"
    subprocess.run(
        [sys.executable, "-m", "pytest", CONTRACTS, "-q", f"--junit-xml={report}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(folder)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    cases = [] if not report.exists() else ElementTree.parse(report).findall(".//testcase")
    broken = [(case, bad) for case in cases for bad in case if bad.tag in ("failure", "error")]
    print(f"contracts  {len(cases)} of the seams, {len(broken)} do not hold")
    if not cases:
        return ["vllm\n    cannot be imported here, so no contract could be tried"]
    return [
        f"{case.get('name')}\n    {_reason(bad)}{_seams(bad.text or '')}" for case, bad in broken
    ]


def _reason(bad: ElementTree.Element) -> str:
    return " ".join((bad.get("message") or "").split())[:200]


def _seams(trace: str) -> str:
    """Which seam files name a thing of vLLM's that the failed contract names."""
    lines = "\n".join(line for line in trace.splitlines() if not line.startswith("E "))
    words = set(re.findall(r"\b(?:[A-Z][A-Za-z]{4,}|_?[a-z]+(?:_[a-z0-9]+)+)\b", lines))
    words -= {"test_seams", "cna_vllm", "__init__"}
    gone = set(re.findall(r"has no attribute '(\w+)'", trace))
    files = SEAMS.glob("*.py")
    used = {file.name: set(re.findall(r"\w+", file.read_text("utf-8"))) for file in files}
    users = sorted(n for n, names in used.items() if gone & names)
    users = users or sorted(n for n, names in used.items() if len(words & names) > 1)
    return f"\n    seams: {', '.join(users)}" if users else ""


def main(version: str) -> int:
    script = ["bash", str(ROOT / ".ci" / "second_engine.sh"), version, "--unchecked"]
    found = subprocess.run(script, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    if not found:
        return 1
    print(f"vLLM {version} beside what this product expects of it")
    broken = [*broken_names(Path(found)), *broken_contracts(Path(found))]
    for entry in broken:
        print(f"  breaks   {entry}")
    print("nothing breaks" if not broken else f"{len(broken)} to mend")
    return 1 if broken else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: make compat VLLM=0.34.0")
    sys.exit(main(sys.argv[1]))
