"""What a reward function is. It runs in worker processes, so it must be picklable."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from fastrl.types import Prompt


class RewardFunction(ABC):
    """Scores one response at a time. Subclass it, and name the subclass as `class_path` in YAML.

    A score that fails (raises, hangs, is not a finite number) counts as 0 and is named in the
    batch's `RewardResult`; it costs no other response its score.
    """

    @abstractmethod
    def score(self, text: str, prompt: Prompt) -> float:
        """Reward of the response `text` to `prompt`; `prompt.answer` and `.metadata` help."""


class BatchRewardFunction(RewardFunction):
    """Scores all responses of a step in one call, for rewards that compare or batch them.

    The call has one time limit, and its failure is every response's.
    """

    @abstractmethod
    def score_batch(self, texts: Sequence[str], prompts: Sequence[Prompt]) -> Sequence[float]:
        """One reward a response, in order; the responses to a prompt stand together."""

    def score(self, text: str, prompt: Prompt) -> float:
        """Reward of a single response, as a batch of one."""
        return self.score_batch([text], [prompt])[0]
