# SPDX-License-Identifier: Apache-2.0
"""`cna-vllm doctor` with real engines: a sound one passes, what is wrong in others is named."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests import tiny_models
from tests.engine_job import V2, run_engine
from tests.integration.conftest import Subject
from tests.server import environment

pytestmark = pytest.mark.engine

# In layer 2, steered rows are a little off.
SPOIL = """
from cna_vllm.serving.worker import activation

def spoil(worker):
    modules = worker.model_runner.get_model().modules()
    masks = [m for m in modules if isinstance(m, activation.SteeredActAndMul)][2].masks
    sound = activation.act_and_mul_scaled
    def wrong(x, row_slot, *rest):
        out = sound(x, row_slot, *rest)
        if rest[2].data_ptr() == masks.data_ptr():
            out[row_slot[: len(x)] >= 0] *= 1.0001
        return out
    activation.act_and_mul_scaled = wrong

llm.collective_rpc(spoil)
"""


def test_the_self_test_passes_and_can_fail(tiny: Subject) -> None:
    """On the GPU model runner through the interpreter: sound, then spoiled."""
    config = {"cna": {"circuits": dict(tiny.files), "record": True, "max_circuits": 4}}
    steps = [
        {"op": "self_test"},
        {"op": "run", "code": SPOIL},
        {"op": "self_test"},
        {"op": "status"},
    ]
    sound, _, wrong, status = run_engine(tiny.config(additional_config=config), steps, env=V2)
    assert [check["claim"] for check in sound if not check["holds"]] == []
    assert len(sound) == 8
    failed = [check for check in wrong if not check["holds"]]
    assert failed[0]["claim"].startswith("m = -1.5 in one layer")
    assert failed[0]["seen"].startswith("wrong in layers [2")
    assert status[0]["runner"] == "V2" and status[0]["kernel"] == "interpreter"
    assert len(status[0]["circuits"]) == 2, "the self-test leaves the engine's circuits alone"


def test_the_command(tiny: Subject) -> None:
    command = [sys.executable, "-m", "cna_vllm", "doctor", tiny.path, "--json"]
    command += ["--skip-tokenizer-init", "--dtype=float32", "--max-model-len=64"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    report = json.loads(done.stdout)
    assert report["ok"] and all(check["holds"] for check in report["checks"])
    engine = report["engine"]
    assert (engine["runner"], engine["kernel"], engine["dtype"]) == ("V1", "cpu", "float32")
    layers = tiny_models.LAYERS
    assert engine["hooked_layers"] == f"{layers} of {layers}"
    assert engine["table_bytes"] == 128 * layers * tiny_models.WIDTH // 8
