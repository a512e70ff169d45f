"""Adds up what an engine's decode steps did, into an `EngineStats`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from time import perf_counter

from fastrl.types import DraftStrategy, EngineStats, Span

PREFILL = "prefill"


class _ByDepth:
    """A drafter's depths, over rows and steps: offered, and accepted; as `EngineStats` says."""

    def __init__(self) -> None:
        self._deepest = 0
        self._offered: Counter[int] = Counter()
        self._accepted: Counter[int] = Counter()

    def add(self, depth: int, num_accepted: Sequence[int]) -> None:
        self._deepest = max(self._deepest, depth)
        for accepted, num_rows in Counter(num_accepted).items():
            for reached in range(min(accepted + 1, depth)):
                self._offered[reached] += num_rows
            for reached in range(accepted):
                self._accepted[reached] += num_rows

    @property
    def offered(self) -> tuple[int, ...]:
        return tuple(self._offered[depth] for depth in range(self._deepest))

    @property
    def accepted(self) -> tuple[int, ...]:
        return tuple(self._accepted[depth] for depth in range(self._deepest))


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
        self._by_depth = {"learned": _ByDepth(), "ngram": _ByDepth()}
        self._entered: list[tuple[str, float]] = []

    def enter(self, name: str) -> None:
        """What begins now, and ends what went on before: a prefill, or a step of a strategy."""
        if not self._entered or self._entered[-1][0] != name:
            self._entered.append((name, perf_counter()))

    def _spans(self) -> tuple[Span, ...]:
        ends = [*(start for _, start in self._entered[1:]), perf_counter()]  # one more than none
        return tuple(
            Span(name=name, start_s=start, seconds=end - start)
            for (name, start), end in zip(self._entered, ends, strict=False)
        )

    def add_step(
        self, strategy: DraftStrategy, num_taken: Sequence[int], num_accepted: Sequence[int]
    ) -> None:
        """A decode step: tokens taken and draft tokens accepted, by row."""
        self._steps[str(strategy)] += 1
        if strategy.is_off:
            return
        self._row_steps += len(num_taken)
        self._accepted_tokens += sum(num_taken)
        self._by_depth[strategy.drafter].add(strategy.depth, num_accepted)

    def add_rollout(self, num_tokens: int) -> None:
        """A finished response."""
        self._num_rollouts += 1
        self._num_tokens += num_tokens

    def result(self, seconds: float) -> EngineStats:
        """The sum, over a call of that many seconds."""
        learned, ngram = self._by_depth["learned"], self._by_depth["ngram"]
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
            offered_by_depth=learned.offered,
            accepted_by_depth=learned.accepted,
            ngram_offered_by_depth=ngram.offered,
            ngram_accepted_by_depth=ngram.accepted,
            spans=self._spans(),
        )
