# SPDX-License-Identifier: Apache-2.0
"""Side by side, test processes share the cores: one thread each, or OpenMP waits for itself."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for child processes
