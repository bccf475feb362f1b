# SPDX-License-Identifier: Apache-2.0
"""Seam of the command line: vLLM's own parser of an engine's and of a server's flags."""

from __future__ import annotations

import argparse
import importlib
from importlib.util import find_spec
from typing import Any

_HOMES = ("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.common.cli_args")


def parser_class() -> type[argparse.ArgumentParser]:
    """vLLM's ``FlexibleArgumentParser``: nested keys, underscores, ``--config``, grouped help."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    found: type[argparse.ArgumentParser] = FlexibleArgumentParser
    return found


def make_server_arg_parser(parser: Any) -> Any:
    """Adds every flag of ``vllm serve`` to a parser of that class and returns it."""
    home = next(name for name in _HOMES if find_spec(name) is not None)
    return importlib.import_module(home).make_arg_parser(parser)


def check_server_args(args: argparse.Namespace) -> None:
    """Raises TypeError for flags of a server that do not go together."""
    from vllm.entrypoints.cli.serve import ServeSubcommand

    ServeSubcommand().validate(args)


def serve(args: argparse.Namespace) -> None:
    """What ``vllm serve`` does with these flags, until a signal ends it."""
    from vllm.entrypoints.cli.serve import ServeSubcommand

    ServeSubcommand.cmd(args)
