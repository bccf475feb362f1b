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
requests still need; ``engines``: all engines of a deployment, and what they hold from the start;
``scheduler``: the account of steered rows; ``worker``: the model and its batch; ``compile_cache``:
its key; ``failures``: what the core ended, told by the front end; ``unsupported``: where these do
not fit.

The others only read or call: ``model``: classes and configuration of a model; ``attach``: hooks a
loaded one; ``quantization``: what is fused with its activations; ``kv_blocks``: a worker's cache;
``offline``: an ``LLM``; ``gate``: what of ours its objects hold; ``served_names``: an API server;
``command_line``: flags; ``platform``: the machine.
"""

from __future__ import annotations

SUPPORTED = ("0.32", "0.33")


def install() -> None:
    """Installs the seams of this process. Cheap: the worker's wait until a worker is built, the
    API server's until its front end is.

    A vLLM of another version, or without a name that is needed, is left as it is, but for two
    refusals: of engines with a ``cna`` key, and of requests for steering.
    """
    import vllm

    from cna_vllm.serving.seams import (
        compile_cache,
        engine_core,
        engines,
        failures,
        front_end,
        scheduler,
        unsupported,
        worker,
    )
    from cna_vllm.serving.seams.wrapping import probe

    seams = (front_end, compile_cache, failures, engine_core, engines, scheduler, worker)
    problems = {}
    for seam in seams:
        try:
            seam.install(probe)
        except (AttributeError, ImportError) as error:
            problems[seam] = f"{seam.__name__.rpartition('.')[2]}: {error}"
    told = [*problems.values()]
    if ".".join(vllm.__version__.split(".")[:2]) not in SUPPORTED:
        told.insert(0, f"{vllm.__version__} is none of the versions {', '.join(SUPPORTED)}")
    if told:
        unsupported.refuse(told)
        if front_end not in problems:
            front_end.install()
        return
    for seam in seams:
        seam.install()
