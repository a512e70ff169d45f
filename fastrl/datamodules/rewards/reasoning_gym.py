"""Has a reasoning-gym task judge the answers to its own questions.

Many tasks accept several forms of an answer, or give part of the reward for part of it.
"""

from __future__ import annotations

import json

from reasoning_gym.dataset import ProceduralDataset

from fastrl.datamodules.reasoning_gym_prompts import make_task
from fastrl.datamodules.rewards.answers import (
    TAGGED_ANSWER,
    compile_answer_pattern,
    extract_answer,
)
from fastrl.datamodules.rewards.base import RewardFunction
from fastrl.types import Prompt


class ReasoningGymReward(RewardFunction):
    """The task's own score, from 0 to 1, of the last answer in the response; 0 without an answer.

    It scores prompts of `ReasoningGymPrompts`, which carry their task with them.

    Args:
        answer_pattern: Regular expression with one group, the answer; its last match counts.
    """

    def __init__(self, answer_pattern: str = TAGGED_ANSWER) -> None:
        self.pattern = compile_answer_pattern(answer_pattern)
        self._tasks: dict[str, ProceduralDataset] = {}

    def score(self, text: str, prompt: Prompt) -> float:
        """Ask the task; ValueError if the prompt is of another source."""
        if "entry" not in prompt.metadata or "task" not in prompt.metadata:
            raise ValueError(
                f"prompt {prompt.prompt_id} carries no reasoning-gym entry (its metadata has "
                f"{sorted(prompt.metadata) or 'nothing'}); take ReasoningGymPrompts, or another "
                f"reward"
            )
        answer = extract_answer(self.pattern, text)
        if answer is None:
            return 0.0
        return float(self._task(prompt).score_answer(answer, prompt.metadata["entry"]))

    def _task(self, prompt: Prompt) -> ProceduralDataset:
        task, config = prompt.metadata["task"], prompt.metadata["config"]
        key = f"{task} {json.dumps(config, sort_keys=True)}"
        if key not in self._tasks:
            self._tasks[key] = make_task(task, config, size=1, seed=0)
        return self._tasks[key]
