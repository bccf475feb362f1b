# SPDX-License-Identifier: Apache-2.0
"""`cna-vllm` with the stand-in for torchvision, which a server's own processes inherit."""

from __future__ import annotations

import runpy

from tests.torchvision_stand_in import install

if __name__ == "__main__":
    install()
    runpy.run_module("cna_vllm", run_name="__main__", alter_sys=True)
