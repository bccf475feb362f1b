# SPDX-License-Identifier: Apache-2.0
"""The command `cna-vllm`: dispatch, and one place where errors become lines and exit statuses.

Status 0: all was done. 1: a check failed. 2: bad input, told in one line. 130: interrupted; 129 and
143: ended by SIGHUP and SIGTERM.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Sequence
from functools import partial

from cna_vllm import __version__
from cna_vllm.cli.interrupt import GRACE, watched

COMMANDS = {
    "discover": "find the circuit of a behaviour from two sets of prompts",
    "inspect": "show where a circuit lies and what its neurons write",
    "compare": "show what two circuits share",
    "generate": "answer every prompt under every multiplier",
    "serve": "vLLM's OpenAI server, with circuits and adapters",
    "ab": "compare arms on the same prompts, with statistics and a report",
    "eval": "the paper's evaluations on one model, beside the published figures",
    "bake": "write a checkpoint with a circuit in effect, for engines without the plugin",
    "demo": "the whole story on a small real model",
    "doctor": "what works on this machine, and why not",
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns the exit status.

    argv: in place of the process's own arguments; the command then runs in this very process.
    """
    if argv is None:
        arguments = sys.argv[1:]
        return watched(partial(_run, arguments), grace=GRACE + _draining(arguments))
    try:
        return _run(argv)
    except KeyboardInterrupt as interrupt:
        print(f"cna-vllm: interrupted{f': {interrupt}' if str(interrupt) else ''}", file=sys.stderr)
        return 130


def _run(arguments: Sequence[str]) -> int:
    """Raises KeyboardInterrupt, with what there is to say to the user, if anything."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"cna-vllm {__version__}")
        return 0
    command = arguments[0]
    if command not in COMMANDS:
        return _fail(f"unknown command {command!r}; known are {', '.join(COMMANDS)}")
    try:
        status: int = importlib.import_module(f"cna_vllm.cli.{command}").run(list(arguments[1:]))
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader of stdout left; the interpreter's own flush at exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        named = error.filename is not None and error.strerror is not None
        return _fail(f"{error.filename}: {error.strerror}" if named else str(error))
    except ValueError as error:  # CircuitError, SteeringError, PromptError, vLLM's validation
        return _fail(str(error))


def _draining(arguments: Sequence[str]) -> int:
    """Seconds that vLLM's --shutdown-timeout gives to requests that run, where it is given."""
    found = re.findall(r"--shutdown[-_]timeout[= ](\d+)", " ".join(arguments))
    return int(found[-1]) if found and arguments[0] == "serve" else 0


def _help() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items())
    return (
        "usage: cna-vllm COMMAND [options]\n\n"
        "Circuits of MLP neurons in vLLM: find them, and scale them per request.\n\n"
        f"commands:\n{commands}\n\n"
        "cna-vllm COMMAND --help shows a command's options; cna-vllm --version the version."
    )


def _fail(message: str) -> int:
    print(f"cna-vllm: error: {' '.join(message.split())}", file=sys.stderr)
    return 2
