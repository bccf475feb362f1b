# SPDX-License-Identifier: Apache-2.0
"""Discovery in the engine finds what Hugging Face hooks find."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cna_vllm import Circuit
from cna_vllm.discovery import diverse_prompts
from tests import tiny_models
from tests.engine_job import V1, V2, run_engine
from tests.integration.conftest import PLAIN, Subject
from tests.oracles import HookedModel, assert_token_exact

pytestmark = pytest.mark.engine

Ids = list[int]

CONTRASTS = (
    (
        ["Bonjour, comment vas-tu ?", "Parle-moi de la mer.", "Écris un poème court."],
        ["Hello, how are you?", "Tell me about the sea.", "Write a short poem.", "Why?"],
    ),
    (
        ["I love this.", "What a wonderful day!", "You are so kind."],
        ["I hate this.", "What a terrible day!", "You are so cruel."],
    ),
)
SIZES = (1, 10, 46, 1000)
STRICT = 46  # beyond it, two means may cancel so far that float32 itself loses 1e-4 of a delta


def rows_of(oracle: HookedModel, prompts: Sequence[Ids]) -> torch.Tensor:
    """float64 [prompts, layers, intermediate_size] from hooks on the Hugging Face model."""
    return torch.stack([oracle.down_proj_inputs(ids).double() for ids in prompts])


@dataclass(frozen=True)
class Contrast:
    """delta: float64 [layers, intermediate_size]; scale: the larger mean |a| of the two sets."""

    delta: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def of(cls, oracle: HookedModel, positive: Sequence[Ids], negative: Sequence[Ids]) -> Contrast:
        above, below = rows_of(oracle, positive), rows_of(oracle, negative)
        scale = torch.maximum(above.abs().mean(0), below.abs().mean(0))
        return cls(above.mean(0) - below.mean(0), scale)


def chat(subject: Subject, texts: Sequence[str]) -> list[Ids]:
    tokenizer = AutoTokenizer.from_pretrained(subject.path)
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=False,
        )
        for text in texts
    ]


def check(circuit: Circuit, truth: Contrast, k: int, universal: Sequence[int] = ()) -> None:
    """The k largest |delta|, in any order where relative differences are under 1e-5.

    Deltas are within relative 1e-4; but where one is what is left of means over 20 times as
    large, both forward passes' own float32 rounding is more than that, and the bound is relative
    5e-6 of those means.
    """
    assert len(circuit) == k
    width = truth.delta.shape[1]
    strength = truth.delta.abs().flatten()
    strength[list(universal)] = 0.0
    threshold = float(strength.topk(k).values[-1])
    chosen = {n.layer * width + n.index for n in circuit.neurons}
    expected = set(strength.topk(k).indices.tolist())
    for index in chosen ^ expected:
        assert abs(float(strength[index]) - threshold) <= 1e-5 * threshold
    excused = 0
    for neuron in circuit.neurons:
        want = float(truth.delta[neuron.layer, neuron.index])
        error = abs(neuron.delta - want)
        excused += error > 1e-4 * abs(want)
        scale = float(truth.scale[neuron.layer, neuron.index])
        assert error <= max(1e-4 * abs(want), 5e-6 * scale)
    print(f"{k} neurons, {excused} with cancelling means")
    assert excused <= (0 if k <= STRICT else k // 100)


def universal_of(rows: torch.Tensor, k: int, threshold: float) -> list[int]:
    """Neurons among the k largest |a| of at least that share of the prompts, by a plain count.

    Asserts that no prompt's k-th place is so close that rounding could decide it.
    """
    strength = rows.abs().flatten(1)
    top = strength.topk(k + 1, dim=1)
    counts = np.bincount(top.indices[:, :k].flatten().tolist(), minlength=strength.shape[1])
    needed = int(np.ceil(threshold * len(rows)))
    unsure = top.values[:, k - 1] - top.values[:, k] < 1e-4 * top.values[:, k]
    slack = int(unsure.sum())
    assert not ((counts >= needed - slack) & (counts < needed + slack)).any()
    return np.flatnonzero(counts >= needed).tolist()


def all_contrasts(sizes: Sequence[int]) -> list[dict[str, Any]]:
    return [
        {
            "op": "discover",
            "positive": positive,
            "negative": negative,
            "top_k": k,
            "universal": "none",
        }
        for positive, negative in CONTRASTS
        for k in sizes
    ]


def check_all(subject: Subject, found: Sequence[Mapping[str, Any]], sizes: Sequence[int]) -> None:
    circuits = iter(found)
    for positive, negative in CONTRASTS:
        truth = Contrast.of(subject.oracle, chat(subject, positive), chat(subject, negative))
        for k in sizes:
            check(Circuit.from_dict(next(circuits)), truth, k)


def test_options_and_mixed_traffic(smollm2: Subject, chats: list[Ids]) -> None:
    """One engine: two contrasts by four k, the packaged filter, rows, and other requests."""
    positive, negative = CONTRASTS[0]
    sets = {"positive": positive, "negative": negative}
    french = {name: chat(smollm2, texts) for name, texts in sets.items()}
    others, wanted = smollm2.requests(
        chats[:3], [PLAIN, *smollm2.matrix()[:4]], max_tokens=8, ignore_eos=True
    )
    steps = [
        *all_contrasts(SIZES),
        {"op": "discover", **sets},
        {"op": "discover", **sets, "preset": "reference", "system": "Be brief."},
        {"op": "discover", **sets, "sign": "positive", "layers": [28, 29], "bootstrap": 5},
        {"op": "discover", **sets, "holdout": 0.34, "universal": "none"},
        {"op": "activations", "prompts": positive, "layers": [3, 29]},
        {"op": "record_among", "recorded": french, "others": others},
    ]
    engine = smollm2.config(
        additional_config={
            "cna": {"record": True, "circuits": dict(smollm2.files), "max_circuits": 8}
        }
    )
    results = run_engine(engine, steps)
    contrasts = len(CONTRASTS) * len(SIZES)
    check_all(smollm2, results[:contrasts], SIZES)
    paper, reference, bootstrapped, held_out, rows, mixed = results[contrasts:]

    truth = Contrast.of(smollm2.oracle, french["positive"], french["negative"])
    diverse = rows_of(smollm2.oracle, chat(smollm2, [str(p.text) for p in diverse_prompts()]))
    universal = universal_of(diverse, 46, 0.8)
    assert universal, "the packaged prompts find universal neurons in SmolLM2"
    check(Circuit.from_dict(paper), truth, 46, universal)
    assert paper["method"]["universal"]["found"] == len(universal)
    assert paper["method"]["fraction"] == 0.001
    assert (paper["prompts"]["positive"], paper["prompts"]["negative"]) == (3, 4)

    assert len(reference["neurons"]) == 200
    assert {n["layer"] for n in reference["neurons"]} <= set(range(2, 30))
    assert reference["method"]["universal"] is None
    assert reference["method"]["system"] == "Be brief."

    assert {n["layer"] for n in bootstrapped["neurons"]} <= {28, 29}
    assert all(n["delta"] > 0 for n in bootstrapped["neurons"])
    stable = bootstrapped["method"]["bootstrap"]
    assert stable["resamples"] == 5 and 0 < stable["mean_jaccard"] <= 1
    assert len(stable["frequency"]) == len(bootstrapped["neurons"])

    held = held_out["method"]["holdout"]
    assert (held["positive"], held["negative"]) == (1, 1)
    assert 0 <= held["auroc"] <= 1
    used = held_out["prompts"]
    assert (used["positive"], used["negative"]) == (2, 3), "those that selection saw"
    assert held_out["method"]["chat_template"] is True

    expected = rows_of(smollm2.oracle, french["positive"])
    assert set(rows) == {"3", "29"}
    for layer, values in rows.items():
        assert_close(np.array(values), expected[:, int(layer)].numpy())

    found = {name: torch.tensor(mean) for name, mean in mixed["means"].items()}
    assert_close((found["positive"] - found["negative"]).numpy(), truth.delta.numpy())
    assert_token_exact(smollm2.verdicts(wanted, mixed["others"]), "beside a recording")


def assert_close(found: NDArray[Any], expected: NDArray[Any]) -> None:
    """Relative to the largest value: small activations are differences of large ones."""
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


# A prompt as text, as a message and as token ids is one prompt.
EVERY_FORM = """
import numpy as np
from cna_vllm.discovery import record_activations

