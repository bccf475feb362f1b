# SPDX-License-Identifier: Apache-2.0
"""Seam of an API server process: which one it is, and the names that are not ours."""

from __future__ import annotations

from typing import Any


def api_process(engine_client: Any) -> tuple[int, int]:
    """The rank of this API server process, -1 for one that is not told, and how many there are."""
    parallel = engine_client.vllm_config.parallel_config
    return parallel._api_process_rank, parallel._api_process_count


class ServedNames:
    """The served model's names and those of LoRA adapters, as they are now."""

    def __init__(self, app_state: Any) -> None:
        """app_state: of vLLM's application, after it has made its ``OpenAIServingModels``."""
        self._models = app_state.openai_serving_models

    def is_base(self, name: str) -> bool:
        """Whether it is a name of the served model."""
        return bool(self._models.is_base_model(name))

    def is_lora(self, name: str) -> bool:
        """Whether it is the name of a LoRA adapter that is loaded."""
        return name in self._models.lora_requests
