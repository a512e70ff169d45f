"""What speculation gained over plain decoding, measured: by bucket of batch sizes and by arm.

The gain of an arm is the tokens that its steps yield a row, times the seconds that a step of `off`
takes in units of its own. The latter are told from pairs: steps of the two that followed one
another at the same batch size and context, give or take an eighth, and so at nearly the same load
of the machine; bandits run a control step of `off` now and then to have such pairs. So neither
acceptance lengths, nor other times, nor the machine's hiccups pose as a gain. Gains of several arms
or buckets are means over the seconds spent on those that have pairs; nothing is said where these
are less than half.

What is held against beliefs (expected gains, seconds lost) is summed by level of references as well
(`StepStats.referenced_rows`), since what n-grams are believed to gain depends on it.

Leaves out how times are tracked for choosing (`cost_model.py`, `bandit_windows.py`).
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from fastrl.rollout.place import Place

_MOST_PAIRS = 31
"""Newest pairs of an arm in a bucket that count."""
_FEWEST_PAIRS = 3
_NEAR_CONTEXT = 64
"""Tokens, besides an eighth, that the contexts of a pair may lie apart."""
_FARTHEST = 3.0
"""Times and ratios count as this often the median, or one over this, at most: a hiccup would else
decide a short period."""


class _Step(NamedTuple):
    place: Place
    arm: int
    seconds: float


class _ArmSums:
    """Of an arm's steps in a bucket."""

    __slots__ = ("num_steps", "seconds", "tokens_per_row")

    def __init__(
        self, num_steps: int = 0, tokens_per_row: float = 0.0, seconds: float = 0.0
    ) -> None:
        self.num_steps = num_steps
        self.tokens_per_row = tokens_per_row
        self.seconds = seconds

    def as_list(self) -> list[float]:
        return [self.num_steps, self.tokens_per_row, self.seconds]


