"""What a speculative worker inside SGLang decides and learns at each decode step.

A `DecodeSession` lives in the scheduler process for the time of one `generate` call. Before each
decode step it asks the strategy selector, the very bandit that the trainer sent; afterwards it
tells the bandit what the step emitted and how long it took. Nothing is waited for: counts arrive
when SGLang has them on the host, which with overlapped scheduling is a step later, and times are
read from events that the device has passed. So a choice may rest on all steps but the last.

A step's time runs from its start to the next one's, idle time of the device between them included,
where the two follow each other; before a prefill or the end it runs to its own end.

Imports nothing of SGLang: sglang_worker.py does. Shape legend: B rows, N nodes of a row's tree,
root first; node numbers of a row count from 0.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastrl.rollout.bandit_base import Bandit, MeasuredCost
from fastrl.rollout.engine import StrategySelector
from fastrl.rollout.step_statistics import PREFILL, StatisticsRecorder
from fastrl.types import OFF, DraftStrategy, EngineStats, StepStats

Nodes = NDArray[np.int64]

_CONTEXT_STEPS = 16
"""Steps for which the longest context is taken to be what it was: it grows by few tokens."""


class Mark(Protocol):
    """A point in the device's time."""

    def is_past(self) -> bool:
        """Whether the device has passed it; does not wait."""
        ...

    def seconds_to(self, later: Any) -> float:
        """From here to a later mark; both are past."""
        ...


class HostMark:
    """On a device that works when it is told to: the host's clock."""

    def __init__(self) -> None:
        self._seconds = time.perf_counter()

    def is_past(self) -> bool:
        """Always."""
        return True

    def seconds_to(self, later: HostMark) -> float:
        """From here to a later mark."""
        return later._seconds - self._seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifiedTree:
    """Draft trees of a step's rows and the paths accepted in them, on the host."""

    next_token_BN: Nodes
    """First child of each node; -1 without any."""
    next_sibling_BN: Nodes
    """Next child of the same parent; -1 after the last."""
    accepted_BD: Nodes
    """The accepted path, root first, its nodes numbered over all rows; -1 after its end."""


@dataclass(kw_only=True, slots=True)
class DecodeStep:
    """A decode step on its way."""

    strategy: DraftStrategy
    context_tokens: int
    requests: Sequence[Any]
    """Of its rows; each has a `rid`, and tells by `finished()` that its response has ended."""
    tokens_before: Sequence[int] = ()
    """Of each row's response, once the counts are on the host."""
    start: Mark
    end: Mark | None = None
    tree: VerifiedTree | None = None
    """None for chains and for plain decoding, which accept lengths describe."""
    is_followed: bool = False
    """Whether the next decode step came without a prefill between."""
    num_accepted: list[int] | None = None
    """Draft tokens by row, once they are on the host."""


