# SPDX-License-Identifier: Apache-2.0
"""One model under evaluation: its engine, its circuits and vectors, and the folder that keeps all.

Everything costly is kept as it is made, so that a run that was ended goes on where it stopped:
circuits and vectors as files, answers row by row, accuracies arm by arm.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cna_vllm.evaluation.ab import load_metrics, plan_rows, rescore, run_ab
from cna_vllm.evaluation.answers import PromptSet, collect, read_rows
from cna_vllm.evaluation.outcomes import Analysis
from cna_vllm.evaluation.paper.rows import Row
from cna_vllm.evaluation.paper.settings import ONE_PART, EvalError, Settings
from cna_vllm.evaluation.report import write_report
from cna_vllm.evaluation.result import (
    ANSWERS,
    REPORT,
    RESULT,
    Result,
    answered,
    batch_identity,
    load,
    write_json,
)
from cna_vllm.serving.seams.front_end import admission_of
from cna_vllm.serving.seams.offline import engine_of
from cna_vllm.steering.arms import Arm
from cna_vllm.steering.circuit import Circuit
from cna_vllm.steering.vectors import Form, VectorSet
from cna_vllm.text.prompts import Prompt

if TYPE_CHECKING:
    from vllm import LLM

    from cna_vllm.evaluation.paper.harness import Task

SETTINGS_FILE = "settings.json"
BASE_FILE = "base.json"
PLAIN = Arm("plain")


@dataclass(frozen=True)
class Figures:
    """The estimates of one A/B test."""

    part: str
    result: Result

    @property
    def metrics(self) -> list[str]:
        """Names of its metrics."""
        return [metric.name for metric in self.result.metrics]

    def row(
        self,
        arm: Arm,
        prompts: str,
        metric: str,
        published: float | None = None,
        bound: str = "",
    ) -> Row:
        """One arm's estimate of a metric on a prompt set; empty where nothing could be scored."""
        what = f"{metric}, {arm.name}"
        bound = "" if published is None else bound
        for outcome in self.result.outcomes:
            if (outcome.metric, outcome.prompt_set) == (metric, prompts):
                found = next(e for e in outcome.estimates if e.arm == arm.name)
                low, high = found.interval or (None, None)
                return Row(self.part, what, found.value, low, high, found.n, published, bound)
        return Row(self.part, what, None, n=0, published=published, bound=bound)


