# SPDX-License-Identifier: Apache-2.0
"""Evaluation of steered answers: metrics of single answers, and statistics of paired arms."""
