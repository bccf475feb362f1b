# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness on an arm of a running engine.

Log-likelihood tasks score tokens of the *prompt*: the harness sends context and continuation
together. Only scope `all` steers those tokens, so every other scope is refused here rather than
scored as if it had been steered.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from cna_vllm.arms import Arm

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from vllm import LLM


class HarnessError(ValueError):
    """A task that cannot be had or cannot be run: one line."""


class ArmLM(TemplateLM):
    """One arm of an engine, as the harness sees a model. Text is sent without a chat template."""

    def __init__(self, llm: LLM, arm: Arm) -> None:
        """Raises HarnessError where the arm is steered in another scope than `all`."""
        super().__init__()
        if arm.extra_args() and arm.scope != "all":
            raise HarnessError(
                f"arm {arm.name}: its scope is {arm.scope!r}; the harness scores tokens of the "
                "prompt, so use scope 'all'"
            )
        self.llm, self.arm = llm, arm
        self.tokenizer = llm.get_tokenizer()

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **special))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Sum of the continuation's log-probabilities, and whether each token is the likeliest.

        A context too long for the engine loses its beginning, as in the harness's own models.
        """
        from vllm import SamplingParams, TokensPrompt

        longest = self.llm.llm_engine.model_config.max_model_len - 1
        sequences = [
            ([*context, *continuation][-longest:], len(continuation))
            for _, context, continuation in requests
        ]
        params = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=1, extra_args=self.arm.extra_args()
        )
        outputs = self.llm.generate(
            [TokensPrompt(prompt_token_ids=tokens) for tokens, _ in sequences], params
        )
        scores = []
        for (tokens, length), output in zip(sequences, outputs, strict=True):
            steps = output.prompt_logprobs[-length:]
            chosen = [step[token] for step, token in zip(steps, tokens[-length:], strict=True)]
            total = sum(entry.logprob for entry in chosen)
            scores.append((total, all(entry.rank == 1 for entry in chosen)))
        return scores

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        raise HarnessError("tasks that score whole documents are not supported; choose another")

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        raise HarnessError("tasks that generate are not supported here; use cna-vllm ab")


def task_manager(task: str) -> tuple[TaskManager, str]:
    """The harness's tasks and the name among them: a known one, or that of a YAML file.

    Raises:
        HarnessError: there is no such task.
    """
    path = Path(task)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise HarnessError(f"{task}: no such file; name a task or its YAML file")
        manager = TaskManager(include_path=str(path.parent.resolve()))
        name = path.stem
    else:
        manager, name = TaskManager(), task
    if name not in manager.all_tasks:
        raise HarnessError(
            f"{name}: is not a task of lm-evaluation-harness; of a YAML file, its name must equal "
            "its field 'task'"
        )
    return manager, name


def accuracy(
    llm: LLM, arm: Arm, task: str, *, num_fewshot: int | None = None, limit: int | None = None
) -> dict[str, Any]:
    """`{"accuracy", "n", "task", "num_fewshot", "harness"}` of one arm on one task.

    Args:
        task: a name or group of the harness, for instance `mmlu`, or a task's YAML file.
        num_fewshot: examples before each question; the task's own number if None.
        limit: questions of each task.

    Raises:
        HarnessError: no such task, or one without an accuracy.
    """
    import lm_eval

    manager, name = task_manager(task)
    results = simple_evaluate(
        ArmLM(llm, arm),
        tasks=[name],
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=0,
    )
    found = results["groups"].get(name) if results.get("groups") else None
    found = found or results["results"][name]
    if "acc,none" not in found:
        raise HarnessError(f"{name}: has no accuracy ('acc'); choose a multiple-choice task")
    counts = results["n-samples"]
    return {
        "task": name,
        "accuracy": float(found["acc,none"]),
        "n": sum(count["effective"] for count in counts.values()),
        "num_fewshot": max(results["n-shot"].values(), default=0),
        "harness": lm_eval.__version__,
    }


def requests(task: str, limit: int | None = None) -> list[str]:
    """The texts that one arm's run of a task scores, to estimate its work beforehand."""
    manager, name = task_manager(task)
    texts = []
    for found in manager.load([name])["tasks"].values():
        found.build_all_requests(limit=limit, rank=0, world_size=1)
        texts += ["".join(instance.args[:2]) for instance in found.instances]
    return texts
