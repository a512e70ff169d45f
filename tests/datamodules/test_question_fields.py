"""Rows to questions: keys, dotted paths, conversations, answers by pattern, errors with a place."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fastrl.datamodules.question_fields import QuestionFields

VERL_ROW = {
    "data_source": "openai/gsm8k",
    "prompt": [
        {"role": "system", "content": "Think step by step."},
        {"role": "user", "content": "How many?"},
    ],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "72"},
    "extra_info": {"split": "train", "index": 0},
}


def fields(**options: Any) -> QuestionFields:
    return QuestionFields(**{"prompt_key": "prompt", "answer_key": "answer", **options})


def test_a_row_of_verl_is_read_by_naming_its_answer() -> None:
    question = fields(answer_key="reward_model.ground_truth").read(VERL_ROW, 7, "here")
    assert question.prompt_id == 7
    assert question.context == (("system", "Think step by step."),)
    assert (question.text, question.answer) == ("How many?", "72")
    assert question.metadata == {key: row for key, row in VERL_ROW.items() if key != "prompt"}


def test_metadata_may_be_chosen_by_key_and_path() -> None:
    mapping = fields(
        answer_key="reward_model.ground_truth",
        metadata_keys=["data_source", "extra_info.index"],
    )
    assert mapping.read(VERL_ROW, 0, "here").metadata == {
        "data_source": "openai/gsm8k",
        "extra_info.index": 0,
    }
    chosen = fields(metadata_keys=[]).read({"prompt": "?", "answer": 1, "x": 2}, 0, "here")
    assert chosen.metadata == {}


def test_a_key_with_a_dot_in_it_comes_before_a_path() -> None:
    row = {"prompt": "?", "a.b": "key", "a": {"b": "path"}}
    assert fields(answer_key="a.b").read(row, 0, "here").answer == "key"


def test_the_last_match_of_the_pattern_is_the_answer() -> None:
    row = {"prompt": "?", "answer": "He has #### 3 and\nshe 4.\n#### 42 "}
    assert fields(answer_pattern="#### ([^\n]+)").read(row, 0, "here").answer == "42"


def test_keys_that_arrow_filled_with_null_are_no_part_of_a_message() -> None:
    row = {"prompt": [{"role": "user", "content": "?", "name": None}], "answer": "1"}
    assert fields().read(row, 0, "here").text == "?"


USER = {"role": "user", "content": "?"}


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"answer": 1}, {}, "no key 'prompt', found 'answer'; mend the data or set prompt_key"),
        ({"prompt": "?"}, {}, "no key 'answer', found 'prompt'; mend the data or set answer_key"),
        ({"prompt": "?", "a": {"x": 1}}, {"answer_key": "a.b"}, "no key 'b' in a, found 'x'"),
        (
            {"prompt": "?", "a": {"b": "text"}},
            {"answer_key": "a.b.c"},
            "no key 'c' in a.b, which holds no keys but 'text'",
        ),
        ({"prompt": "?", "answer": 1}, {"metadata_keys": ["x"]}, "or set metadata_keys"),
        ({"prompt": [], "answer": 1}, {}, "'prompt' must be a non-empty string or a list of chat"),
        ({"prompt": [USER, "?"], "answer": 1}, {}, "a chat message must have a role and a content"),
        (
            {"prompt": [{**USER, "name": "Ann"}], "answer": 1},
            {},
            "and nothing else, got {'role': 'user', 'content': '?', 'name': 'Ann'}",
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image"}]}], "answer": 1},
            {},
            "both strings",
        ),
        (
            {"prompt": [USER, {"role": "assistant", "content": "!"}], "answer": 1},
            {},
            "the last message must be the user's, which the response answers, got one of role "
            "'assistant'",
        ),
        ({"prompt": [{**USER, "content": " "}], "answer": 1}, {}, "must be a non-empty string"),
        (
            {"prompt": "?", "answer": "42"},
            {"answer_pattern": "#### (.+)"},
            "answer_pattern '#### (.+)' does not occur in 'answer', '42'",
        ),
    ],
)
def test_a_bad_row_is_named_by_place_and_key(
    row: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=r"^data\.parquet, row 3: .*" + re.escape(message)):
        fields(**options).read(row, 0, "data.parquet, row 3")


def test_a_malformed_pattern_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="must have exactly one group"):
        fields(answer_pattern="####")
