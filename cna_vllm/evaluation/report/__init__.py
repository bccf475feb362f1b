# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page for the result of an A/B test."""

from cna_vllm.evaluation.report.page import write_report

__all__ = ["write_report"]