class GainMeter:
    """Sums over a period, by bucket and arm.

    Args:
        num_buckets: buckets are numbers.
        num_arms: arms are numbers; 0 is `off`.
        two_kinds: arms whose steps are, with drafts and without, as n-gram ones.
    """

    def __init__(
        self, num_buckets: int, num_arms: int, two_kinds: Collection[int] = frozenset()
    ) -> None:
        self._two_kinds = frozenset(two_kinds)
        self._num_buckets = num_buckets
        self._num_arms = num_arms
        # Seconds of an arm over those of `off`, as pairs showed it.
        self._pairs = [
            [deque[float](maxlen=_MOST_PAIRS) for _ in range(num_arms)] for _ in range(num_buckets)
        ]
        self.start_period()

    def start_period(self) -> None:
        """Sum from here on."""
        self._last: _Step | None = None
        self._raw_seconds = [0.0] * self._num_buckets
        self._rows = [0] * self._num_buckets
        self._contexts = [0] * self._num_buckets
        self._tokens = [0] * self._num_buckets
        self._sums = [[_ArmSums() for _ in range(self._num_arms)] for _ in range(self._num_buckets)]
        # Of each arm, by bucket and level.
        self._seconds_by_level: dict[tuple[int, int], list[float]] = {}

    def add(
        self, place: Place, arm: int, num_tokens: int, seconds: float, usual_seconds: float | None
    ) -> None:
        """A step, and what such a step usually takes (None: nothing is known of it)."""
        step = _Step(place, arm, seconds)
        self._add_pair(self._last, step)
        self._last = step
        bucket, level, rows, context = place
        self._rows[bucket] += rows
        self._contexts[bucket] += context
        self._tokens[bucket] += num_tokens
        self._raw_seconds[bucket] += seconds
        sums = self._sums[bucket][arm]
        sums.num_steps += 1
        sums.tokens_per_row += num_tokens / rows
        if usual_seconds is not None:
            seconds = min(seconds, _FARTHEST * usual_seconds)
        sums.seconds += seconds
        by_arm = self._seconds_by_level.get((bucket, level))
        if by_arm is None:
            by_arm = self._seconds_by_level[bucket, level] = [0.0] * self._num_arms
        by_arm[arm] += seconds

    def _add_pair(self, last: _Step | None, step: _Step) -> None:
        if last is None or (last.arm == 0) == (step.arm == 0):
            return
        place, its = step.place, last.place
        if place.bucket != its.bucket:
            return
        if 8 * abs(its.batch_size - place.batch_size) > place.batch_size:
            return
        if abs(its.context_tokens - place.context_tokens) > _NEAR_CONTEXT + (
            place.context_tokens // 8
        ):
            return
        off, other = (last, step) if last.arm == 0 else (step, last)
        self._pairs[place.bucket][other.arm].append(other.seconds / off.seconds)

    @property
    def buckets(self) -> list[int]:
        """Those with steps in the period."""
        return [bucket for bucket, rows in enumerate(self._rows) if rows]

    def level_shares(self, bucket: int) -> dict[int, float]:
        """Of the period's seconds in a bucket, by level."""
        seconds = {
            level: sum(by_arm)
            for (its, level), by_arm in self._seconds_by_level.items()
            if its == bucket
        }
        total = sum(seconds.values())
        return {level: its / total for level, its in seconds.items()}

    def mean_place(self, bucket: int, level: int = 0) -> Place:
        """At a level, with the mean rows and context of the period's steps in such a bucket,
        rounded."""
        num_steps = sum(sums.num_steps for sums in self._sums[bucket])
        mean_rows = round(self._rows[bucket] / num_steps)
        return Place(bucket, level, mean_rows, round(self._contexts[bucket] / num_steps))

    def tokens_per_second(self, bucket: int) -> float:
        """Of the whole batch together, over the period's steps in such a bucket."""
        return self._tokens[bucket] / self._raw_seconds[bucket]

    def arm_gains(self, bucket: int) -> dict[int, float]:
        """By arm run in the bucket this period and paired: tokens a second over those of `off`."""
        gains = {}
        for arm, sums in enumerate(self._sums[bucket]):
            pairs = self._pairs[bucket][arm]
            if sums.num_steps and (arm == 0 or len(pairs) >= _FEWEST_PAIRS):
                relative_seconds = 1.0
                if arm:
                    is_mean = arm in self._two_kinds  # whose median would be of one kind
                    relative_seconds = (_clipped_mean if is_mean else statistics.median)(pairs)
                gains[arm] = sums.tokens_per_row / sums.num_steps / relative_seconds
        return gains

    def gain(self, buckets: Sequence[int]) -> float | None:
        """Over the period's steps in these buckets; None if less than half of it was measured."""
        spent = needed = total = 0.0
        for bucket in buckets:
            total += sum(sums.seconds for sums in self._sums[bucket])
            for arm, gain in self.arm_gains(bucket).items():
                seconds = self._sums[bucket][arm].seconds
                spent += seconds
                needed += seconds * gain
        return needed / spent if spent > total / 2 else None

    def expected_gain(
        self, bucket: int, gains_by_level: Mapping[int, Mapping[int, float]]
    ) -> float | None:
        """What the period's seconds in a bucket would have gained by these gains of the arms.

        None without a step of any of them.
        """
        spent = needed = 0.0
        for level, arm_gains in gains_by_level.items():
            by_arm = self._seconds_by_level[bucket, level]
            spent += sum(by_arm[arm] for arm in arm_gains)
            needed += sum(by_arm[arm] * gain for arm, gain in arm_gains.items())
        return needed / spent if spent else None

    def accept_lengths(self, bucket: int) -> dict[int, float]:
        """Mean tokens a row and step, by arm run in the bucket this period."""
        return {
            arm: sums.tokens_per_row / sums.num_steps
            for arm, sums in enumerate(self._sums[bucket])
            if sums.num_steps
        }

    def lost_seconds(
        self,
        arm_gains_by_place: Mapping[tuple[int, int], Mapping[int, float]],
        barred_gains_by_bucket: Mapping[int, Mapping[int, float]],
    ) -> float:
        """Seconds of the period lost against the best arms.

        Args:
            arm_gains_by_place: what is believed of every arm that may run, now that the period is
                over, by bucket and level with steps in it; empty where nothing is known.
            barred_gains_by_bucket: what others gained that ran in it, by bucket; nothing was lost
                on those that gained more than the best of the former would have.
        """
        lost = 0.0
        for (bucket, level), arm_gains in arm_gains_by_place.items():
            if not arm_gains:
                continue
            best = max(arm_gains.values())
            for arm, gain in (*arm_gains.items(), *barred_gains_by_bucket[bucket].items()):
                seconds = self._seconds_by_level[bucket, level][arm]
                lost += seconds * max(1 - gain / best, 0.0)
        return lost

    @property
    def total_seconds(self) -> float:
        """Of the period's steps."""
        return sum(sums.seconds for by_arm in self._sums for sums in by_arm)

    def state_dict(self) -> dict[str, Any]:
        """All of it, in plain numbers and lists."""
        return {
            "pairs": [[list(pairs) for pairs in by_arm] for by_arm in self._pairs],
            "last": None if self._last is None else [list(self._last.place), *self._last[1:]],
            "raw_seconds": list(self._raw_seconds),
            "rows": list(self._rows),
            "contexts": list(self._contexts),
            "tokens": list(self._tokens),
            "sums": [[sums.as_list() for sums in by_arm] for by_arm in self._sums],
            "seconds_by_level": [
                [*place, list(by_arm)] for place, by_arm in self._seconds_by_level.items()
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave."""
        self._pairs = [
            [deque(pairs, maxlen=_MOST_PAIRS) for pairs in by_arm] for by_arm in state["pairs"]
        ]
        self._last = None
        if state["last"] is not None:
            place, arm, seconds = state["last"]
            self._last = _Step(Place(*place), arm, seconds)
        self._raw_seconds = list(state["raw_seconds"])
        self._rows = list(state["rows"])
        self._contexts = list(state["contexts"])
        self._tokens = list(state["tokens"])
        self._sums = [[_ArmSums(*sums) for sums in by_arm] for by_arm in state["sums"]]
        self._seconds_by_level = {
            (bucket, level): list(by_arm) for bucket, level, by_arm in state["seconds_by_level"]
        }


def _clipped_mean(ratios: Collection[float]) -> float:
    median = statistics.median(ratios)
    low, high = median / _FARTHEST, median * _FARTHEST
    return statistics.fmean(min(max(ratio, low), high) for ratio in ratios)
