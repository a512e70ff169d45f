"""What each rank did in an RL step, side by side, and what follows from it for idle ranks.

A rank that has generated and scored its responses is idle until the last one has. What of that
time the drafter's training took was free; where it went on beyond, it delayed the step. Nothing
here imports Lightning, or knows where spans come from (timeline.py).
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

    def drafter_seconds(self, start_s: float, end_s: float) -> float:
        """Of the drafter's training between two times on the clock of all ranks."""
        own_start, own_end = start_s - self.clock_offset_s, end_s - self.clock_offset_s
        return sum(
            max(min(span.end_s, own_end) - max(span.start_s, own_start), 0.0)
            for span in self.drafter
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class IdleTime:
    """Of all ranks together, in an RL step."""

    rank_seconds: float
    """Of the step, summed over ranks."""
    idle_seconds: float
    """From when a rank has finished to when the last one has, summed over ranks."""
    trained_seconds: float
    """Of those, in which the drafter was trained."""
    num_free_steps: int
    """The drafter's spans that began in them."""
    delay_seconds: float
    """From when the last rank has finished to the end of the last of those spans: what the others'
    update waited for."""

    @property
    def share_before(self) -> float:
        """Of the ranks' time that is idle without training."""
        return self.idle_seconds / self.rank_seconds if self.rank_seconds else 0.0

    @property
    def share_after(self) -> float:
        """Of the ranks' time in which nothing was done."""
        left = self.idle_seconds - self.trained_seconds
        return left / self.rank_seconds if self.rank_seconds else 0.0


def idle_time(ranks: Sequence[RankStep]) -> IdleTime:
    """What ranks waited for one another's rollouts, and what became of it."""
    step_seconds = max(rank.end_s for rank in ranks) - min(rank.start_s for rank in ranks)
    last_s = max(rank.finished_s for rank in ranks)
    idle = trained = delay = 0.0
    num_free = 0
    for rank in ranks:
        idle += last_s - rank.finished_s
        trained += rank.drafter_seconds(rank.finished_s, last_s)
        for span in rank.drafter:
            start_s, end_s = (rank.clock_offset_s + one for one in (span.start_s, span.end_s))
            if rank.finished_s <= start_s < last_s:
                num_free += 1
                delay = max(delay, end_s - last_s)
    return IdleTime(
        rank_seconds=step_seconds * len(ranks),
        idle_seconds=idle,
        trained_seconds=trained,
        num_free_steps=num_free,
        delay_seconds=delay,
    )


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
