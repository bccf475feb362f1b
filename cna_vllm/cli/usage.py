# SPDX-License-Identifier: Apache-2.0
"""The error of a command line."""


class UsageError(ValueError):
    """A command line that cannot be run: one line."""
