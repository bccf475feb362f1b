# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on disk: the default model, the shape and the weights of others, and baking a
circuit into them; no engine may be touched here."""
