# SPDX-License-Identifier: Apache-2.0
"""The engine side: what runs inside vLLM."""
