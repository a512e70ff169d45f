"""What a decode step of each strategy takes at any batch size and context: a profile, and how far
off it is.

The profile (cost_profile.py) is measured before the first rollout, or, without that, made of the
first steps themselves. Each bucket of batch sizes tracks the ratio of measured to profiled seconds
as a median over a strategy's last steps, so that hiccups do not count and a wrong profile is
forgotten within a few steps. Where a
strategy has no steps yet, it is held to be as far off as the others are in the bucket, so that it
is not tried merely because it ran in better times; or as it is itself in other buckets. Steps of
n-gram arms are of two kinds, with drafts and without, and so counted by their mean. What was seen
of a strategy long ago is less sure, and gives way to how far off the others are by now: it may have
been run in bad times only.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Mapping
from typing import Any

from fastrl.rollout.cost_profile import CostProfile
from fastrl.rollout.place import Place

_WINDOW = 31
_PROFILE_DEVIATION = 0.08
"""Relative, of a profiled time that no step has confirmed."""
_STEP_DEVIATION = 0.1
"""Of a step's time, relative to its usual one."""
_OLD_DEVIATION = 0.1
"""Of a time that was last seen very long ago."""
_OLD_STEPS = 150.0
"""Steps in a bucket after which a time is half as old as that."""
_FARTHEST = 3.0
"""Times count as this often the median in a mean, at most."""


class CostModel:
    """Of all strategies, which are numbers.

    Args:
        num_arms: strategies.
        num_buckets: of batch sizes.
        two_kinds: strategies whose steps are.
    """

    def __init__(
        self, num_arms: int, num_buckets: int, two_kinds: Collection[int] = frozenset()
    ) -> None:
        self._two_kinds = frozenset(two_kinds)
        self._num_recorded = [0] * num_buckets
        self._last_recorded = [[0] * num_buckets for _ in range(num_arms)]
        self._profiles = [CostProfile() for _ in range(num_arms)]
        self._ratios = [
            [deque[float](maxlen=_WINDOW) for _ in range(num_buckets)] for _ in range(num_arms)
        ]
        self._medians: list[list[float | None]] = [[None] * num_buckets for _ in range(num_arms)]

    def covers_batch(self, arm: int, batch_size: int) -> bool:
        """Whether the profile reaches so far."""
        return self._profiles[arm].covers_batch(batch_size)

    def covers_context(self, arm: int, context_tokens: int) -> bool:
        """Whether the profile tells of such a context: it has one at least half as long."""
        return self._profiles[arm].covers_context(context_tokens)

    def add_profile(self, arm: int, batch_size: int, context_tokens: int, seconds: float) -> None:
        """A point of the profile."""
        self._profiles[arm].add(batch_size, context_tokens, seconds)

    def is_known(self, arm: int, place: Place) -> bool:
        """Whether a step there can be told: from the profile, or steps nearby."""
        if self._ratios[arm][place.bucket]:
            return True
        return self._profiles[arm].tells(place.batch_size)

    def record(self, arm: int, place: Place, seconds: float) -> None:
        """Learn from a step."""
        bucket, ratios = place.bucket, self._ratios[arm][place.bucket]
        if not self.is_known(arm, place):
            self._profiles[arm].extend(place.batch_size, place.context_tokens, seconds)
        if not ratios or self._last_recorded[arm][bucket] < self._num_recorded[bucket]:
            num_outdated = int(self._age(arm, bucket) * len(ratios))
            if num_outdated == len(ratios):
                ratios.append(self._ratio(arm, bucket))  # the vote of what was believed so far
            for _ in range(num_outdated):
                ratios.popleft()
        ratios.append(seconds / self._profiled(arm, place))
        self._medians[arm][bucket] = self._typical(arm, ratios)
        self._num_recorded[bucket] += 1
        self._last_recorded[arm][bucket] = self._num_recorded[bucket]

    def _typical(self, arm: int, ratios: Collection[float]) -> float:
        median = _median_low(ratios)
        if arm not in self._two_kinds:
            return median
        most = _FARTHEST * median
        return sum([ratio if ratio < most else most for ratio in ratios]) / len(ratios)

    def usual_seconds(self, arm: int, place: Place) -> float | None:
        """By the arm's own last steps and its profile alone; None where these do not tell."""
        if not self.is_known(arm, place):
            return None
        own = self._medians[arm][place.bucket]
        return self._profiled(arm, place) * (1.0 if own is None else own)

    def seconds(self, arm: int, place: Place) -> float:
        """Expected of a step."""
        return self._profiled(arm, place) * self._ratio(arm, place.bucket)

    def _profiled(self, arm: int, place: Place) -> float:
        return self._profiles[arm].seconds(place.batch_size, place.context_tokens)

    def _ratio(self, arm: int, bucket: int) -> float:
        """Measured over profiled seconds."""
        own = self._medians[arm][bucket]
        in_bucket = [medians[bucket] for medians in self._medians]
        del in_bucket[arm]
        others = [median for median in in_bucket if median is not None]
        if own is None:
            elsewhere = [median for median in self._medians[arm] if median is not None]
            return _median_low(others or elsewhere or [1.0])
        if not others:
            return own
        age = self._age(arm, bucket)
        return math.exp((1 - age) * math.log(own) + age * math.log(_median_low(others)))

    def _age(self, arm: int, bucket: int) -> float:
        """0 for what was just seen, 1 for what was seen very long ago."""
        steps = self._num_recorded[bucket] - self._last_recorded[arm][bucket]
        return steps / (steps + _OLD_STEPS)

    def num_steps(self, arm: int, bucket: int) -> int:
        """Steps that its ratio is a median of."""
        return max(len(self._ratios[arm][bucket]) - 1, 0)

    def deviation(self, arm: int, bucket: int) -> float:
        """Standard deviation of the logarithm of `seconds`."""
        ratios = self._ratios[arm][bucket]
        if not ratios:
            return _PROFILE_DEVIATION
        old = _OLD_DEVIATION * math.sqrt(self._age(arm, bucket))
        return math.hypot(_STEP_DEVIATION / math.sqrt(len(ratios)), old)

    def state_dict(self) -> dict[str, Any]:
        """Curves and ratios."""
        return {
            "profiles": [profile.state_dict() for profile in self._profiles],
            "ratios": [[list(ratios) for ratios in buckets] for buckets in self._ratios],
            "num_recorded": list(self._num_recorded),
            "last_recorded": [list(last) for last in self._last_recorded],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave."""
        for profile, points in zip(self._profiles, state["profiles"], strict=True):
            profile.load_state_dict(points)
        self._ratios = [
            [deque(ratios, maxlen=_WINDOW) for ratios in buckets] for buckets in state["ratios"]
        ]
        self._medians = [
            [self._typical(arm, ratios) if ratios else None for ratios in buckets]
            for arm, buckets in enumerate(self._ratios)
        ]
        self._num_recorded = list(state["num_recorded"])
        self._last_recorded = [list(last) for last in state["last_recorded"]]


def _median_low(values: Collection[float]) -> float:
    return sorted(values)[(len(values) - 1) // 2]
