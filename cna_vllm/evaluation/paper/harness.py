# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness on an arm of a running engine.

Log-likelihood tasks score tokens of the *prompt*: the harness sends context and continuation
together. Only scope `all` steers those tokens, so every other scope is refused here rather than
scored as if it had been steered.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from cna_vllm.evaluation.paper.datasets import quiet_hub
from cna_vllm.serving.seams.offline import engine_of
from cna_vllm.steering.arms import Arm

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from vllm import LLM


_FEWSHOT_SEED = 1234  # the harness's own


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

        longest = engine_of(self.llm).max_model_len - 1
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
            if output.outputs[0].finish_reason == "error":
                raise HarnessError(f"arm {self.arm.name!r}: {output.outputs[0].stop_reason}")
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


class Task:
    """A task or group of the harness, found once: its catalogue takes seconds to read.

    Attributes:
        name: as the harness knows it.
        num_fewshot: examples before each question; None: the task's own number, or else 0.
        limit: questions of each task; None: all.
    """

    def __init__(
        self, task: str, *, num_fewshot: int | None = None, limit: int | None = None
    ) -> None:
        """Finds `task`, a name such as `mmlu`, or a YAML file; a group's file may name known tasks.

        Raises:
            HarnessError: there is no such task.
        """
        path = Path(task)
        if path.suffix in (".yaml", ".yml"):
            if not path.is_file():
                raise HarnessError(f"--mmlu {task}: no such file; name a task or its YAML file")
            group = re.search(r"(?m)^group:", path.read_text("utf-8"))
            folder = str(path.parent.resolve())
            self._manager = TaskManager(include_path=folder, include_defaults=group is not None)
            self.name = path.stem
        else:
            self._manager, self.name = TaskManager(), task
        if self.name not in self._manager.all_tasks:
            raise HarnessError(
                f"--mmlu {self.name}: is not a task of lm-evaluation-harness; of a YAML file, its "
                "name must equal its field 'task' or 'group'"
            )
        self.num_fewshot, self.limit = num_fewshot, limit

    def texts(self) -> list[str]:
        """What one arm's run scores, question by question and choice by choice.

        Raises:
            HarnessError: the data cannot be had, or the task does not score choices.
        """
        texts: list[str] = []
        try:
            with quiet_hub():
                for found in self._manager.load([self.name])["tasks"].values():
                    own = found.get_config("num_fewshot")
                    if own is None or (own and self.num_fewshot):  # as the harness itself has it
                        found.set_config(key="num_fewshot", value=self.num_fewshot or 0)
                    found.set_fewshot_seed(seed=_FEWSHOT_SEED)
                    found.build_all_requests(limit=self.limit, rank=0, world_size=1)
                    for instance in found.instances:
                        if instance.request_type != "loglikelihood":
                            raise HarnessError("it does not score choices; choose another")
                        texts.append("".join(instance.args[:2]))
        except Exception as error:  # a task is a program, and its data may come from anywhere
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise HarnessError(
                f"--mmlu {self.name}: cannot be used ({reason}); local data is named in a task's "
                "YAML file"
            ) from error
        return texts

    def accuracy(self, llm: LLM, arm: Arm) -> dict[str, Any]:
        """`{"task", "accuracy", "n", "num_fewshot", "harness"}` of one arm.

        Raises:
            HarnessError: the task has no accuracy, or the arm is steered in another scope than
                `all`.
        """
        import lm_eval

        results = simple_evaluate(
            ArmLM(llm, arm),
            tasks=[self.name],
            num_fewshot=self.num_fewshot,
            limit=self.limit,
            task_manager=self._manager,
            log_samples=False,
            bootstrap_iters=0,
            fewshot_random_seed=_FEWSHOT_SEED,
        )
        found = results.get("groups", {}).get(self.name) or results["results"][self.name]
        if "acc,none" not in found:
            raise HarnessError(f"{self.name}: has no accuracy ('acc'); choose another task")
        return {
            "task": self.name,
            "accuracy": float(found["acc,none"]),
            "n": sum(count["effective"] for count in results["n-samples"].values()),
            "num_fewshot": max(results["n-shot"].values(), default=0),
            "harness": lm_eval.__version__,
        }
