# SPDX-License-Identifier: Apache-2.0
"""Every reach into vLLM's internals, in one place. Supported: vLLM 0.32 and 0.33.

Everything outside uses what the package ``vllm`` itself exports, and methods of those that vLLM
documents; ``tests/test_vllm_room.py`` holds that, and ``tests/integration/test_seams.py`` the
contract of each seam for the installed version.

Some are wrappers, each of which calls the original and adds one thing (``wrapping``); the others
only read or call. Without a ``cna`` key in ``additional_config`` those of the worker and of the API
server are not even installed, and those of the front end only refuse requests for steering.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
        _refuse(told)
        if front_end not in problems:
            front_end.install()
        return
    for seam in seams:
        seam.install()


def _refuse(problems: Sequence[str]) -> None:
    """Configurations that are made from now on and have a ``cna`` key raise CnaConfigError."""
    from vllm.config import VllmConfig

    from cna_vllm.serving.config import CONFIG_KEY, CnaConfigError
    from cna_vllm.serving.seams.wrapping import Original, adding, wrap

    @adding
    def post_init(original: Original, self: Any, *args: Any, **kwargs: Any) -> None:
        config = self.additional_config
        if isinstance(config, dict) and CONFIG_KEY in config:
            raise CnaConfigError(
                f"cna: this vLLM cannot be steered: {'; '.join(problems)}; install one that "
                "can, or remove the cna key"
            )
        original(self, *args, **kwargs)

    wrap(VllmConfig, "__post_init__", post_init)
