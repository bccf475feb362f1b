# SPDX-License-Identifier: Apache-2.0
"""`cna-vllm compare`: what two circuits share, for instance of a base and an instruct model."""

from __future__ import annotations

import json

from cna_vllm.cli.options import OptionParser
from cna_vllm.cli.usage import check_plot
from cna_vllm.steering.circuit import Circuit


def run(argv: list[str]) -> int:
    parser = OptionParser("compare", "Show what two circuits of models of the same shape share.")
    parser.add_argument("first", metavar="A.json")
    parser.add_argument("second", metavar="B.json")
    parser.add_argument("--json", action="store_true", help="write JSON instead of text")
    parser.add_argument("--plot", metavar="P.png", help="draw both layer profiles and the overlap")
    parser.add_argument("--overwrite", action="store_true", help="replace P.png")
    options = parser.parse_args(argv)
    check_plot(options.plot, options.overwrite)
    first, second = Circuit.load(options.first), Circuit.load(options.second)

    from cna_vllm.reading.compare import compare
    from cna_vllm.reading.report import comparison_json, comparison_text

    comparison = compare(first, second)
    if options.json:
        print(json.dumps(comparison_json(comparison), indent=1))
    else:
        print(comparison_text(comparison))
    if options.plot:
        from cna_vllm.reading.plot import plot_comparison

        plot_comparison(comparison, options.plot)
    return 0
