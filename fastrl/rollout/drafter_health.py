"""Tells a learned drafter that has gone bad, and keeps its strategies from being chosen.

Drafts never change tokens, so a broken drafter shows in speed alone, and a bandit leaves it without
a word. This names it: weights or drafts that are no numbers, or next to nothing accepted. A drafter
found bad stays so until the next one is published.

Leaves out what speculates in its place: the selector's n-gram strategies, if it has any, or `off`.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence

import torch
from torch import Tensor

from fastrl.rollout.engine import CostQuery, StrategySelector
from fastrl.types import DraftStrategy, EngineStats, StepStats

MIN_ACCEPTANCE = 0.01
"""Share of rows that must accept a draft token at depth 1."""

WINDOW_ROWS = 500
"""Rows, over the newest speculative steps, that the share is taken over."""


class DrafterHealth:
    """The verdict on the drafter that is being served.

    Args:
        min_acceptance: lowest share of rows accepting at depth 1, over a full window.
        window_rows: rows of the newest steps of learned strategies that are looked at.
    """

    def __init__(
        self, min_acceptance: float = MIN_ACCEPTANCE, window_rows: int = WINDOW_ROWS
    ) -> None:
        self.min_acceptance = min_acceptance
        self.window_rows = window_rows
        self.failure: str | None = None
        """Which drafter was found bad and why; None while it is not."""
        self._name = "the drafter"
        self._steps: deque[tuple[int, int]] = deque()  # rows, rows that accepted at depth 1
        self._num_rows = self._num_accepted = 0

    def start(self, name: str, named_weights: Iterable[tuple[str, Tensor]]) -> None:
        """Judge a new drafter, from its weights on; the one before is forgotten.

        Args:
            name: what failures call it.
            named_weights: all of its trainable weights.
        """
        self._name = name
        self.failure = None
        self._steps.clear()
        self._num_rows = self._num_accepted = 0
        names, tensors = zip(*named_weights, strict=True)
        finite = torch.stack([tensor.isfinite().all() for tensor in tensors]).tolist()
        if broken := [name for name, is_finite in zip(names, finite, strict=True) if not is_finite]:
            self.fail(f"its weights are not finite: {broken}")

    def record(self, stats: StepStats) -> None:
        """Look at a decode step; those of other drafters, and of none, show nothing."""
        if stats.strategy.needs_learned_drafter:
            self.record_rows(stats.batch_size, sum(stats.accepted_by_rank[0]))

    def record_rows(self, num_rows: int, num_accepted: int) -> None:
        """Look at rows that a learned strategy drafted for, in one step or in several, and at how
        many of them accepted a token at depth 1."""
        if self.failure is not None:
            return
        self._steps.append((num_rows, num_accepted))
        self._num_rows += num_rows
        self._num_accepted += num_accepted
        while self._num_rows - self._steps[0][0] >= self.window_rows:
            rows, accepted = self._steps.popleft()
            self._num_rows -= rows
            self._num_accepted -= accepted
        if self._num_rows < self.window_rows:
            return
        if self._num_accepted < self.min_acceptance * self._num_rows:
            self.fail(
                f"{self._num_accepted} of the last {self._num_rows} rows accepted its first draft "
                f"token; at least {self.min_acceptance:.0%} are expected"
            )

    def fail(self, reason: str) -> None:
        """Hold the drafter for bad."""
        self.failure = f"{self._name}: {reason}"


class DrafterWatch:
    """Judges drafters by what whole calls did, and has each failure told once."""

    def __init__(self) -> None:
        self.health = DrafterHealth()
        self._untold: list[str] = []

    @property
    def failure(self) -> str | None:
        """As of `DrafterHealth`."""
        return self.health.failure

    def start(self, name: str, named_weights: Iterable[tuple[str, Tensor]]) -> None:
        """Judge a new drafter; see `DrafterHealth.start`."""
        self.health.start(name, named_weights)
        self._note()

    def look(self, stats: EngineStats) -> None:
        """Look at what a call's drafts were worth."""
        if self.failure is None and stats.offered_by_depth:
            self.health.record_rows(stats.offered_by_depth[0], stats.accepted_by_depth[0])
            self._note()

    def fail(self, reason: str) -> None:
        """Hold the drafter for bad, unless it is known to be."""
        if self.failure is None:
            self.health.fail(reason)
            self._note()

    def take(self) -> tuple[str, ...]:
        """Failures that have not been told."""
        untold = tuple(self._untold)
        self._untold.clear()
        return untold

    def _note(self) -> None:
        """Name a drafter just found bad; whether it goes on drafting is the caller's decision."""
        if self.failure is not None:
            self._untold.append(self.failure)
            warnings.warn(self.failure, stacklevel=4)


class WatchedSelector:
    """A strategy selector whose steps are looked at before it learns from them.

    Args:
        selector: that decides, and is told everything.
        look: given each step.
    """

    def __init__(self, selector: StrategySelector, look: Callable[[StepStats], None]) -> None:
        self._selector = selector
        self._look = look

    @property
    def strategies(self) -> Sequence[DraftStrategy]:
        """The selector's."""
        return self._selector.strategies

    def select(
        self, batch_size: int, context_tokens: int, referenced_rows: int = 0
    ) -> DraftStrategy:
        """The selector's choice."""
        return self._selector.select(batch_size, context_tokens, referenced_rows)

    def record(self, stats: StepStats) -> None:
        """Pass the step on to both."""
        self._look(stats)
        self._selector.record(stats)

    def exclude(self, strategies: Collection[DraftStrategy]) -> None:
        """Pass on."""
        self._selector.exclude(strategies)

    def cost_queries(self, max_batch_size: int, max_context: int) -> Sequence[CostQuery]:
        """The selector's."""
        return self._selector.cost_queries(max_batch_size, max_context)

    def record_cost(self, query: CostQuery, seconds: float) -> None:
        """Pass on."""
        self._selector.record_cost(query, seconds)
