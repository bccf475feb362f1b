# SPDX-License-Identifier: Apache-2.0
"""The README's table of a GPU, from the rows of one run: PYTHONPATH=benchmarks python -m gpu.table

    python -m gpu.table [FILE] [--run RUN]

FILE is benchmarks/results/gpu.jsonl, RUN its last run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

RESULTS = Path(__file__).parents[1] / "results" / "gpu.jsonl"
STEERED = ("idle", "one arm", "distinct arms", "three circuits", "stock again")
OPS = ("idle", "one arm", "distinct arms", "layer without bits")


def line(row: Row) -> str:
    """A row as it comes: what it is about, and its figures."""
    hidden = {"benchmark", "part", "run", "time", "versions", "python", "machine", "threads"}
    hidden |= {"device", "commit"}
    figures = {name: value for name, value in row.items() if name not in hidden}
    return f"{row['part']}: {json.dumps(figures)}"


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    by_part: dict[str, list[Row]] = {}
    for row in rows:
        by_part.setdefault(row["part"].partition("-")[0], []).append(row)
    texts = [_head(rows[0])]
    for part, write in _WRITERS.items():
        if part in by_part:
            texts.append("\n".join(write(by_part[part])))
    return "\n\n".join(text for text in texts if text)


def _head(row: Row) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    return f"{row['device']}, {row['run'][:10]}, commit {str(row['commit'])[:12]}; {versions}." + (
        f" Source: {row['source']}." if "source" in row else ""
    )


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    if not body:
        return []
    lines = [head, ["---"] * len(head), *body]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def _kernel_check(rows: Sequence[Row]) -> Iterator[str]:
    def off(row: Row, name: str) -> str:
        if name not in row:
            return ""
        found = row[name]
        notes = []
        if found.get("max_units", 1) > 1:
            notes.append(f"up to {found['max_units']:,} units")
        if found.get("off_tiny"):
            notes.append(f"{found['off_tiny']:,} tiny")
        return f"{found['off']:,}" + (f" ({'; '.join(notes)})" if notes else "")

    body = [
        [
            f"{row['dtype']} {row['activation']}",
            f"{row['gates']:,}",
            *(off(row, name) for name in ("ours", "torch", "vllm")),
        ]
        for row in rows
        if "gates" in row
    ]
    yield "Gates off from the correctly rounded float64 result, by one unit in the last place where"
    yield "no more is said (tiny: where the result is under 2e-37):\n"
    yield from _table(["", "gates", "this kernel", "torch", "vLLM's op"], body)
    for row in rows:
        if "cases" in row:
            yield f"\nSteered rows: {row['to_the_bit']} of {row['cases']} cases to the bit."


def _kernel_bench(rows: Sequence[Row]) -> Iterator[str]:
    names = [name for name in OPS if any(name in row["variants"] for row in rows)]
    yield "Time of the op, microseconds, and ratio to vLLM's own:\n"
    body = []
    for row in rows:
        cells = row["variants"]
        shape = [f"{row['dtype']} {row['activation']}", f"{row['width']:,}", f"{row['rows']:,}"]
        ours = [
            f"{_us(cells[name])} ({cells[name]['ratio']:.2f})" if name in cells else ""
            for name in names
        ]
        body.append([*shape, _us(cells["vllm"]), *ours])
    yield from _table(["", "channels", "rows", "vLLM's op", *names], body)


def _us(cell: Mapping[str, float]) -> str:
    return f"{cell['us']:.2f}" if cell["us"] < 10 else f"{cell['us']:,.1f}"


def _engines(rows: Sequence[Row]) -> Iterator[str]:
    yield "Whole engine, ratio of tokens/s to stock vLLM (lowest, highest round). Steps/s are the"
    yield "output tokens of a request over the seconds of its batch, prefill included:\n"
    body = []
    for row in rows:
        if "variants" in row:
            cells = row["variants"]
            ratios = [cells[name]["ratio"] for name in STEERED]
            body.append(
                [
                    row["part"].partition("-")[2].upper(),
                    row["name"],
                    f"{cells['stock']['steps_per_second']:.1f}",
                    *(f"{middle:.3f} ({low:.3f}, {high:.3f})" for low, middle, high in ratios),
                ]
            )
    yield from _table(["shape", "", "stock, steps/s", *STEERED], body)


def _exactness(rows: Sequence[Row]) -> Iterator[str]:
    yield "Token-exact against Hugging Face hooks, float32, TRITON_F32_DEFAULT=ieee unless said:\n"
    body = [
        [
            f"{row.get('runner', '')} {row['mode']}".strip(),
            f"{row['cache']}, {row['cached_tokens']:,} tokens" if "cache" in row else "",
            str(row["rows"]),
            str(row.get("near_ties", "")),
            f"{row['wrong']}" + (f" (gap up to {row['largest_gap']:g})" if row["wrong"] else ""),
            row.get("note", ""),
        ]
        for row in rows
    ]
    yield from _table(["engine", "prefix cache", "rows", "near ties", "wrong", ""], body)


def _doctor(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        held = sum(check["holds"] for check in row["checks"])
        yield f"`doctor` on a tiny model: {held} of {len(row['checks'])} checks hold."


def _lines(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        yield from ("```", *row["lines"], "```")


def _notes(rows: Sequence[Row]) -> Iterator[str]:
    yield from (f"- {row['note']}" for row in rows)


def _run(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        total = ", ".join(f"{name} {seconds:.0f}" for name, seconds in row["seconds"].items())
        failed = "; ".join(row["failed"]) or "none"
        yield f"Seconds: {total}. Parts that failed: {failed}."


_WRITERS = {
    "doctor": _doctor,
    "kernel_check": _kernel_check,
    "exactness": _exactness,
    "kernel_bench": _kernel_bench,
    "fill": _lines,
    "engines": _engines,
    "note": _notes,
    "run": _run,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="gpu.table", description=__doc__.split("\n")[0])
    parser.add_argument("file", nargs="?", type=Path, default=RESULTS)
    parser.add_argument("--run", help="as its rows name it; default: the last")
    options = parser.parse_args()
    rows = [json.loads(text) for text in options.file.read_text(encoding="utf-8").splitlines()]
    run = options.run or rows[-1]["run"]
    chosen = [row for row in rows if row["run"] == run]
    if not chosen:
        parser.error(f"no run {run!r}; there are {sorted({row['run'] for row in rows})}")
    print(table(chosen))


if __name__ == "__main__":
    main()
