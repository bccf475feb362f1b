# SPDX-License-Identifier: Apache-2.0
"""Prompts, and how they become the token ids that an engine sees; no engine may be touched here."""
