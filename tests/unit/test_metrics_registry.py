# SPDX-License-Identifier: Apache-2.0
"""Finding metrics by specification, plugins beside our own, and what a bad one is told."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from cna_vllm.evaluation.metrics import (
    Answer,
    EngineMetric,
    Metric,
    MetricError,
    Score,
    known_metrics,
    load_metric,
    score_answers,
)
from cna_vllm.evaluation.metrics.judge import Judge
from cna_vllm.evaluation.metrics.ngrams import Distinct
from cna_vllm.evaluation.metrics.perplexity import Perplexity
from cna_vllm.evaluation.metrics.text import Length

OURS = {
    "distinct": "distinct",
    "empty": "empty",
    "false_refusal": "false_refusal",
    "judge": "judge:url=http://localhost:1/v1,model=m",
    "language": "language:code=fr",
    "length": "length",
    "perplexity": "perplexity",
    "quality": "quality",
    "refusal": "refusal",
    "refusal_keywords": "refusal_keywords",
    "regex": "regex:pattern=x",
    "repetition": "repetition",
}
PLUGIN = '''
class Vowels:
    """Share of vowels."""
    kind = "continuous"
    better = "neither"
    description = "Share of vowels."
    def __init__(self, letters: str = "aeiou", scale: float = 1.0) -> None:
        self.name, self.letters, self.scale = f"vowels-{letters}", letters, scale
    def score(self, answers):
        return [self.scale * sum(c in self.letters for c in a.text) / len(a.text) for a in answers]
NOTHING = lambda: 3
'''


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed distribution with metrics of its own."""
    (tmp_path / "vowel_metrics.py").write_text(PLUGIN, "utf-8")
    info = tmp_path / "vowel_metrics-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vowel-metrics\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[cna_vllm.metrics]\nvowels = vowel_metrics:Vowels\nnothing = vowel_metrics:NOTHING\n"
        "gone = vowel_metrics:Gone\nlength = vowel_metrics:Vowels\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("vowel_metrics", None)


@pytest.mark.parametrize("name", OURS)
def test_ours_describe_themselves(name: str) -> None:
    metric = load_metric(OURS[name])
    assert isinstance(metric, EngineMetric if name == "perplexity" else Metric)
    assert metric.name.startswith(name)
    assert metric.kind in ("binary", "continuous")
    assert metric.better in ("higher", "lower", "neither")
    assert metric.description.endswith(".") and "\n" not in metric.description
    assert name in known_metrics()


def test_options_that_change_the_meaning_are_in_the_name() -> None:
    specs = ("distinct:n=1", "distinct:n=2", "distinct:n=2,unit=tokens", "length:unit=words")
    assert len({load_metric(spec).name for spec in specs}) == 4
    assert "3-grams" in load_metric("quality").description
    assert "4-grams" in load_metric("repetition:n=4").description


