# SPDX-License-Identifier: Apache-2.0
"""Plain data that steers: circuits, vectors, their files, arms, and a request's fields; no engine,
no model and no tensor of torch may be touched here."""
