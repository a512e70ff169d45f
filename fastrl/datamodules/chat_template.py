"""From questions to token ids, through the model's own tokenizer and chat template.

Over-long prompts are left out, counted and named; nothing is truncated.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from fastrl.datamodules.prompts import Question
from fastrl.types import Prompt

_log = logging.getLogger(__name__)


def load_tokenizer(model_path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; ValueError if there is none, or it has no chat template."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model_path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot load a tokenizer from {model_path!r}, expected a Hugging Face model folder or "
            f"name: {error}"
        ) from error
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of {model_path!r} has no chat template, so a prompt cannot be built; "
            f"use an instruct model, or put a chat_template.jinja into its folder"
        )
    return tokenizer


def context_length(model_path: str) -> int:
    """Longest sequence of the model, in tokens."""
    config = AutoConfig.from_pretrained(model_path).get_text_config()
    return int(config.max_position_embeddings)


def tokenize_questions(
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    *,
    system_prompt: str | None,
    max_prompt_tokens: int,
    split: str,
) -> list[Prompt]:
    """Prompts that end where the response begins, those over `max_prompt_tokens` left out.

    Raises ValueError, naming the `split`, if questions were given and none is left, or if a
    question brings a system message besides `system_prompt`.
    """
    if not questions:
        return []
    token_lists = tokenizer.apply_chat_template(
        [_conversation(question, system_prompt, split) for question in questions],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )
    prompts = [
        Prompt(
            prompt_id=question.prompt_id,
            tokens=tuple(tokens),
            text=question.text,
            answer=question.answer,
            metadata=question.metadata,
        )
        for question, tokens in zip(questions, token_lists, strict=True)
    ]
    kept = [prompt for prompt in prompts if len(prompt.tokens) <= max_prompt_tokens]
    _report_too_long(prompts, len(kept), max_prompt_tokens, split)
    return kept


def _conversation(
    question: Question, system_prompt: str | None, split: str
) -> list[dict[str, str]]:
    """All messages up to the one that the response answers."""
    messages = [*question.context, ("user", question.text)]
    if system_prompt:
        if messages[0][0] == "system":
            raise ValueError(
                f"data.system_prompt is set, but {split} prompt {question.prompt_id} has a system "
                f"message of its own, {messages[0][1]!r}; unset data.system_prompt"
            )
        messages = [("system", system_prompt), *messages]
    return [{"role": role, "content": content} for role, content in messages]


def _report_too_long(
    prompts: Sequence[Prompt], num_kept: int, max_prompt_tokens: int, split: str
) -> None:
    lengths = [len(prompt.tokens) for prompt in prompts]
    if num_kept == 0:
        raise ValueError(
            f"all {len(lengths)} {split} prompts are longer than {max_prompt_tokens} tokens (the "
            f"shortest has {min(lengths)}); raise data.max_prompt_tokens, or, where the model's "
            f"context is the limit, use shorter prompts or a model of longer context"
        )
    if num_kept < len(lengths):
        _log.warning(
            "left out %d of %d %s prompts, longer than %d tokens (the longest has %d)",
            len(lengths) - num_kept,
            len(lengths),
            split,
            max_prompt_tokens,
            max(lengths),
        )