chat = [{"role": "user", "content": "Why is the sea blue?"}]
ids = llm.get_tokenizer().apply_chat_template(
    chat, tokenize=True, add_generation_prompt=True, return_dict=False
)
rows = record_activations(llm, [chat[0]["content"], chat, ids], layers=[29])[29]
assert np.abs(rows - rows[0]).max() <= 1e-5 * np.abs(rows).max() and rows.any()
"""


def test_chunked_prefill(smollm2: Subject) -> None:
    engine = smollm2.config(
        additional_config={"cna": {"record": True}}, max_num_batched_tokens=16, max_num_seqs=8
    )
    steps = [*all_contrasts(SIZES[1:2]), {"op": "run", "code": EVERY_FORM}]
    *found, _ = run_engine(engine, steps)
    check_all(smollm2, found, SIZES[1:2])


PLANTED = (1, 17)
RULE = {"fraction": 0.01, "threshold": 0.8}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in which one neuron is always huge, with a tokenizer of one word a token."""
    folder = tiny_models.llama(tmp_path_factory.mktemp("planted"))
    oracle = HookedModel(folder)
    with torch.no_grad():
        layers = oracle.model.model.layers
        # A common direction of all tokens, which this neuron reads.
        oracle.model.model.embed_tokens.weight += 4.0
        layer, index = PLANTED
        layers[layer].mlp.gate_proj.weight[index] = 8.0
        layers[layer].mlp.up_proj.weight[index] = 8.0
        # Heard nowhere, so that all other neurons still depend on the prompt.
        layers[layer].mlp.down_proj.weight[:, index] = 0.0
    oracle.model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(tiny_models.VOCABULARY)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


