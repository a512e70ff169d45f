"""What the decode steps of bench_bad_drafter.py show: paces against plain decoding, and verdicts.

A step that emitted n tokens from b live rows is held against n / b plain steps at b rows of the
same phase, since batches shrink differently under speculation and the machine's pace drifts from
minute to minute. Wall times decide. On a noisy machine, the same with
each step counted as the median of its strategy at its live batch, over all rounds and both arms,
shows what is due to the bandit's choices. Leaves out how steps are made.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain

import numpy

from fastrl.types import StepStats

GOOD, BAD, RECOVERED = PHASES = ("good", "bad", "recovered")

NUM_GRACE_STEPS = 20
"""Decode steps in a bucket that a change may cost."""
TOLERANCE = 0.97
"""Share of tokens a second that counts as none lost."""
MIN_JUDGED_STEPS = 20
"""Steps in a bucket that a pace is taken over, at the least."""

Quartiles = tuple[float | None, float | None, float | None]
"""First quartile, median, third quartile over rounds, each one round's value; None: never."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """One time through all phases."""

    steps: Mapping[str, Sequence[StepStats]]
    """The bandit's, by phase."""
    off_steps: Mapping[str, Sequence[StepStats]]
    """Plain decoding's of the same rollouts, interleaved, by phase."""
    alarm_step: int | None
    """Step of the bad phase at which the bandit noticed by itself."""
    exclusion_step: int | None
    """Step of the bad phase at which the health check excluded the drafter."""


@dataclass(frozen=True, kw_only=True)
class BucketOfRound:
    """What one round shows of a bucket."""

    num_bad_steps: int
    """Decode steps of the bucket in the bad phase."""
    good_ratio: float
    """Tokens a second to plain decoding's on the same tokens, before the swap."""
    back_ratio: float
    """The same while the drafter is bad, steps of grace left out."""
    back_ratio_of_medians: float
    """The same, each step counted as the median of its strategy at its live batch, all rounds'."""
    steps_until_back: int | None
    """Steps before the first 20 on end within 3% of plain decoding (of medians)."""
    speculation_share: float
    """Steps of the bad phase that speculate all the same, steps of grace left out."""
    lost_seconds: float
    """What the steps of grace took longer than plain decoding."""
    recovery: float
    """Tokens a second of the recovered phase, steps of grace left out, relative to the good."""
    recovery_of_medians: float
    """The same, of medians."""
    steps_until_recovered: int | None
    """Steps before the first 20 on end within 3% of the good phase (of medians)."""
    alarm_step: int | None
    """As the round's."""
    exclusion_step: int | None
    """As the round's."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A bucket over all rounds that had steps enough in it."""

    scenario: str
    batch_size: int
    """Of the engine."""
    bucket: int
    """Its smallest live batch."""
    num_rounds: int
    is_back: bool
    """Whether the median round is within 3% of plain decoding after the steps of grace."""
    is_recovered: bool
    """Whether it is, once the drafter is good again, within 3% of what it was."""
    rounds: Mapping[str, Quartiles]
    """Of each field of `BucketOfRound`."""


# -- paces ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Steps in a bucket, and what plain decoding would have taken for their tokens."""

    seconds: Sequence[float]
    off_seconds: Sequence[float]

    def ratio(self, first: int = 0, last: int | None = None) -> float:
        """Tokens a second to plain decoding's, from a step on, up to before another."""
        return sum(self.off_seconds[first:last]) / sum(self.seconds[first:last])

    def steps_until(self, ratio: float) -> int | None:
        """Steps before the first `MIN_JUDGED_STEPS` on end that have this ratio."""
        places = range(len(self.seconds) - MIN_JUDGED_STEPS + 1)
        return next((k for k in places if self.ratio(k, k + MIN_JUDGED_STEPS) >= ratio), None)


def pace(
    steps: Sequence[StepStats],
    seconds: Sequence[float],
    off_seconds: Callable[[int], float],
) -> Pace:
    """Of steps that took these seconds, `off_seconds` being of a plain step by live batch."""
    return Pace(
        seconds=seconds,
        off_seconds=[
            step.num_tokens / step.batch_size * off_seconds(step.batch_size) for step in steps
        ],
    )


def by_live_batch(
    steps: Iterable[StepStats], average: Callable[[Sequence[float]], float]
) -> Callable[[int], float]:
    """Average seconds of a step by live batch, linear between those that occurred."""
    seconds: dict[int, list[float]] = {}
    for step in steps:
        seconds.setdefault(step.batch_size, []).append(step.seconds)
    sizes = sorted(seconds)
    averages = [average(seconds[size]) for size in sizes]
    return lambda batch_size: float(numpy.interp(batch_size, sizes, averages))


def all_steps(round_: Round) -> Iterator[StepStats]:
    """The bandit's and plain decoding's."""
    yield from chain.from_iterable(round_.steps.values())
    yield from chain.from_iterable(round_.off_steps.values())


def median_seconds(steps: Iterable[StepStats]) -> dict[tuple[str, int], float]:
    """Of a step, by strategy and live batch."""
    seconds: dict[tuple[str, int], list[float]] = {}
    for step in steps:
        seconds.setdefault((str(step.strategy), step.batch_size), []).append(step.seconds)
    return {key: statistics.median(values) for key, values in seconds.items()}


# -- figures -------------------------------------------------------------------------------------


