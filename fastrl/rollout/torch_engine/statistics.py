"""Adds up what an engine's decode steps did, into an `EngineStats`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fastrl.types import DraftStrategy, EngineStats


class StatisticsRecorder:
    """Counts over one `generate` call."""

    def __init__(self) -> None:
        self.num_prompt_tokens = 0
        self.prefill_seconds = 0.0
        self.draft_seconds = 0.0
        self._num_rollouts = 0
        self._num_tokens = 0
        self._steps: Counter[str] = Counter()
        self._row_steps = 0
        self._accepted_tokens = 0
        self._deepest = 0
        self._offered: Counter[int] = Counter()
        self._accepted: Counter[int] = Counter()

    def add_step(
        self, strategy: DraftStrategy, num_taken: Sequence[int], num_accepted: Sequence[int]
    ) -> None:
        """A decode step: tokens taken and draft tokens accepted, by row."""
        self._steps[str(strategy)] += 1
        if strategy.is_off:
            return
        self._deepest = max(self._deepest, strategy.depth)
        self._row_steps += len(num_taken)
        self._accepted_tokens += sum(num_taken)
        for accepted in num_accepted:
            self._offered.update(range(min(accepted + 1, strategy.depth)))
            self._accepted.update(range(accepted))

    def add_rollout(self, num_tokens: int) -> None:
        """A finished response."""
        self._num_rollouts += 1
        self._num_tokens += num_tokens

    def result(self, seconds: float) -> EngineStats:
        """The sum, over a call of that many seconds."""
        depths = range(self._deepest)
        return EngineStats(
            num_rollouts=self._num_rollouts,
            num_tokens=self._num_tokens,
            num_prompt_tokens=self.num_prompt_tokens,
            num_steps=self._steps.total(),
            seconds=seconds,
            prefill_seconds=self.prefill_seconds,
            draft_seconds=self.draft_seconds,
            steps_by_strategy=dict(self._steps),
            row_steps=self._row_steps,
            accepted_tokens=self._accepted_tokens,
            offered_by_depth=tuple(self._offered[depth] for depth in depths),
            accepted_by_depth=tuple(self._accepted[depth] for depth in depths),
        )
