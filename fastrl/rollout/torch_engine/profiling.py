"""What decode steps cost before any rollout has shown it: timed on rows of random tokens.

Answers a strategy selector's cost queries (`StrategySelector.cost_queries`) through the engine's
own generation, so that a profiled step is a real one: drafting, verification, bookkeeping. What
such rows accept means nothing, and is not reported. Leaves out prefills.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Collection, Sequence

from fastrl.rollout.engine import CostQuery, StrategySelector
from fastrl.types import DraftStrategy, Prompt, SamplingParams, StepStats

_WARM_UP_STEPS = 1
_TIMED_STEPS = 5

Run = Callable[[StrategySelector, Prompt, int, SamplingParams], None]
"""Generates so many responses to a prompt under a selector."""


class _EnoughStepsError(Exception):
    """Ends a generation that has shown what was asked."""


class _Stopwatch:
    """A selector that plays one strategy, keeps what its steps took, and ends after a few."""

    def __init__(self, strategy: DraftStrategy) -> None:
        self.strategies = (strategy,)
        self.seconds: list[float] = []

    def select(
        self, batch_size: int, context_tokens: int, referenced_rows: int = 0
    ) -> DraftStrategy:
        return self.strategies[0]

    def record(self, stats: StepStats) -> None:
        self.seconds.append(stats.seconds)
        if len(self.seconds) == _WARM_UP_STEPS + _TIMED_STEPS:
            raise _EnoughStepsError

    def exclude(self, strategies: Collection[DraftStrategy]) -> None: ...

    def cost_queries(self, max_batch_size: int, max_context: int) -> Sequence[CostQuery]:
        return ()

    def record_cost(self, query: CostQuery, seconds: float) -> None: ...


def _num_tokens(strategy: DraftStrategy) -> int:
    """Room for a response: rows must not end before the last timed step, however much of their
    drafts is accepted."""
    return 2 + (_WARM_UP_STEPS + _TIMED_STEPS) * (strategy.depth + 1)


def cut_to(max_context: int, query: CostQuery) -> CostQuery:
    """The query with a context that leaves room for the steps in the model's, in tokens."""
    most = max(max_context - _num_tokens(query.strategy), 1)
    return dataclasses.replace(query, context_tokens=min(query.context_tokens, most))


def step_seconds(query: CostQuery, *, vocab_size: int, sampling: SamplingParams, run: Run) -> float:
    """Usual seconds of a decode step: the second smallest of five, since only more can go wrong.

    Args:
        query: whose context leaves room for the steps (`cut_to`).
        vocab_size: tokens to draw the context from.
        sampling: of the rollouts to come; nothing ends the rows timed.
        run: the engine's own generation.

    Raises ValueError where the model's context has no room for a step to be timed.
    """
    rng = random.Random(0)
    tokens = tuple(rng.randrange(vocab_size) for _ in range(query.context_tokens))
    stopwatch = _Stopwatch(query.strategy)
    with contextlib.suppress(_EnoughStepsError):
        run(
            stopwatch,
            Prompt(prompt_id=0, tokens=tokens, text="", answer=""),
            query.batch_size,
            dataclasses.replace(
                sampling, max_tokens=_num_tokens(query.strategy), stop=(), ignore_eos=True
            ),
        )
    timed = stopwatch.seconds[_WARM_UP_STEPS:]
    if not timed:
        raise ValueError(
            f"a decode step of {query.strategy} cannot be timed in the model's context; leave the "
            "strategy out"
        )
    return sorted(timed)[:2][-1]
