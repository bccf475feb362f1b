# SPDX-License-Identifier: Apache-2.0
"""Self-test of exactness on a loaded model, by identities that need no other implementation.

The recorder sees what every hook hands to ``down_proj``; that the model's own code takes it from
there is proved at every start, and shows again in the next layer. Steered in layer l alone, the
layers before l must hold the same bits as in the plain pass, layer l the rounded product in the
circuit's neurons and the same bits in all others, and the layer after l must have changed.
Passes that are compared have the same shapes, so equal rows are equal to the last bit.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from cna_vllm.serving.config import CircuitTableError
from cna_vllm.serving.control import load_circuit, status, unload_circuit
from cna_vllm.serving.doctor import Check
from cna_vllm.serving.seams.front_end import admission_of
from cna_vllm.serving.seams.offline import engine_of
from cna_vllm.steering.circuit import Circuit
from cna_vllm.steering.layout import Ints, Layout, Places
from cna_vllm.steering.request import FIELD_RECORD, SCOPES, steer

if TYPE_CHECKING:
    from vllm import LLM

NAME = "cna-selftest"
MULTIPLIER = -1.5  # its product with a float of at most 16 bits is exact in float32
FRACTION = 8
PROMPT_TOKENS, OUTPUT_TOKENS = 8, 6
COUNTED = {"last": 0, "generated": -1, "all": PROMPT_TOKENS - 1}

Recorded = NDArray[np.float64]


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
        config, shape = self._gate.config, self._gate.registry.served.shape
        self._layout = layout = Layout(shape if config.max_expert_neurons else shape.dense())
        every = range(layout.num_layers)
        self._layers = [layer for layer in every if layout.width([layer])]
        # So that all layers together fit into a row of the table.
        self._most_routed = config.max_expert_neurons // layout.num_layers
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
        for layer, after in zip_longest(self._layers, self._layers[1:]):
            scope = "all" if layer % 2 else "last"
            chosen, end = self._some(layer), self._layout.layer(layer).stop
            with_circuit = self._steered(prompt, chosen, MULTIPLIER, scope)
            expected = self._scaled(plain, chosen, MULTIPLIER)
            place = None if after is None else self._layout.layer(after)
            reached = place is None or bool((with_circuit[place] != plain[place]).any())
            if not reached or not np.array_equal(with_circuit[:end], expected[:end]):
                wrong.append(layer)
        count = len(self._layers)
        return Check(
            f"m = {MULTIPLIER:g} in one layer: its neurons are the rounded product, all else "
            "up to it has the same bits, and the next layer changes",
            f"wrong in layers {wrong}" if wrong else f"{count} of {count} layers",
            not wrong,
        )

    def _all_layers(self, prompt: list[int], plain: Recorded) -> Check:
        chosen = self._of_all_layers()
        zero = not self._steered(prompt, chosen, 0.0, "all")[chosen].any()
        untouched = np.array_equal(self._steered(prompt, chosen, 0.0, "generated"), plain)
        return Check(
            "m = 0 in all layers: scope all ablates, scope generated leaves the prompt alone",
            f"{len(chosen)} neurons"
            if zero and untouched
            else f"ablated {zero}, prompt {untouched}",
            zero and untouched,
        )

    def _mixed_batch(self) -> list[Check]:
        prompts = [self._prompt() for _ in range(2 * len(SCOPES))]
        circuit = self._load(self._of_all_layers())
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

    def _some(self, layer: int) -> Ints:
        """Numbers of a share of a layer's neurons, of its dense MLP and of its experts."""
        place, dense = self._layout.layer(layer), self._layout.shape.widths[layer]
        end, middle = place.stop, place.start + dense
        chosen = self._sample(range(place.start, middle), dense)
        chosen += self._sample(range(middle, end), self._most_routed)
        return np.array(sorted(chosen))

    def _sample(self, numbers: range, most: int) -> list[int]:
        count = min(most, max(1, len(numbers) // FRACTION))
        return self._random.sample(numbers, min(count, len(numbers)))

    def _of_all_layers(self) -> Ints:
        return np.concatenate([self._some(layer) for layer in self._layers])

    def _load(self, chosen: Ints) -> Circuit:
        neurons = self._layout.neurons(chosen, np.zeros(len(chosen)))
        served = self._gate.registry.served
        circuit = Circuit(**served.of_circuits(), neurons=tuple(neurons))
        return load_circuit(self._llm, NAME, circuit)

    def _steered(self, prompt: list[int], chosen: Ints, multiplier: float, scope: str) -> Recorded:
        self._load(chosen)
        try:
            return self._record(prompt, self._gate.admit(steer(NAME, multiplier, scope=scope)))
        finally:
            unload_circuit(self._llm, NAME)

    def _scaled(self, plain: Recorded, chosen: Ints, multiplier: float) -> Recorded:
        """round(m * a) in the model's dtype, in the ``chosen`` neurons."""
        expected = plain.copy()
        product = torch.from_numpy(plain[chosen]).float() * multiplier
        expected[chosen] = product.to(self._dtype).double().numpy()
        return expected

    def _record(self, prompt: list[int], admitted: dict[str, Any] | None) -> Recorded:
        """float64 [neurons], which holds every dtype's values: the inputs of all down projections
        at the last prompt token."""
        self._llm.collective_rpc("cna_start_recording", args=({},))
        self._generate([prompt], [{**(admitted or {}), FIELD_RECORD: NAME}], tokens=1)
        recorded = np.full(self._layout.size, np.nan)
        for report in self._llm.collective_rpc("cna_take_recording"):
            values = np.frombuffer(report["groups"][NAME]["sum"], dtype=np.float64)
            recorded[Places.of(report["parts"], self._layout).neurons] = values
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