def test_a_plugin_stands_beside_ours(plugin: None) -> None:
    assert "vowels" in known_metrics() and "refusal" in known_metrics()
    metric = load_metric("vowels:letters=e,scale=2")
    assert metric.name == "vowels-e"
    assert score_answers(metric, [Answer("p", "egg")]) == [pytest.approx(2 / 3)]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("nothing", "metric nothing: vowel_metrics:NOTHING has neither score nor score_with"),
        ("gone", "metric gone: its entry point vowel_metrics:Gone cannot be loaded"),
        ("length", "metric length: brought by several packages"),
    ],
)
def test_broken_plugins(plugin: None, spec: str, says: str) -> None:
    with pytest.raises(MetricError) as refused:
        load_metric(spec)
    assert str(refused.value).startswith(says) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("refusals", "unknown metric 'refusals'; use one of: distinct, empty, false_refusal"),
        ("", "unknown metric ''; use one of"),
        ("distinct:m=2", "metric distinct: unknown option 'm'; its options are: n, unit"),
        ("refusal:n=2", "metric refusal: unknown option 'n'; its options are: none"),
        ("distinct:n=two", "metric distinct: n='two' is not a whole number"),
        ("distinct:n=1.5", "metric distinct: n='1.5' is not a whole number"),
        ("distinct:n=0", "metric distinct: n=0 must be at least 1"),
        ("distinct:n=1,n=2", "metric distinct: option n is given twice"),
        ("distinct:2", "metric distinct: '2' is not an option; write distinct:key=value"),
        ("distinct:", "metric distinct: '' is not an option"),
        ("distinct:n=", "metric distinct: 'n=' is not an option"),
        ("distinct:unit=bytes", "metric distinct: unit='bytes'; use one of words, tokens"),
        ("length:unit=bytes", "metric length: unit='bytes'; use one of tokens"),
        ("perplexity:scale=bits", "metric perplexity: scale='bits'; use one of"),
        ("language", "metric language: needs option code; write language:code=..."),
        ("language:code=fr,min_letters=0", "metric language: min_letters=0 must be at least 1"),
        ("judge:model=m", "metric judge: needs option url"),
        ("judge:url=localhost,model=m", "metric judge: url='localhost' is not an http(s) address"),
        ("judge:url=http://h/v1,model=m,rubric=x", "metric judge: rubric='x'; use one of"),
        ("judge:url=http://h/v1,model=m,timeout=nan", "metric judge: timeout=nan must be"),
        ("judge:url=http://h/v1,model=m,workers=0", "metric judge: workers=0 must be at least 1"),
        ("judge:url=http://h/v1,model=m,key_env=CNA_NO_KEY", "metric judge: key_env=CNA_NO_KEY"),
    ],
)
def test_bad_specifications(spec: str, says: str) -> None:
    with pytest.raises(MetricError) as refused:
        load_metric(spec)
    assert str(refused.value).startswith(says)
    assert "\n" not in str(refused.value)
    assert isinstance(refused.value, ValueError)


class Fixed:
    name = "fixed"
    description = "What it is told."
    better = "neither"

    def __init__(self, kind: str, *given: Score) -> None:
        self.kind, self.given = kind, list(given)

    def score(self, answers: Sequence[Answer]) -> list[Score]:
        return self.given


@pytest.mark.parametrize(
    ("kind", "given", "says"),
    [
        ("binary", (1.0,), "gave 1 scores for 2 answers"),
        ("binary", (1.0, 0.5), "is binary but scored answer 1 0.5"),
        ("binary", (1.0, float("nan")), "is binary but scored answer 1 nan"),
        ("continuous", (float("nan"), 1.0), "scored answer 0 nan; use None"),
        ("continuous", (1.0, float("inf")), "scored answer 1 inf; use None"),
    ],
)
def test_a_metric_that_breaks_its_contract(kind: str, given: tuple[Score, ...], says: str) -> None:
    with pytest.raises(MetricError, match="metric fixed: ") as refused:
        score_answers(Fixed(kind, *given), [Answer("p", "a")] * 2)  # type: ignore[arg-type]
    assert says in str(refused.value)


def test_tags_exclude_each_other() -> None:
    with pytest.raises(MetricError, match="cannot be both benign and harmful"):
        Answer("p", "a", tags=frozenset({"benign", "harmful"}))


def test_finding_a_metric_loads_nothing_heavy() -> None:
    code = (
        "import sys; from cna_vllm.evaluation.metrics import load_metric; load_metric('refusal'); "
        "print({'vllm', 'torch', 'numpy', 'scipy', 'openai'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_choice_is_checked_wherever_a_metric_is_made() -> None:
    for make, says in (
        (lambda: Distinct(unit="bytes"), "metric distinct: unit='bytes'; use one of words"),  # type: ignore[arg-type]
        (lambda: Length(unit="bytes"), "metric length: unit='bytes'; use one of tokens"),  # type: ignore[arg-type]
        (lambda: Perplexity(scale="bits"), "metric perplexity: scale='bits'; use one of"),  # type: ignore[arg-type]
        (lambda: Judge("http://h", "m", rubric="x"), "metric judge: rubric='x'; use one of"),  # type: ignore[arg-type]
    ):
        with pytest.raises(MetricError, match=says):
            make()
