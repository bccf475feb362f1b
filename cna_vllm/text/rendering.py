# SPDX-License-Identifier: Apache-2.0
"""From a prompt to the token ids that the engine sees: one way for discovery and generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cna_vllm.text.prompts import Prompt


def has_template(tokenizer: Any) -> bool:
    """Whether a model's tokenizer has a chat template."""
    return getattr(tokenizer, "chat_template", None) is not None


def templated(tokenizer: Any, prompt: Prompt, *, raw: bool = False) -> bool:
    """Whether ``render`` applies the chat template to a prompt: messages need it."""
    if prompt.token_ids is not None:
        return False
    return prompt.messages is not None or (not raw and has_template(tokenizer))


def chat_template_used(
    tokenizer: Any, prompts: Sequence[Prompt], *, raw: bool = False
) -> bool | str:
    """Whether ``render`` applies the chat template to prompts: what provenance says of them.

    A text where it is so for some of them only.
    """
    count = sum(templated(tokenizer, prompt, raw=raw) for prompt in prompts)
    return bool(count) if count in (0, len(prompts)) else f"for {count} of {len(prompts)} prompts"


def render(tokenizer: Any, prompt: Prompt, *, raw: bool = False) -> list[int]:
    """Token ids of a prompt: one user turn through the chat template, with the generation prompt.

    Text of a model without a chat template, or with ``raw``, is tokenized as it is, and token ids
    are the prompt. Ids are returned rather than text, so that no special token is added twice.

    Raises:
        ValueError: messages for a model without a chat template, or its template refuses them.
    """
    if prompt.token_ids is not None:
        return list(prompt.token_ids)
    messages = prompt.messages
    if messages is None:
        if not templated(tokenizer, prompt, raw=raw):
            return list(tokenizer.encode(prompt.text))
        messages = [{"role": "user", "content": prompt.text}]
    elif not has_template(tokenizer):
        raise ValueError("messages: this model has no chat template; give prompts as text")
    try:
        ids = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=False,
        )
    except Exception as error:  # a template is a program of the model's: it can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"messages: the model's chat template refuses them: {reason}") from error
    return list(ids)