def as_text(prompts: Sequence[Ids]) -> list[str]:
    return [" ".join(f"w{i}" for i in ids) for ids in prompts]


@pytest.mark.parametrize(
    ("runner", "options", "sizes"),
    [
        ({**V1, "VLLM_CPU_OMP_THREADS_BIND": "0|1"}, {"tensor_parallel_size": 2}, (1, 7, 60)),
        (V2, {"max_num_batched_tokens": 32}, (7,)),  # every row takes its time there
    ],
    ids=["V1-tensor-parallel-2", "V2-interpreted-chunked"],
)
def test_a_planted_universal_neuron_is_excluded(
    planted: Path, runner: Mapping[str, str], options: Mapping[str, Any], sizes: Sequence[int]
) -> None:
    """Found and left out, whichever rank has it; the circuit still has k neurons."""
    positive, negative = tiny_models.prompts(6, seed=1), tiny_models.prompts(5, seed=2)
    diverse = tiny_models.prompts(9, seed=3)
    sets = {"positive": as_text(positive), "negative": as_text(negative)}
    everything = tiny_models.LAYERS * tiny_models.WIDTH
    filtered = {"universal": as_text(diverse), "rule": RULE}
    steps: list[dict[str, Any]] = [
        {"op": "discover", **sets, "top_k": k, **choice}
        for choice in ({"universal": "none"}, filtered)
        for k in sizes
    ]
    steps.append({"op": "discover", **sets, "top_k": everything, **filtered})
    steps.append({"op": "activations", "prompts": sets["positive"]})
    refused = refusals(sets) if len(sizes) > 1 else []
    steps += [step for step, _ in refused]
    engine = {
        "model": str(planted),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 32,
        "additional_config": {"cna": {"record": True}},
        **options,
    }
    results = run_engine(engine, steps, env=runner)
    oracle = HookedModel(planted)
    truth = Contrast.of(oracle, positive, negative)
    universal = universal_of(rows_of(oracle, diverse), 3, 0.8)
    at = PLANTED[0] * tiny_models.WIDTH + PLANTED[1]
    assert at in universal
    plain, some = results[: len(sizes)], results[len(sizes) : 2 * len(sizes)]
    every, activations, *messages = results[2 * len(sizes) :]
    for result, k in zip(plain, sizes, strict=True):
        check(Circuit.from_dict(result), truth, k)
        assert at in {n["layer"] * tiny_models.WIDTH + n["index"] for n in result["neurons"]}
    for result, k in zip(some, sizes, strict=True):
        check(Circuit.from_dict(result), truth, k, universal)
        assert result["method"]["universal"]["kept_out"] >= 1
    whole = {n["layer"] * tiny_models.WIDTH + n["index"] for n in every["neurons"]}
    assert set(range(everything)) - whole == set(universal)
    rows = np.stack([activations[str(layer)] for layer in range(tiny_models.LAYERS)], axis=1)
    assert_close(rows, rows_of(oracle, positive).numpy())
    for found, (_, says) in zip(messages, refused, strict=True):
        if says is None:
            assert found["neurons"]
        else:
            assert says in found


def refusals(sets: Mapping[str, Sequence[str]]) -> list[tuple[dict[str, Any], str | None]]:
    """Awkward prompts, and what is said about them; None where a circuit is found."""
    positive, negative = list(sets["positive"]), list(sets["negative"])
    long = " ".join(["w5"] * 512)
    cases: list[tuple[list[str], list[str], dict[str, Any], str | None]] = [
        ([], negative, {}, "at least one positive and one negative prompt, got 0 and 5"),
        (positive, positive[::-1], {}, "prompts are the same"),
        (positive, positive * 2, {}, "prompts are the same"),
        (positive, [*negative, long], {}, "negative prompt 6 is 512 tokens long"),
        (positive, negative, {"universal": [long]}, "universal prompt 1 is 512 tokens long"),
        (positive, negative, {"layers": [4]}, "layers [4] are not in 0..3"),
        (positive, negative, {"bootstrap": 2, "max_bytes": 1000}, "over max_bytes = 1000"),
        (positive, negative, {"holdout": 0.01}, "leaves a part of them empty"),
        (positive, negative, {"system": "x", "raw": True}, "needs the chat template"),
        (positive, negative, {"system": "x"}, "positive prompt 1: messages: this model has no"),
        (positive[:1], negative[:1], {}, None),
        (positive[:2], negative, {}, None),
        (positive * 2, negative, {}, None),
    ]
    return [
        ({"op": "discover", "positive": p, "negative": n, "universal": "none", **o}, says)
        for p, n, o, says in cases
    ]
