"""What each rank did in an RL step, side by side, and what follows from it for idle ranks.

A rank that has generated and scored its responses is idle until the last one has; what of that
time the drafter's training took was free. Nothing here imports Lightning, or knows where spans come
from (timeline.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fastrl.types import Span

ROLLOUT, REWARD, UPDATE, DRAFTER, WAITING = "rollout", "reward", "update", "drafter", "waiting"


@dataclass(frozen=True, kw_only=True, slots=True)
class RankStep:
    """A rank's RL step."""

    clock_offset_s: float
    """`time.time()` less `time.perf_counter()` there: ranks of several machines have no clock in
    common but the former."""
    phases: tuple[Span, ...]
    """Of the training loop, in order: weights published, rollout, rewards, update."""
    engine: tuple[Span, ...]
    """Of the engine during the rollout, as `EngineStats.spans`."""
    drafter: tuple[Span, ...]
    """Optimizer steps of the drafter, and what else its training did."""

    @property
    def start_s(self) -> float:
        """On the clock of all ranks."""
        return self.clock_offset_s + min(span.start_s for span in self.phases)

    @property
    def end_s(self) -> float:
        """On the clock of all ranks."""
        spans = (*self.phases, *self.drafter)
        return self.clock_offset_s + max(span.end_s for span in spans)

    @property
    def finished_s(self) -> float:
        """When its responses were done and scored, on the clock of all ranks."""
        ends = [span.end_s for span in self.phases if span.name in (ROLLOUT, REWARD)]
        return self.clock_offset_s + max(ends)


@dataclass(frozen=True, kw_only=True, slots=True)
class IdleShares:
    """Of all ranks' time together, in an RL step."""

    before: float
    """Between when a rank has finished and when the last one has."""
    after: float
    """Of that, in which the drafter was not trained either."""


def idle_shares(ranks: Sequence[RankStep]) -> IdleShares:
    """What ranks waited for one another's rollouts, and what is left of it."""
    step_seconds = max(rank.end_s for rank in ranks) - min(rank.start_s for rank in ranks)
    last_s = max(rank.finished_s for rank in ranks)
    idle = sum(last_s - rank.finished_s for rank in ranks)
    left = sum(span.seconds for spans in waits(ranks) for span in spans)
    total = step_seconds * len(ranks)
    return IdleShares(before=idle / total, after=left / total)


def waits(ranks: Sequence[RankStep]) -> list[tuple[Span, ...]]:
    """By rank, the idle time in which nothing was trained."""
    last_s = max(rank.finished_s for rank in ranks)
    return [
        tuple(
            _gaps(
                rank.drafter,
                rank.finished_s - rank.clock_offset_s,
                last_s - rank.clock_offset_s,
            )
        )
        for rank in ranks
    ]


def _gaps(spans: Iterable[Span], start_s: float, end_s: float) -> Iterable[Span]:
    for span in sorted(spans, key=lambda span: span.start_s):
        if span.end_s <= start_s:
            continue
        if span.start_s >= end_s:
            break
        if span.start_s > start_s:
            yield Span(name=WAITING, start_s=start_s, seconds=span.start_s - start_s)
        start_s = span.end_s
    if start_s < end_s:
        yield Span(name=WAITING, start_s=start_s, seconds=end_s - start_s)


def joined(spans: Iterable[Span], gap_s: float) -> list[Span]:
    """Neighbours of one name as one span, where they lie no further apart."""
    result: list[Span] = []
    ordered = sorted(spans, key=lambda span: span.start_s)
    for name, group in itertools.groupby(ordered, key=lambda span: span.name):
        first, *others = group
        result.append(first)
        for span in others:
            last = result[-1]
            if span.start_s - last.end_s > gap_s:
                result.append(span)
                continue
            seconds = max(span.end_s, last.end_s) - last.start_s
            result[-1] = Span(name=name, start_s=last.start_s, seconds=seconds)
    return result
