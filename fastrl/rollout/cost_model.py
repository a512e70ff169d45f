"""What a decode step of one strategy takes at any batch size: a profile, and how far off it is.

The profile is a curve over batch sizes, measured before the first rollout, or, without that, made
of the first steps themselves. Each bucket of batch sizes tracks the ratio of measured to profiled
seconds as a median over the last steps, so that hiccups do not count and a wrong profile is
forgotten within a few steps; it also follows growing contexts. A bucket without steps has the ratio
of the others.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Collection
from typing import Any

_WINDOW = 31
_PROFILE_DEVIATION = 0.08
"""Relative, of a profiled time that no step has confirmed: wide enough to have arms tried that are
not much worse."""
_STEP_DEVIATION = 0.06


class CostModel:
    """Of one strategy.

    Args:
        num_buckets: of batch sizes.
    """

    def __init__(self, num_buckets: int) -> None:
        self._profile: dict[int, float] = {}
        self._curve: dict[int, float] = {}  # values between the profile's points, as asked for
        self._ratios = [deque[float](maxlen=_WINDOW) for _ in range(num_buckets)]
        self._medians = [1.0] * num_buckets
        self._usual_ratio = 1.0  # of all buckets with steps

    def covers(self, batch_size: int) -> bool:
        """Whether the curve reaches this batch size."""
        return batch_size <= max(self._profile, default=0)

    def add_profile(self, batch_size: int, seconds: float) -> None:
        """A point of the curve."""
        self._profile[batch_size] = seconds
        self._curve.clear()

    def is_known(self, bucket: int, batch_size: int) -> bool:
        """Whether a step at this batch size can be told: from the profile, or steps nearby."""
        return bool(self._ratios[bucket]) or (
            len(self._profile) > 1 and batch_size <= 2 * max(self._profile)
        )

    def record(self, bucket: int, batch_size: int, seconds: float) -> None:
        """Learn from a step."""
        if not self._ratios[bucket] and not self.is_known(bucket, batch_size):
            self.add_profile(batch_size, seconds)
        ratios = self._ratios[bucket]
        if not ratios:
            ratios.append(self._usual_ratio)  # the profile's vote
        ratios.append(seconds / self._profiled(batch_size))
        self._medians[bucket] = _median_low(ratios)
        self._learn_usual_ratio()

    def seconds(self, bucket: int, batch_size: int) -> float:
        """Expected of a step."""
        ratio = self._medians[bucket] if self._ratios[bucket] else self._usual_ratio
        return self._profiled(batch_size) * ratio

    def num_steps(self, bucket: int) -> int:
        """Steps that its ratio is a median of."""
        return max(len(self._ratios[bucket]) - 1, 0)

    def deviation(self, bucket: int) -> float:
        """Standard deviation of the logarithm of `seconds`."""
        if not self._ratios[bucket]:
            return _PROFILE_DEVIATION
        return _STEP_DEVIATION / math.sqrt(len(self._ratios[bucket]))

    def _learn_usual_ratio(self) -> None:
        medians = [m for m, ratios in zip(self._medians, self._ratios, strict=True) if ratios]
        self._usual_ratio = _median_low(medians) if medians else 1.0

    def _profiled(self, batch_size: int) -> float:
        """The curve: linear between its points, level before the first, as steep as the last two
        after the last."""
        if batch_size not in self._curve:
            self._curve[batch_size] = self._interpolated(batch_size)
        return self._curve[batch_size]

    def _interpolated(self, batch_size: int) -> float:
        points = sorted(self._profile)
        place = bisect_left(points, batch_size)
        if place == 0 or len(points) == 1:
            return self._profile[points[0]]
        lower, upper = points[min(place, len(points) - 1) - 1], points[min(place, len(points) - 1)]
        slope = (self._profile[upper] - self._profile[lower]) / (upper - lower)
        return self._profile[lower] + max(slope, 0.0) * (batch_size - lower)

    def state_dict(self) -> dict[str, Any]:
        """Curve and ratios."""
        return {
            "profile": [[batch, seconds] for batch, seconds in self._profile.items()],
            "ratios": [list(ratios) for ratios in self._ratios],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave."""
        self._profile = dict(state["profile"])
        self._curve.clear()
        self._ratios = [deque(ratios, maxlen=_WINDOW) for ratios in state["ratios"]]
        self._medians = [_median_low(ratios) if ratios else 1.0 for ratios in self._ratios]
        self._learn_usual_ratio()


def _median_low(values: Collection[float]) -> float:
    return sorted(values)[(len(values) - 1) // 2]
