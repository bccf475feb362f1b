# SPDX-License-Identifier: Apache-2.0
"""A/B tests of two equal arms, from simulated answers through `evaluate`: the rate of rejection.

Answers are sampled: each prompt has its own chance of a refusal and its own typical length, the
same in both arms. Bounds are those of the binomial distribution at 99.9%; seeds are fixed.
"""

from __future__ import annotations

import gc
import random

import pytest
from scipy import stats

from cna_vllm.evaluation.ab import evaluate, load_metrics
from cna_vllm.evaluation.answers import collect
from cna_vllm.evaluation.outcomes import Analysis
from cna_vllm.evaluation.result import Result
from cna_vllm.steering.arms import parse_arm
from tests.simulated_ab import REFUSAL, describe, prompt_sets

RUNS, PROMPTS, LEVEL, CERTAINTY = 200, 40, 0.05, 0.999
ARMS = [parse_arm("plain"), parse_arm("again=refusal@0")]
METRICS = load_metrics(["refusal", "length:unit=words"])


@pytest.fixture(autouse=True, scope="module")
def frozen() -> None:
    """statsmodels' multipletests collects garbage in every call; this leaves it little to walk."""
    gc.collect()
    gc.freeze()


def run(seed: int, samples: int, shift: float = 0.0) -> Result:
    dice = random.Random(seed)
    sets = prompt_sets(PROMPTS, 0)
    rows = []
    for index, prompt in enumerate(sets[0].prompts):
        rate, typical = dice.betavariate(0.7, 0.7), dice.uniform(10, 30)
        for sample in range(samples):
            for arm in ARMS:
                lean = shift if arm.name == "again" else 0.0
                length = round(dice.expovariate(1 / typical)) + round(40 * lean) + 1
                text = REFUSAL if dice.random() < rate + lean else "word " * length
                rows.append(
                    {
                        "index": index,
                        "sample": sample,
                        "text": text,
                        **prompt.to_dict(),
                        **arm.to_dict(),
                    }
                )
    test = describe(ARMS, sets, samples=samples)
    answers = collect(rows, test.arm_names, test.prompt_sets, samples)
    return evaluate(test, answers, METRICS, analysis=Analysis(power=None, resamples=399, seed=seed))


def p_values(results: list[Result], metric: str) -> list[float]:
    return [
        outcome.differences[0].comparison.p_value or 0.0
        for result in results
        for outcome in result.outcomes
        if outcome.metric == metric
    ]


@pytest.mark.parametrize("samples", [1, 3])
def test_equal_arms_are_told_apart_at_the_stated_rate(samples: int) -> None:
    results = [run(seed, samples) for seed in range(RUNS)]
    most = stats.binom.ppf(CERTAINTY, RUNS, LEVEL)
    least = stats.binom.ppf(1 - CERTAINTY, RUNS, LEVEL)
    for metric in ("refusal", "length-words"):
        values = p_values(results, metric)
        assert len(values) == RUNS
        rejected = sum(p <= LEVEL for p in values)
        assert rejected <= most
        # The exact McNemar test is conservative; of a permutation test the rate is the level.
        assert rejected >= least or (metric == "refusal" and samples == 1)
    families = [[d.comparison.p_holm for o in r.outcomes for d in o.differences] for r in results]
    assert sum(min(p or 0.0 for p in family) <= LEVEL for family in families) <= most


def test_unequal_arms_are_told_apart() -> None:
    results = [run(seed, 1, shift=0.5) for seed in range(20)]
    assert sum(p <= LEVEL for p in p_values(results, "refusal")) >= 18