@dataclass(kw_only=True, slots=True)
class RequestSteps:
    """What one response's decode steps emitted."""

    accept_lengths: list[int] = field(default_factory=list)
    num_verify_steps: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionReport:
    """What a `generate` call did: sent back to the trainer."""

    stats: EngineStats
    """Steps, rows and acceptance; tokens, rollouts and seconds are for the trainer to fill in."""
    requests: Mapping[str, RequestSteps]
    """By request id."""
    bandit_state: Mapping[str, Any] | None
    """Of a bandit, to be loaded by the trainer's; None for other selectors."""
    journal: Sequence[StepStats | MeasuredCost] | None
    """What the bandit noted of this call; None if it keeps none."""
    step_seconds: Mapping[str, Sequence[float]]
    """By strategy, of steps over the rows that a rehearsal asked for; empty outside of one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rehearsal:
    """Strategies to run in turn at one batch size, to learn what a step takes."""

    strategies: Sequence[DraftStrategy]
    batch_size: int
    num_steps: int
    """Of each strategy, one after the other."""


class DecodeSession:
    """Decisions and bookkeeping of one call.

    Args:
        selector: that decides.
        rehearsal: what to run instead of what the selector would choose; it is then told nothing.
    """

    def __init__(self, selector: StrategySelector, rehearsal: Rehearsal | None = None) -> None:
        self._selector = selector
        self._rehearsal = rehearsal
        self._planned: deque[DraftStrategy] = deque()
        self._is_over = False
        if rehearsal is not None:
            self._planned.extend(
                strategy for strategy in rehearsal.strategies for _ in range(rehearsal.num_steps)
            )
        self._steps: deque[DecodeStep] = deque()
        self._recorder = StatisticsRecorder()
        self._requests: dict[str, RequestSteps] = {}
        self._step_seconds: dict[str, list[float]] = {}
        self._context_tokens = 0
        self._context_rows = 0
        self._context_age = 0

    def choose(self, requests: Sequence[Any]) -> tuple[DraftStrategy, int]:
        """Strategy of the next step over these requests, and their longest context."""
        self._learn()
        context_tokens = self._longest_context(requests)
        strategy = self._strategy(len(requests), context_tokens)
        self._recorder.enter(str(strategy))
        return strategy, context_tokens

    def _strategy(self, batch_size: int, context_tokens: int) -> DraftStrategy:
        if self._rehearsal is None:
            strategy = self._selector.select(batch_size, context_tokens)
            if strategy.drafter == "ngram":  # stands in for a drafter; SGLang has no such trees
                return OFF
            return strategy
        if batch_size >= self._rehearsal.batch_size:
            if self._planned:
                return self._planned.popleft()
            self._is_over = True
        return self._rehearsal.strategies[0]

    @property
    def is_over(self) -> bool:
        """Whether a rehearsal has seen all it asked for: its requests need not go on."""
        return self._is_over

    def _longest_context(self, requests: Sequence[Any]) -> int:
        self._context_age += 1
        if len(requests) != self._context_rows or self._context_age >= _CONTEXT_STEPS:
            self._context_rows, self._context_age = len(requests), 0
            self._context_tokens = max(
                len(request.origin_input_ids) + len(request.output_ids) for request in requests
            )
        return self._context_tokens

    def prefilled(self) -> None:
        """A prefill begins: what a decode step before it took ends with itself."""
        self._context_rows = 0
        self._recorder.enter(PREFILL)

    def begin(self, step: DecodeStep, *, follows: bool) -> None:
        """A step is under way; it follows the one before if nothing else ran between."""
        if self._steps:
            self._steps[-1].is_followed = follows
        self._steps.append(step)

    def accept(self, num_accepted: Sequence[int]) -> None:
        """Draft tokens accepted, by row, of the oldest step that still waits for them.

        Raises RuntimeError if they are of another number of rows.
        """
        step = next((step for step in self._steps if step.num_accepted is None), None)
        if step is None or len(step.requests) != len(num_accepted):
            rows = "no step waits" if step is None else f"the step had {len(step.requests)} rows"
            raise RuntimeError(
                f"SGLang reported {len(num_accepted)} rows of a decode step, but {rows}: its order "
                f"of results is not the one FastRL's plugin knows"
            )
        step.num_accepted = list(num_accepted)
        step.tokens_before = [len(request.output_ids) for request in step.requests]
        # The tokens that a response emits after its end are dropped; it is known to have ended by
        # the time the next step's result comes. So are those of one that was retracted meanwhile.
        step.requests = [
            None if request.finished() or request.is_retracted else request
            for request in step.requests
        ]

    def _learn(self, *, is_over: bool = False) -> None:
        """From the steps, in order, whose counts and times are known."""
        while self._steps and self._steps[0].num_accepted is not None:
            step = self._steps[0]
            until = step.end
            if len(self._steps) > 1:
                until = self._steps[1].start if step.is_followed else step.end
            elif not is_over:
                return
            if until is None or not until.is_past():
                return
            self._record(step, step.start.seconds_to(until))
            self._steps.popleft()

    def _record(self, step: DecodeStep, seconds: float) -> None:
        assert step.num_accepted is not None
        live = [row for row, request in enumerate(step.requests) if request is not None]
        accepted = [step.num_accepted[row] for row in live]
        lengths = [count + 1 for count in accepted]
        is_verified = not step.strategy.is_off
        for place, row in enumerate(live):
            request = step.requests[row]
            if request.finished():
                lengths[place] = _num_taken(request, step.tokens_before[row], lengths[place])
            steps = self._requests.get(request.rid)
            if steps is None:
                steps = self._requests[request.rid] = RequestSteps()
            steps.accept_lengths.append(lengths[place])
            steps.num_verify_steps += is_verified
        if not live or seconds <= 0:
            return
        self._recorder.add_step(step.strategy, lengths, accepted)
        if self._rehearsal is not None:
            if len(live) == self._rehearsal.batch_size and step.is_followed:
                self._step_seconds.setdefault(str(step.strategy), []).append(seconds)
            return
        offered, taken = counts_by_rank(step.strategy, accepted, step.tree, live)
        self._selector.record(
            StepStats(
                strategy=step.strategy,
                batch_size=len(live),
                context_tokens=step.context_tokens,
                accept_lengths=tuple(lengths),
                seconds=seconds,
                offered_by_rank=offered,
                accepted_by_rank=taken,
            )
        )

    def finish(self) -> SessionReport:
        """The call is over: what is to be sent back."""
        self._learn(is_over=True)
        state = journal = None
        if isinstance(self._selector, Bandit) and self._rehearsal is None:
            journal = self._selector.journal
            state = self._selector.state_dict()
        return SessionReport(
            stats=self._recorder.result(0.0),
            requests=self._requests,
            bandit_state=state,
            journal=journal,
            step_seconds=self._step_seconds,
        )


def _num_taken(request: Any, tokens_before: int, num_emitted: int) -> int:
    """Of the tokens of a response's last step, those up to its end."""
    return max(1, min(num_emitted, len(request.output_ids_through_stop) - tokens_before))


