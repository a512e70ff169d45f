"""What speculation gained over plain decoding, measured: by bucket of batch sizes and by arm.

A gain is the seconds that `off` would have needed for the tokens that steps yielded, over the
seconds that those steps took. What `off` needs is its own tracked time at each step's batch size,
never an acceptance length; bandits run a control step of `off` now and then to keep it true. Means
go with means: tracked times are medians, so that of `off` is raised to its mean by how its own
steps differ from it. A step counts for three times the usual at most: a hiccup of the machine would
else decide short periods.

Leaves out how times are tracked (`cost_model.py`, `bandit_windows.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_LONGEST = 3.0
_EXCESS_PERIOD_KEEP = 0.5
_EXCESS_PRIOR_STEPS = 5.0


class GainMeter:
    """Sums over a period, by bucket and arm.

    Args:
        num_buckets: buckets are numbers.
        num_arms: arms are numbers; 0 is `off`.
    """

    def __init__(self, num_buckets: int, num_arms: int) -> None:
        self._num_buckets = num_buckets
        self._num_arms = num_arms
        # Mean over median of the seconds of `off`: of this period and fading ones before.
        self._excess_steps = self._excess_sum = 0.0
        self.start_period()

    def start_period(self) -> None:
        """Sum from here on."""
        self._excess_steps *= _EXCESS_PERIOD_KEEP
        self._excess_sum *= _EXCESS_PERIOD_KEEP
        self._steps = [0] * self._num_buckets
        self._rows = [0] * self._num_buckets
        self._tokens = [0] * self._num_buckets
        self._seconds = [[0.0] * self._num_arms for _ in range(self._num_buckets)]
        self._off_seconds = [[0.0] * self._num_arms for _ in range(self._num_buckets)]

    def add(
        self,
        bucket: int,
        arm: int,
        rows: int,
        num_tokens: int,
        seconds: float,
        usual_seconds: float,
        off_seconds: float,
    ) -> None:
        """A step, and what it and a step of `off` in its place usually take."""
        seconds = min(seconds, _LONGEST * usual_seconds)
        self._steps[bucket] += 1
        self._rows[bucket] += rows
        self._tokens[bucket] += num_tokens
        self._seconds[bucket][arm] += seconds
        self._off_seconds[bucket][arm] += num_tokens / rows * off_seconds
        if arm == 0:
            self._excess_steps += 1
            self._excess_sum += seconds / usual_seconds

    @property
    def _excess(self) -> float:
        prior = _EXCESS_PRIOR_STEPS
        return (prior + self._excess_sum) / (prior + self._excess_steps)

    @property
    def buckets(self) -> list[int]:
        """Those with steps in the period."""
        return [bucket for bucket, num_steps in enumerate(self._steps) if num_steps]

    def batch_size(self, bucket: int) -> int:
        """Mean rows of the period's steps in such a bucket, rounded."""
        return round(self._rows[bucket] / self._steps[bucket])

    def tokens_per_second(self, bucket: int) -> float:
        """Of the whole batch together, over the period's steps in such a bucket."""
        return self._tokens[bucket] / sum(self._seconds[bucket])

    def arm_gains(self, bucket: int) -> dict[int, float]:
        """By arm run in the bucket this period: tokens a second over those of `off`."""
        return {
            arm: self._excess * off_seconds / seconds
            for arm, (seconds, off_seconds) in enumerate(
                zip(self._seconds[bucket], self._off_seconds[bucket], strict=True)
            )
            if seconds
        }

    def gain(self, buckets: Sequence[int]) -> float:
        """Over all the period's steps in such buckets; 1 without any."""
        spent = sum(sum(self._seconds[bucket]) for bucket in buckets)
        needed = sum(sum(self._off_seconds[bucket]) for bucket in buckets)
        return self._excess * needed / spent if spent else 1.0

    def expected_gain(self, bucket: int, arm_gains: Mapping[int, float]) -> float | None:
        """What the period's seconds in a bucket would have gained by these gains of the arms.

        None without a step of any of them.
        """
        spent = {arm: self._seconds[bucket][arm] for arm in arm_gains}
        total = sum(spent.values())
        return sum(spent[arm] * gain for arm, gain in arm_gains.items()) / total if total else None

    def lost_seconds(self, arm_gains_by_bucket: Mapping[int, Mapping[int, float]]) -> float:
        """Seconds of the period lost against the best arms.

        Args:
            arm_gains_by_bucket: what is believed of every arm, now that the period is over.
        """
        return sum(
            self._seconds[bucket][arm] * (1 - gain / max(arm_gains.values()))
            for bucket, arm_gains in arm_gains_by_bucket.items()
            for arm, gain in arm_gains.items()
        )

    @property
    def total_seconds(self) -> float:
        """Of the period's steps."""
        return sum(map(sum, self._seconds))

    def state_dict(self) -> dict[str, Any]:
        """All of it, in plain numbers and lists."""
        return {
            "excess": [self._excess_steps, self._excess_sum],
            "steps": list(self._steps),
            "rows": list(self._rows),
            "tokens": list(self._tokens),
            "seconds": [list(row) for row in self._seconds],
            "off_seconds": [list(row) for row in self._off_seconds],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave."""
        self._excess_steps, self._excess_sum = state["excess"]
        self._steps = list(state["steps"])
        self._rows = list(state["rows"])
        self._tokens = list(state["tokens"])
        self._seconds = [list(row) for row in state["seconds"]]
        self._off_seconds = [list(row) for row in state["off_seconds"]]
