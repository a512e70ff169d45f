"""What decode steps cost before any rollout has shown it: timed on rows of random tokens.

Answers a strategy selector's cost queries (`StrategySelector.cost_queries`) through the engine's
own generation, so that a profiled step is a real one: drafting, verification, bookkeeping. What
such rows accept means nothing, and is not reported. Leaves out prefills.
"""

from __future__ import annotations

import contextlib
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

    def cost_queries(self, max_batch_size: int) -> Sequence[CostQuery]:
        return ()

    def record_cost(self, query: CostQuery, seconds: float) -> None: ...


def step_seconds(query: CostQuery, *, vocab_size: int, max_context: int, run: Run) -> float:
    """Usual seconds of a decode step: the second smallest of five, since only more can go wrong.

    Args:
        query: a context too long for the model is cut to what leaves room for the steps.
        vocab_size: tokens to draw the context from.
        max_context: of the model, in tokens.
        run: the engine's own generation.
    """
    # Rows must not end before the last timed step, however much of their drafts is accepted.
    num_steps = _WARM_UP_STEPS + _TIMED_STEPS
    num_tokens = 2 + num_steps * (query.strategy.depth + 1)
    num_context = max(1, min(query.context_tokens, max_context - num_tokens))
    rng = random.Random(0)
    tokens = tuple(rng.randrange(vocab_size) for _ in range(num_context))
    stopwatch = _Stopwatch(query.strategy)
    with contextlib.suppress(_EnoughStepsError):
        run(
            stopwatch,
            Prompt(prompt_id=0, tokens=tokens, text="", answer=""),
            query.batch_size,
            SamplingParams(max_tokens=num_tokens, ignore_eos=True),
        )
    timed = stopwatch.seconds[_WARM_UP_STEPS:]
    if not timed:
        raise ValueError(
            f"a decode step of {query.strategy} cannot be timed in the model's context of "
            f"{max_context} tokens; leave the strategy out"
        )
    return sorted(timed)[:2][-1]