Counts = tuple[tuple[int, ...], ...]
"""[depth][rank], as `StepStats.offered_by_rank`."""


def counts_by_rank(
    strategy: DraftStrategy,
    num_accepted: Sequence[int],
    tree: VerifiedTree | None,
    rows: Sequence[int],
) -> tuple[Counts, Counts]:
    """Children offered and accepted by depth and rank; see `StepStats`.

    Args:
        strategy: of the step.
        num_accepted: draft tokens by row.
        tree: of all rows of the step; None for a chain.
        rows: which of them counts.
    """
    if tree is None:
        reached = [sum(n >= depth for n in num_accepted) for depth in range(strategy.depth + 1)]
        return tuple((n,) for n in reached[:-1]), tuple((n,) for n in reached[1:])
    offered = np.zeros((strategy.depth, strategy.topk), np.int64)
    accepted = np.zeros_like(offered)
    place_B = np.asarray(rows)
    num_nodes = tree.next_token_BN.shape[1]
    for depth in range(strategy.depth):
        place_B = place_B[tree.accepted_BD[place_B, depth] >= 0]
        if not len(place_B):
            break
        first_B = place_B * num_nodes
        taken_B = tree.accepted_BD[place_B, depth + 1] - first_B
        child_B = tree.next_token_BN[place_B, tree.accepted_BD[place_B, depth] - first_B]
        for rank in range(strategy.topk):
            exists_B = child_B >= 0
            if not (num_offered := int(exists_B.sum())):
                break
            offered[depth, rank] = num_offered
            accepted[depth, rank] = int(((child_B == taken_B) & exists_B).sum())
            child_B = np.where(exists_B, tree.next_sibling_BN[place_B, child_B], -1)
    return tuple(map(tuple, offered.tolist())), tuple(map(tuple, accepted.tolist()))
