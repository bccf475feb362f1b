# SPDX-License-Identifier: Apache-2.0
"""One `cna-vllm serve` on SmolLM2, with two API server processes, for all tests of this folder."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from transformers import AutoTokenizer

from cna_vllm import Circuit
from tests.integration.conftest import Subject
from tests.integration.serving.deployment import (
    KV_BLOCKS,
    QUESTION,
    Deployment,
    Operator,
    Restart,
    answer,
    unload,
)
from tests.lora import write_lora


@pytest.fixture(scope="package")
def deployed(smollm2: Subject, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("serve")
    (folder / "circuits").mkdir()
    arms = {
        "one-off": smollm2.arm(("one", 0.0)),
        "one-half-all": smollm2.arm(("one", 0.5), scope="all"),
        "both": smollm2.arm(("one", 0.5), ("two", -1.0), scope="generated"),
    }
    arguments = [
        *(f"--circuit={name}={file}" for name, file in smollm2.files.items()),
        "--adapter=one-off=one@0",
        "--adapter=one-half-all=one@0.5:all",
        "--adapter=both=one@0.5+two@-1:generated",
        f"--circuit-dir={folder / 'circuits'}",
        f"--registry-dir={folder / 'registry'}",
        "--served-model-name=smollm2",
        "--max-circuits=6",
        "--max-model-len=512",
        "--max-num-seqs=16",
        f"--num-gpu-blocks-override={KV_BLOCKS}",
        "--api-server-count=2",
        "--enable-auto-tool-choice",
        "--tool-call-parser=hermes",
    ]
    with ExitStack() as stack:
        deployment = Deployment(smollm2, folder, arms, arguments, stack)
        deployment.start("--distributed-executor-backend=uni", spawned=True)
        yield deployment


@pytest.fixture(scope="package")
def prompt(smollm2: Subject) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(smollm2.path)
    ids: list[int] = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=False,
    )
    return ids


@pytest.fixture(scope="package")
def restarted(deployed: Deployment, prompt: list[int]) -> Restart:
    """SIGKILL in the middle of control actions; the next server has a LoRA adapter too."""
    contents, files = {}, {}
    for seed, name in enumerate(("k0.json", "k1.json", "k2.json"), 11):
        channels = deployed.write_circuit(name, seed)
        files[name] = Circuit.load(deployed.folder / "circuits" / name).digest
        contents[files[name]] = channels
    operator = Operator(deployed.server, files)
    operator.start()
    while operator.is_alive() and operator.replies < 40:
        time.sleep(0.003)
    deployed.server.kill()
    operator.join()
    stored = deployed.stored()
    lora = write_lora(deployed.folder / "lora", deployed.subject.oracle.model)
    deployed.start(
        "--enable-lora",
        "--max-lora-rank=8",
        "--max-loras=2",  # where all are taken, plain rows get the last one on a CPU (vLLM 0.32)
        f"--lora-modules=lora={lora}",
    )
    listed = [deployed.listed() for _ in range(12)]
    with deployed.server.http() as http:
        circuits = [name for name, entry in stored.items() if "digest" in entry]
        answers = {
            name: answer(http, "smollm2", prompt, {"cna_circuit": name, "cna_multiplier": 0.0})
            for name in circuits
        }
        for name in sorted(stored, key=lambda name: name in circuits):  # adapters first
            kind = "circuit" if name in circuits else "adapter"
            assert unload(http, kind, name).status_code == 200
    return Restart(operator, contents, stored, listed, answers, lora)
