"""Finding answers in responses and comparing them."""

from __future__ import annotations

import pytest

from fastrl.datamodules.rewards import ExactMatchReward
from fastrl.types import Prompt


def prompt(answer: str) -> Prompt:
    return Prompt(prompt_id=0, tokens=(1,), text="?", answer=answer)


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("so <answer>12</answer>", "12", 1),
        ("so <answer> 12\n</answer>", "12", 1),
        ("<answer>3</answer> no, <answer>12</answer>", "12", 1),
        ("<answer>12</answer> no, <answer>3</answer>", "12", 0),
        ("<answer>two\nlines</answer>", "two\nlines", 1),
        ("<answer>12.0</answer>", "12", 0),
        ("12", "12", 0),
        ("<answer>12", "12", 0),
        ("", "", 0),
    ],
)
def test_the_last_tagged_answer_counts_and_must_equal_the_reference(
    text: str, answer: str, score: float
) -> None:
    assert ExactMatchReward().score(text, prompt(answer)) == score


def test_the_pattern_can_be_another() -> None:
    reward = ExactMatchReward(answer_pattern=r"####(.*)$")
    assert reward.score("first\n#### 12", prompt("12")) == 1


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "is not a regular expression"),
        ("answer", "must have exactly one group, the answer, .* it has 0"),
        ("(a)(b)", "must have exactly one group, the answer, .* it has 2"),
    ],
)
def test_a_bad_pattern_is_named(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExactMatchReward(answer_pattern=pattern)
