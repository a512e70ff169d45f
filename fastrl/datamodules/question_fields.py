"""From a row of a data file to a `Question`: which keys hold the question and its answer. Pure.

A key may be a dotted path into nested objects (`reward_model.ground_truth`). A question is a
string, or a conversation of chat messages whose last one is the user's. Leaves out reading files
(jsonl_prompts.py, dataset_prompts.py) and images, tools and other content than text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastrl.datamodules.prompts import Question
from fastrl.datamodules.rewards.answers import compile_answer_pattern, extract_answer


@dataclass(frozen=True, kw_only=True, slots=True)
class QuestionFields:
    """Where a row keeps what a `Question` consists of; the names are those of the options."""

    prompt_key: str
    answer_key: str
    answer_pattern: str | None = None
    metadata_keys: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.answer_pattern is not None:
            compile_answer_pattern(self.answer_pattern)

    def read(self, row: Mapping[str, Any], prompt_id: int, place: str) -> Question:
        """The question of a row; ValueError starts with `place` (file and row) and names the
        key."""
        prompt = _look_up(row, self.prompt_key, "prompt_key", place)
        context, text = _messages(prompt, f"{place}: {self.prompt_key!r}")
        return Question(
            prompt_id=prompt_id,
            text=text,
            answer=self._answer(row, place),
            context=context,
            metadata=self._metadata(row, place),
        )

    def _answer(self, row: Mapping[str, Any], place: str) -> str:
        answer = _look_up(row, self.answer_key, "answer_key", place)
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise ValueError(
                f"{place}: {self.answer_key!r} must be a string or a number, got {answer!r}"
            )
        if self.answer_pattern is None:
            return str(answer)
        extracted = extract_answer(compile_answer_pattern(self.answer_pattern), str(answer))
        if extracted is None:
            raise ValueError(
                f"{place}: answer_pattern {self.answer_pattern!r} does not occur in "
                f"{self.answer_key!r}, {answer!r}; mend the data or set answer_pattern"
            )
        return extracted

    def _metadata(self, row: Mapping[str, Any], place: str) -> dict[str, Any]:
        if self.metadata_keys is None:
            used = (self.prompt_key, self.answer_key)
            return {key: value for key, value in row.items() if key not in used}
        return {key: _look_up(row, key, "metadata_keys", place) for key in self.metadata_keys}


def _look_up(row: Mapping[str, Any], key: str, option: str, place: str) -> Any:
    """The value under a key, or else under a dotted path."""
    if key in row:
        return row[key]
    value: Any = row
    walked = ""
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise ValueError(
                f"{place}: no key {part!r}{walked}, {_found(value)}; mend the data or set {option}"
            )
        value = value[part]
        walked = f"{walked or ' in '}{'.' if walked else ''}{part}"
    return value


def _found(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"found {', '.join(map(repr, value)) or 'none'}"
    return f"which holds no keys but {value!r}"


def _messages(prompt: Any, place: str) -> tuple[tuple[tuple[str, str], ...], str]:
    """The conversation before the question as (role, content), and the question itself."""
    if isinstance(prompt, str):
        return (), _non_empty(prompt, place)
    if not isinstance(prompt, Sequence) or not prompt:
        raise ValueError(
            f"{place} must be a non-empty string or a list of chat messages, got {prompt!r}"
        )
    *context, (role, content) = (_message(message, place) for message in prompt)
    if role != "user":
        raise ValueError(
            f"{place}: the last message must be the user's, which the response answers, got one "
            f"of role {role!r}"
        )
    return tuple(context), _non_empty(content, place)


def _message(message: Any, place: str) -> tuple[str, str]:
    # Arrow gives every message of a column the same keys, null where a message has none.
    given = (
        {key: value for key, value in message.items() if value is not None}
        if isinstance(message, Mapping)
        else message
    )
    if (
        not isinstance(given, dict)
        or set(given) != {"role", "content"}
        or not all(isinstance(value, str) for value in given.values())
    ):
        raise ValueError(
            f"{place}: a chat message must have a role and a content, both strings, and nothing "
            f"else, got {given!r}"
        )
    return given["role"], given["content"]


def _non_empty(text: str, place: str) -> str:
    if not text.strip():
        raise ValueError(f"{place} must be a non-empty string, got {text!r}")
    return text
