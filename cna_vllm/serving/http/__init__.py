# SPDX-License-Identifier: Apache-2.0
"""Run-time control and metrics of circuits inside vLLM's OpenAI server."""
