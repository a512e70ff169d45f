"""Reward 1 for the reference answer, 0 for anything else."""

from __future__ import annotations

from fastrl.datamodules.rewards.answers import (
    TAGGED_ANSWER,
    compile_answer_pattern,
    extract_answer,
)
from fastrl.datamodules.rewards.base import RewardFunction
from fastrl.types import Prompt


class ExactMatchReward(RewardFunction):
    """1 if the last answer in the response is the reference answer, blanks around it aside, else 0.

    Args:
        answer_pattern: Regular expression with one group, the answer; its last match counts.
    """

    def __init__(self, answer_pattern: str = TAGGED_ANSWER) -> None:
        self.pattern = compile_answer_pattern(answer_pattern)

    def score(self, text: str, prompt: Prompt) -> float:
        """Compare as strings."""
        return float(extract_answer(self.pattern, text) == prompt.answer.strip())
