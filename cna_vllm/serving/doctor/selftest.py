# SPDX-License-Identifier: Apache-2.0
"""Self-test of exactness on a loaded model, by identities that need no other implementation.

The recorder sees what every hook hands to ``down_proj``; that the model's own code takes it from
there is proved at every start, and shows again in the next layer. Steered in layer l alone, the
layers before l must hold the same bits as in the plain pass, layer l the rounded product in the
circuit's channels and the same bits in all others, and the layer after l must have changed.
Passes that are compared have the same shapes, so equal rows are equal to the last bit.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from cna_vllm.serving.config import CircuitTableError
from cna_vllm.serving.control import load_circuit, status, unload_circuit
from cna_vllm.serving.doctor import Check
from cna_vllm.serving.seams.front_end import admission_of
from cna_vllm.serving.seams.offline import engine_of
from cna_vllm.steering.circuit import Circuit, Neuron
from cna_vllm.steering.request import FIELD_RECORD, SCOPES, steer

if TYPE_CHECKING:
    from vllm import LLM

NAME = "cna-selftest"
MULTIPLIER = -1.5  # its product with a float of at most 16 bits is exact in float32
FRACTION = 8
PROMPT_TOKENS, OUTPUT_TOKENS = 8, 6
COUNTED = {"last": 0, "generated": -1, "all": PROMPT_TOKENS - 1}

Recorded = NDArray[np.float64]
Channels = Mapping[int, Sequence[int]]


@dataclass(frozen=True)
class _Output:
    """Greedy tokens, and their log probabilities, whose bits show what tokens cannot."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


def self_test(llm: LLM) -> list[Check]:
    """Checks an engine started with ``cna.record``; seconds, and two free rows of its table.

    Other circuits of the engine stay as they are. Its prefix cache is emptied.
    """
    try:
        return _SelfTest(llm).run()
    except CircuitTableError as error:
        return [Check("the table has two free rows for the self-test", str(error), False)]