@dataclass(frozen=True)
class Study:
    """Settings, an engine with `record` and room for circuits and vectors, and a folder.

    engine: what of it decides the answers. task: of mmlu, where that is a part.
    """

    llm: LLM
    settings: Settings
    folder: Path
    engine: Mapping[str, Any]
    task: Task | None

    @property
    def refusal(self) -> list[str]:
        """Specifications of the two rules of refusal, the keywords first."""
        keywords = self.settings.keywords
        return [f"refusal_keywords{f':phrases={keywords}' if keywords else ''}", "refusal"]

    def circuit(
        self,
        name: str,
        positive: Sequence[Prompt] = (),
        negative: Sequence[Prompt] = (),
        *,
        top_k: int | None = None,
    ) -> Circuit:
        """The circuit of a contrast (default: the small one), found once, kept as `NAME.json`,
        resident as `name`."""
        from cna_vllm.discovery import discover
        from cna_vllm.serving.control import load_circuit

        positive, negative = positive or self.settings.positive, negative or self.settings.negative
        preset: Any = self.settings.preset
        path = self.folder / f"{name}.json"
        if not path.exists():
            discover(self.llm, positive, negative, preset=preset, top_k=top_k).save(path)
        circuit = Circuit.load(path)
        if not self._resident(name, circuit.digest):
            load_circuit(self.llm, name, circuit)
        return circuit

    def vectors(self, name: str, *, form: Form, layers: Sequence[int] | None = None) -> None:
        """The mean differences of the small contrast, kept as `NAME.safetensors`, resident as
        `name`."""
        from cna_vllm.baselines import discover_vectors
        from cna_vllm.serving.control import load_vectors

        contrast = self.settings.positive, self.settings.negative
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            discover_vectors(self.llm, *contrast, form=form, layers=layers).save(path)
        found = VectorSet.load(path)
        if not self._resident(name, found.digest):
            load_vectors(self.llm, name, found)

    def _contents(self) -> Mapping[str, Circuit | VectorSet]:
        names = admission_of(self.llm).registry.names()  # list_vectors wants an engine with vectors
        return {**names.circuits, **names.vectors}

    def _resident(self, name: str, digest: str) -> bool:
        resident = self._contents().get(name)
        return resident is not None and resident.digest == digest

    @property
    def sampling(self) -> dict[str, Any]:
        """Greedy, as the reference; of the model's generation config, its repetition penalty,
        which changes greedy answers too and which the reference applies as well."""
        penalty = self.llm.get_default_sampling_params().repetition_penalty
        longest = self.settings.max_tokens
        return {"temperature": 0.0, "max_tokens": longest, "repetition_penalty": penalty}

    def answers(
        self,
        part: str,
        arms: Sequence[Arm],
        prompts: Mapping[str, Sequence[Prompt]],
        metrics: Sequence[str],
    ) -> Figures:
        """An A/B test of the arms in the folder `part`, with its report; prompt sets are named by
        their tag. A test that is there is not scored again: a judge costs money."""
        out, seed = self.folder / part, self.settings.seed
        sets = [PromptSet(tag, found, tag) for tag, found in prompts.items()]
        steering = self._steering(arms)
        rows = plan_rows(arms, sets, self.sampling, samples=1, seed=seed, raw=False)
        model = engine_of(self.llm).model
        if answered(out, rows, batch_identity(model, steering, self.engine)) is not None:
            _, scored, _, _ = load(out / RESULT)
            if [metric.spec for metric in scored] == list(metrics):
                return Figures(part, rescore(out)[0])
        result = run_ab(
            self.llm,
            arms,
            sets,
            load_metrics(metrics),
            out=out,
            sampling=self.sampling,
            seed=seed,
            analysis=Analysis(seed=seed),
            steering=steering,
            identity=self.engine,
        )
        test = result.test
        found = collect(read_rows(out / ANSWERS), test.arm_names, test.prompt_sets, test.samples)
        write_report(result, found, out / REPORT)
        return Figures(part, result)

    def _steering(self, arms: Sequence[Arm]) -> dict[str, dict[str, Any]]:
        """What the arms' names stand for, so that answers to other content are not reused."""
        contents = self._contents()
        named = {name for arm in arms for name, _ in (*arm.circuits, *arm.vectors)}
        return {name: {"digest": contents[name].digest} for name in sorted(named)}

    def base_circuit(self) -> Circuit | None:
        """The base model's, where it was found before this engine started."""
        path = self.folder / BASE_FILE
        return Circuit.load(path) if path.exists() else None

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """JSON from the file `name`, or else what `make()` returns, written there."""
        path = self.folder / name
        if path.exists():
            return json.loads(path.read_text("utf-8"))
        value = make()
        path.parent.mkdir(exist_ok=True)
        write_json(path, value)
        return value


def claim(folder: Path, settings: Settings, engine: Mapping[str, Any]) -> None:
    """Makes the folder this evaluation's, or finds that it already is. Parts may come later.

    engine: what of it decides the answers.

    Raises:
        EvalError: it holds an evaluation with other settings, or other files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS_FILE
    of_engine = {f"engine's {name}": value for name, value in engine.items()}
    mine = json.loads(json.dumps({**settings.identity(), **of_engine}))
    if path.exists():
        try:
            theirs: Mapping[str, Any] = json.loads(path.read_text("utf-8"))
            mine |= {k: theirs.get(k) for k in ONE_PART if mine[k] is None}
        except (ValueError, AttributeError) as error:
            raise EvalError(
                f"--out {folder}: {SETTINGS_FILE} cannot be read; name a new folder"
            ) from error
        differing = {k for k in {*mine, *theirs} if mine.get(k) != theirs.get(k)}
        differing -= {k for k in ONE_PART if theirs.get(k) is None}
        if differing:
            raise EvalError(
                f"--out {folder}: holds an evaluation with other settings "
                f"({', '.join(sorted(differing))}); name a new folder"
            )
    elif any(folder.iterdir()):
        raise EvalError(f"--out {folder}: is not empty and no evaluation; name a new folder")
    write_json(path, mine)
