# SPDX-License-Identifier: Apache-2.0
"""Models, circuits and request matrices shared by the tests that start real engines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from cna_vllm.checkpoints.models import default_model_path
from tests import tiny_models
from tests.oracles import Arm, Channels, HookedModel, Vectors, Verdict

MULTIPLIERS = (0.0, 0.5, 2.0, -1.0)
# For the interpreter, where every row takes its time; the two circuits at once have the others.
FEW_MULTIPLIERS = (0.0, 2.0)
SCOPES = ("last", "all", "generated")
PLAIN = Arm()


@dataclass(frozen=True)
class Subject:
    """A model, its oracle, two circuits that span all layers, and their files by name; vectors by
    name where a test adds some."""

    path: str
    oracle: HookedModel
    circuits: Mapping[str, Channels]
    files: Mapping[str, str]
    engine: Mapping[str, Any]
    vectors: Mapping[str, Vectors] = field(default_factory=dict)

    def config(self, **options: Any) -> dict[str, Any]:
        """Engine arguments with both circuits loaded at start, in float32, eager."""
        return {
            "model": self.path,
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 512,
            "max_num_seqs": 32,
            **self.engine,
            "additional_config": {"cna": {"circuits": dict(self.files), "max_circuits": 8}},
            **options,
        }

    def arm(self, *pairs: tuple[str, float], scope: str = "last") -> Arm:
        """Of (name, number) pairs: multipliers of circuits, coefficients of vectors."""
        return Arm(
            tuple((self.circuits[name], m) for name, m in pairs if name in self.circuits),
            scope,
            tuple((self.vectors[name], c) for name, c in pairs if name in self.vectors),
        )

    def fields(self, arm: Arm) -> dict[str, Any]:
        """The request fields that ask for ``arm``."""
        named = {**self.circuits, **self.vectors}
        names = {id(content): name for name, content in named.items()}
        fields: dict[str, Any] = {}
        for pairs, name_field, number_field in (
            (arm.circuits, "cna_circuit", "cna_multiplier"),
            (arm.vectors, "cna_vector", "cna_coefficient"),
        ):
            if pairs:
                fields[name_field] = [names[id(content)] for content, _ in pairs]
                fields[number_field] = [number for _, number in pairs]
        return {"extra_args": {**fields, "cna_scope": arm.scope}} if fields else {}

    def matrix(self, multipliers: Sequence[float] = MULTIPLIERS) -> list[Arm]:
        """Plain, every multiplier in every scope, and two circuits at once."""
        single = [self.arm(("one", m), scope=scope) for m in multipliers for scope in SCOPES]
        return [PLAIN, *single, self.arm(("one", 0.5), ("two", -1.0))]

    def requests(
        self, prompts: Sequence[Sequence[int]], arms: Sequence[Arm], **params: Any
    ) -> tuple[list[dict[str, Any]], list[tuple[Sequence[int], Arm]]]:
        """Every prompt in every arm, arms mixed within the batch, and what each one asked for."""
        wanted = [(prompt, arm) for prompt in prompts for arm in arms]
        return [
            {"prompt": list(prompt), "params": {**params, **self.fields(arm)}}
            for prompt, arm in wanted
        ], wanted

    def verdicts(
        self, wanted: Sequence[tuple[Sequence[int], Arm]], outputs: Sequence[Mapping[str, Any]]
    ) -> list[Verdict]:
        return [
            self.oracle.check(prompt, tokens, arm)
            for (prompt, arm), output in zip(wanted, outputs, strict=True)
            for tokens in output["token_ids"]
        ]


def subject(
    path: str, folder: Path, layers: int, width: int, per_layer: int, engine: Mapping[str, Any]
) -> Subject:
    """A model with two random circuits of ``per_layer`` neurons a layer, written to ``folder``."""
    circuits = {
        "one": tiny_models.channels(layers, width, per_layer, seed=1),
        "two": tiny_models.channels(layers, width, per_layer, seed=2),
    }
    files = {}
    for name, by_layer in circuits.items():
        file = folder / f"{name}.json"
        file.write_text(json.dumps(tiny_models.circuit_object(by_layer, layers, width)))
        files[name] = str(file)
    return Subject(path, HookedModel(path), circuits, files, engine)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """SmolLM2-135M-Instruct, the default model; circuits of 5% of its neurons."""
    path = str(default_model_path())
    return subject(path, tmp_path_factory.mktemp("smollm2"), 30, 1536, 80, {})


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A random 4-layer Llama; circuits of a fifth of its neurons."""
    folder = tmp_path_factory.mktemp("tiny")
    path = str(tiny_models.llama(folder / "model"))
    engine = {"skip_tokenizer_init": True}
    return subject(path, folder, tiny_models.LAYERS, tiny_models.WIDTH, 20, engine)


@pytest.fixture(scope="session")
def chats(smollm2: Subject) -> list[list[int]]:
    """Eight chat prompts of different lengths, as SmolLM2 token ids."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2.path)
    texts = [
        "Hello!",
        "What is the capital of France?",
        "Write a haiku about the sea.",
        "Name three fruits that are red and say which one you like best.",
        "Explain to a child of six years why the sky is blue during the day but dark at night.",
        "Give me a recipe for bread. " * 3,
        "Translate into German: the quick brown fox jumps over the lazy dog. " * 4,
        "A train leaves the station at noon and travels at eighty kilometres an hour. " * 8,
    ]
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=False,
        )
        for text in texts
    ]