class _SelfTest:
    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._gate = admission_of(llm)
        served = self._gate.registry.served
        self._layers, self._width = served.num_layers, served.intermediate_size
        self._random = random.Random(0)
        self._engine = engine_of(llm)
        self._dtype: torch.dtype = getattr(torch, self._engine.dtype)
        # Common tokens of every tokenizer: no image or other placeholder among them.
        self._vocabulary = range(3, min(self._engine.vocabulary, 1000))

    def run(self) -> list[Check]:
        prompt = self._prompt()
        plain = self._record(prompt, None)
        repeated = np.array_equal(plain, self._record(prompt, None))
        return [
            Check(
                "a repeated pass gives the same bits",
                "it does" if repeated else "it does not, so no comparison below means anything",
                repeated,
            ),
            self._layer_by_layer(prompt, plain),
            self._all_layers(prompt, plain),
            *self._mixed_batch(),
        ]

    def _layer_by_layer(self, prompt: list[int], plain: Recorded) -> Check:
        wrong = []
        for layer in range(self._layers):
            scope = "all" if layer % 2 else "last"
            channels = {layer: self._channels()}
            with_circuit = self._steered(prompt, channels, MULTIPLIER, scope)
            expected = self._scaled(plain[: layer + 1], channels, MULTIPLIER)
            reached = layer == self._layers - 1 or bool(
                (with_circuit[layer + 1] != plain[layer + 1]).any()
            )
            if not reached or not np.array_equal(with_circuit[: layer + 1], expected):
                wrong.append(layer)
        return Check(
            f"m = {MULTIPLIER:g} in one layer: its channels are the rounded product, all else "
            "up to it has the same bits, and the next layer changes",
            f"wrong in layers {wrong}" if wrong else f"{self._layers} of {self._layers} layers",
            not wrong,
        )

    def _all_layers(self, prompt: list[int], plain: Recorded) -> Check:
        channels = {layer: self._channels() for layer in range(self._layers)}
        ablated = self._steered(prompt, channels, 0.0, "all")
        zero = all(not ablated[layer, list(at)].any() for layer, at in channels.items())
        untouched = np.array_equal(self._steered(prompt, channels, 0.0, "generated"), plain)
        number = sum(map(len, channels.values()))
        return Check(
            "m = 0 in all layers: scope all ablates, scope generated leaves the prompt alone",
            f"{number} neurons" if zero and untouched else f"ablated {zero}, prompt {untouched}",
            zero and untouched,
        )

    def _mixed_batch(self) -> list[Check]:
        prompts = [self._prompt() for _ in range(2 * len(SCOPES))]
        circuit = self._load({layer: self._channels() for layer in range(self._layers)})
        try:
            before = self._counted(circuit)
            plain = self._answer(prompts, [None] * len(prompts))
            one = self._answer(prompts, [steer(NAME, 1.0)] * len(prompts))
            uncounted = self._counted(circuit) - before
            arms = [steer(NAME, MULTIPLIER, scope=s) if i else None for s in SCOPES for i in (0, 1)]
            mixed = self._answer(prompts, arms)
            counted = self._counted(circuit) - before - uncounted
            after = self._answer(prompts, [None] * len(prompts))
        finally:
            unload_circuit(self._llm, NAME)
        moved = sum(a != b for a, b in zip(mixed[1::2], plain[1::2], strict=True))
        expected = sum(COUNTED[scope] + OUTPUT_TOKENS for scope in SCOPES)
        # Drafted tokens are steered too, and how many there are depends on the drafter.
        exact = not self._engine.drafts
        return [
            _equal("plain requests in a batch with steered ones", mixed[::2], plain[::2]),
            _equal("plain requests before and after", after, plain),
            _equal("m = 1 and plain", one, plain),
            Check(
                "steered requests in that batch answer otherwise",
                f"{moved} of {len(SCOPES)}",
                moved == len(SCOPES),
            ),
            Check(
                f"steered tokens are counted: {expected} in three scopes, 0 for m = 1",
                f"{counted} and {uncounted}",
                uncounted == 0 and (counted == expected if exact else counted >= expected),
            ),
        ]

    def _prompt(self) -> list[int]:
        return [self._random.choice(self._vocabulary) for _ in range(PROMPT_TOKENS)]

    def _channels(self) -> list[int]:
        return self._random.sample(range(self._width), max(1, self._width // FRACTION))

    def _load(self, channels: Channels) -> Circuit:
        served = self._gate.registry.served
        neurons = tuple(Neuron(layer, index) for layer, at in channels.items() for index in at)
        return load_circuit(self._llm, NAME, Circuit(**served.of_circuits(), neurons=neurons))

    def _steered(
        self, prompt: list[int], channels: Channels, multiplier: float, scope: str
    ) -> Recorded:
        self._load(channels)
        try:
            return self._record(prompt, self._gate.admit(steer(NAME, multiplier, scope=scope)))
        finally:
            unload_circuit(self._llm, NAME)

    def _scaled(self, plain: Recorded, channels: Channels, multiplier: float) -> Recorded:
        """round(m * a) in the model's dtype, in ``channels``."""
        expected = plain.copy()
        for layer, at in channels.items():
            product = torch.from_numpy(plain[layer, at]).float() * multiplier
            expected[layer, at] = product.to(self._dtype).double().numpy()
        return expected

    def _record(self, prompt: list[int], admitted: dict[str, Any] | None) -> Recorded:
        """float64 [layers, width], which holds every dtype's values: the inputs of ``down_proj``
        at the last prompt token."""
        self._llm.collective_rpc("cna_start_recording", args=({},))
        self._generate([prompt], [{**(admitted or {}), FIELD_RECORD: NAME}], tokens=1)
        recorded = np.full((self._layers, self._width), np.nan)
        for report in self._llm.collective_rpc("cna_take_recording"):
            at = slice(report["offset"], report["offset"] + report["width"])
            values = np.frombuffer(report["groups"][NAME]["sum"], dtype=np.float64)
            recorded[report["layers"], at] = values.reshape(len(report["layers"]), -1)
        return recorded

    def _answer(
        self, prompts: list[list[int]], arms: Sequence[dict[str, Any] | None]
    ) -> list[_Output]:
        outputs = []
        for request in self._generate(prompts, arms, tokens=OUTPUT_TOKENS):
            output = request.outputs[0]
            chosen = zip(output.token_ids, output.logprobs, strict=True)
            logprobs = tuple(step[token].logprob for token, step in chosen)
            outputs.append(_Output(tuple(output.token_ids), logprobs))
        return outputs

    def _generate(
        self, prompts: list[list[int]], extra: Sequence[dict[str, Any] | None], *, tokens: int
    ) -> list[Any]:
        from vllm import SamplingParams, TokensPrompt

        # A hit would make a pass shorter than the one it is compared with.
        self._llm.reset_prefix_cache()
        params = [
            SamplingParams(
                temperature=0.0,
                max_tokens=tokens,
                ignore_eos=True,
                detokenize=False,
                logprobs=1,
                extra_args=one,
            )
            for one in extra
        ]
        inputs = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
        outputs: list[Any] = self._llm.generate(inputs, params, use_tqdm=False)
        return outputs

    def _counted(self, circuit: Circuit) -> int:
        tokens: int = status(self._llm)[0]["steered_tokens"].get(circuit.digest, 0)
        return tokens


def _equal(claim: str, found: Sequence[_Output], expected: Sequence[_Output]) -> Check:
    equal = sum(a == b for a, b in zip(found, expected, strict=True))
    tokens = sum(a.tokens == b.tokens for a, b in zip(found, expected, strict=True))
    return Check(
        f"{claim}: the same tokens and log probabilities, to the last bit",
        f"{equal} of {len(expected)}"
        + ("" if equal == len(expected) else f"; the same tokens {tokens} of {len(expected)}"),
        equal == len(expected),
    )
