# SPDX-License-Identifier: Apache-2.0
"""Every reach into vLLM's internals, in one place. Supported: vLLM 0.32 and 0.33.

Everything outside uses what the package ``vllm`` itself exports, and methods of those that vLLM
documents; ``tests/test_vllm_room.py`` holds that, and ``tests/integration/test_seams.py`` the
contract of each seam for the installed version.

Some are wrappers, each of which calls the original and adds one thing. Without a ``cna`` key in
``additional_config`` those of the worker and of the API server are not even installed, and those of
the front end only refuse requests that ask for steering. ``front_end``: admission; ``api_server``:
adapters as models; ``http_app``: the guard around all routes; ``batch_runner``: lines of its files;
``engine_core``: what was not admitted is refused, block keys, and the life of circuits that
requests still need; ``engines``: all engines of a deployment; ``scheduler``: the account of steered
rows; ``worker``: the model and its batch; ``failures``: what the core ended, told by the front end.

The others only read or call: ``model``: classes and configuration of a model; ``attach``: hooks a
loaded one; ``kv_blocks``: a worker's cache; ``offline``: an ``LLM``; ``command_line``: flags;
``platform``: the machine.
"""


def install() -> None:
    """Installs the seams of this process. Cheap: the worker's wait until a worker is built, the
    API server's until its front end is."""
    from cna_vllm.serving.seams import (
        engine_core,
        engines,
        failures,
        front_end,
        scheduler,
        worker,
    )

    front_end.install()
    failures.install()
    engine_core.install()
    engines.install()
    scheduler.install()
    worker.install()
