# SPDX-License-Identifier: Apache-2.0
"""What an engine core does: it admits only what front ends have sealed, keys blocks, keeps the
account; no file and no tensor is touched here."""
