# SPDX-License-Identifier: Apache-2.0
"""Seam of the command line: vLLM's own parser of a server's flags."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

_HOMES = ("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.common.cli_args")


def make_server_arg_parser(parser: Any) -> Any:
    """Adds every flag of `vllm serve` to a `FlexibleArgumentParser` and returns it."""
    home = next(name for name in _HOMES if find_spec(name) is not None)
    return importlib.import_module(home).make_arg_parser(parser)
