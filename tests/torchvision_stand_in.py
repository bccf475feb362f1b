# SPDX-License-Identifier: Apache-2.0
"""A stand-in for torchvision, where the build for this machine's PyTorch is not to be had.

transformers 5 and vLLM import it for models with towers even where nothing of it is called: images
are prepared by Pillow, and videos are in no test. What is looked up here exists, what is called
raises.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_MODULES = (
    "torchvision",
    "torchvision.io",
    "torchvision.ops",
    "torchvision.transforms",
    "torchvision.transforms.functional",
    "torchvision.transforms.v2",
    "torchvision.transforms.v2.functional",
)

SETUP = "from tests.torchvision_stand_in import install; install()"
"""Set-up of an engine of a model with towers."""


class _Absent:
    """Whatever torchvision has."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        raise NotImplementedError("torchvision is not installed")


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return sys.modules.get(f"{self.__name__}.{name}") or type(name, (_Absent,), {})


def install() -> None:
    """Does nothing where torchvision is installed."""
    if find_spec("torchvision") is not None:
        return
    for name in _MODULES:
        module = _Module(name)
        module.__path__ = []
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        sys.modules[name] = module

    import transformers
    from transformers import processing_utils, video_processing_utils
    from transformers.models.auto import video_processing_auto
    from transformers.utils import import_utils
    from vllm.model_executor.models import registry
    from vllm.transformers_utils import processor

    _, message = import_utils.BACKENDS_MAPPING["torchvision"]
    import_utils.BACKENDS_MAPPING["torchvision"] = (lambda: True, message)
    for package in (transformers, processing_utils.transformers_module):
        for name in ("BaseVideoProcessor", "VideoProcessorMixin"):
            setattr(package, name, getattr(video_processing_utils, name))
    # The names of its own classes were dropped when it was imported.
    video_processing_auto.AutoVideoProcessor.from_pretrained = _video_processor
    processor.AutoVideoProcessor = video_processing_auto.AutoVideoProcessor
    # vLLM looks at a model's class in another process, which would not have this.
    registry._run_in_subprocess = lambda look: look()


def _video_processor(*_args: Any, **_options: Any) -> Any:
    """One that has what vLLM asks any for."""
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    return Qwen3VLVideoProcessor()
