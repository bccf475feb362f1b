# SPDX-License-Identifier: Apache-2.0
"""Side by side, test processes share the cores: one thread each, or OpenMP waits for itself.

What is costly to set up is set up by one of them.
"""

import gc
import os
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for child processes

# Tests that share an engine, a server, a browser or a long computation: one process runs them all.
TOGETHER = (
    "tests/integration/serving/",
    "tests/integration/test_ab.py",
    "tests/integration/test_eval.py",
    "tests/integration/test_generate.py",
    "tests/integration/test_interrupt.py",
    "tests/integration/test_report_browser.py",
    "tests/kernels/test_interpreter.py",
    "tests/unit/test_statistics_null.py",
)


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