def buckets_of_round(
    round_: Round, pooled: Sequence[StepStats], thresholds: Sequence[int]
) -> dict[int, BucketOfRound]:
    """Of each bucket that had steps enough in every phase, by its smallest live batch.

    Args:
        pooled: steps of this and other rounds, which medians are of.
        thresholds: smallest live batch of each bucket, ascending.
    """
    off_means = {
        phase: by_live_batch(steps, statistics.fmean) for phase, steps in round_.off_steps.items()
    }
    off_median = by_live_batch((s for s in pooled if s.strategy.is_off), statistics.median)
    medians = median_seconds(pooled)
    found = {}
    for place, bucket in enumerate(thresholds):
        steps = {
            phase: [
                s
                for s in round_.steps[phase]
                if bisect_right(thresholds, s.batch_size) - 1 == place
            ]
            for phase in PHASES
        }
        if min(map(len, steps.values())) < NUM_GRACE_STEPS + MIN_JUDGED_STEPS:
            continue
        wall = {
            phase: pace(some, [step.seconds for step in some], off_means[phase])
            for phase, some in steps.items()
        }
        usual = {
            phase: pace(
                some, [medians[str(step.strategy), step.batch_size] for step in some], off_median
            )
            for phase, some in steps.items()
        }
        late = steps[BAD][NUM_GRACE_STEPS:]
        found[bucket] = BucketOfRound(
            num_bad_steps=len(steps[BAD]),
            good_ratio=wall[GOOD].ratio(),
            back_ratio=wall[BAD].ratio(NUM_GRACE_STEPS),
            back_ratio_of_medians=usual[BAD].ratio(NUM_GRACE_STEPS),
            steps_until_back=usual[BAD].steps_until(TOLERANCE),
            speculation_share=sum(not step.strategy.is_off for step in late) / len(late),
            lost_seconds=sum(wall[BAD].seconds[:NUM_GRACE_STEPS])
            - sum(wall[BAD].off_seconds[:NUM_GRACE_STEPS]),
            recovery=wall[RECOVERED].ratio(NUM_GRACE_STEPS) / wall[GOOD].ratio(),
            recovery_of_medians=usual[RECOVERED].ratio(NUM_GRACE_STEPS) / usual[GOOD].ratio(),
            steps_until_recovered=usual[RECOVERED].steps_until(TOLERANCE * usual[GOOD].ratio()),
            alarm_step=round_.alarm_step,
            exclusion_step=round_.exclusion_step,
        )
    return found


def figures(
    scenario: str, batch_size: int, rounds: Sequence[Round], thresholds: Sequence[int]
) -> list[Figure]:
    """One for each bucket that any round had steps enough in."""
    pooled = [step for round_ in rounds for step in all_steps(round_)]
    by_round = [buckets_of_round(round_, pooled, thresholds) for round_ in rounds]
    found = []
    for bucket in thresholds:
        if not (some := [buckets[bucket] for buckets in by_round if bucket in buckets]):
            continue
        spread = {
            one.name: quartiles([vars(values)[one.name] for values in some])
            for one in fields(BucketOfRound)
        }
        found.append(
            Figure(
                scenario=scenario,
                batch_size=batch_size,
                bucket=bucket,
                num_rounds=len(some),
                is_back=_reaches(spread["back_ratio"], TOLERANCE),
                is_recovered=_reaches(spread["recovery"], TOLERANCE),
                rounds=spread,
            )
        )
    return found


def quartiles(values: Sequence[float | None]) -> Quartiles:
    """Values at the quartiles' ranks, the lower of two in the middle; None is last, as never."""
    ordered = sorted(values, key=lambda value: math.inf if value is None else value)
    last = len(ordered) - 1
    return ordered[last // 4], ordered[last // 2], ordered[last - last // 4]


def _reaches(spread: Quartiles, least: float) -> bool:
    median = spread[1]
    return median is not None and median >= least


# -- output --------------------------------------------------------------------------------------

_COLUMNS = {
    "bad steps": ("num_bad_steps", "{:.0f}"),
    "good/off": ("good_ratio", "{:.2f}"),
    "bad/off": ("back_ratio", "{:.3f}"),
    "(medians)": ("back_ratio_of_medians", "{:.3f}"),
    "after": ("steps_until_back", "{:.0f}"),
    "lost s": ("lost_seconds", "{:.3f}"),
    "speculates": ("speculation_share", "{:.3f}"),
    "alarm": ("alarm_step", "{:.0f}"),
    "excluded": ("exclusion_step", "{:.0f}"),
    "recovery": ("recovery", "{:.3f}"),
    "(medians) ": ("recovery_of_medians", "{:.3f}"),
    "after ": ("steps_until_recovered", "{:.0f}"),
}
"""Printed: field of `BucketOfRound`, format."""
_WITH_SPREAD = ("bad/off", "recovery")


def print_header() -> None:
    """Of the lines that `print_figure` prints."""
    print("medians over rounds, [quartiles]; after: steps until 20 on end are within 3%; -: never")
    names = (f"{name:>{_width(name)}}" for name in _COLUMNS)
    print(f"{'swap':>9} {'batch':>5} {'bucket':>6} {'rounds':>6} ", *names, " back, recovered")


def print_figure(figure: Figure) -> None:
    """A line."""
    cells = []
    for name, (key, form) in _COLUMNS.items():
        low, median, high = (
            "-" if value is None else form.format(value) for value in figure.rounds[key]
        )
        text = f"{median} [{low}, {high}]" if name in _WITH_SPREAD else median
        cells.append(f"{text:>{_width(name)}}")
    verdict = ", ".join(
        "yes" if is_met else "NO" for is_met in (figure.is_back, figure.is_recovered)
    )
    print(
        f"{figure.scenario:>9} {figure.batch_size:>5} {figure.bucket:>6} {figure.num_rounds:>6} ",
        *cells,
        f" {verdict}",
        flush=True,
    )


def _width(name: str) -> int:
    return 20 if name in _WITH_SPREAD else max(len(name), 5)
