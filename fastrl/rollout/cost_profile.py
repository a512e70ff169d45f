"""A strategy's profiled step times, between and beyond the points that were measured.

At the shortest context measured, seconds are a curve over batch sizes: linear between its points,
level before the first, as steep as the last two after the last. At some batch sizes a longer
context, the longest measured there and at least twice as long, tells by what share a step grows
with each token: linear in the context, level before the shortest, and never less for more, since
attention reads all of it. The share is linear between batch sizes too, and level outside those
measured: what noise there is in it would else grow with the batch. Leaves out what steps then take
(cost_model.py).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

_LONG = 2
"""Times the shortest context, from which on one is long: nearer ones tell noise."""

Point = tuple[int, float]
"""A batch size, and what was measured there."""


class CostProfile:
    """Of one strategy."""

    def __init__(self) -> None:
        self._seconds: dict[int, dict[int, float]] = {}  # by context, by batch size
        self._base_context = 0
        self._known: dict[
            int, tuple[float, float]
        ] = {}  # base seconds and growth a token, as asked for

    def __bool__(self) -> bool:
        """Whether there is any point."""
        return bool(self._seconds)

    def add(self, batch_size: int, context_tokens: int, seconds: float) -> None:
        """A point; a second one at the same place replaces the first."""
        self._seconds.setdefault(context_tokens, {})[batch_size] = seconds
        self._base_context = min(self._seconds)
        self._known.clear()

    def extend(self, batch_size: int, context_tokens: int, seconds: float) -> None:
        """A point from a step at any context, as it would be at the shortest measured."""
        if not self._seconds:
            self.add(batch_size, context_tokens, seconds)
            return
        growth = self._growth(batch_size) * max(context_tokens - self._base_context, 0)
        self.add(batch_size, self._base_context, seconds / (1 + growth))

    def covers_batch(self, batch_size: int) -> bool:
        """Whether so large a batch was measured, or a larger one."""
        return bool(self._seconds) and batch_size <= max(self._seconds[self._base_context])

    def covers_context(self, context_tokens: int) -> bool:
        """Whether a context was measured that is at least half as long."""
        return 2 * max(self._seconds, default=0) >= context_tokens

    def tells(self, batch_size: int) -> bool:
        """Whether a step's time can be told: up to twice the largest batch measured, or, from a
        single point, that batch."""
        if not self._seconds:
            return False
        base = self._seconds[self._base_context]
        return batch_size <= (2 if len(base) > 1 else 1) * max(base)

    def seconds(self, batch_size: int, context_tokens: int) -> float:
        """Of a step."""
        known = self._known.get(batch_size)
        if known is None:
            base = _on_curve(sorted(self._seconds[self._base_context].items()), batch_size)
            known = self._known[batch_size] = base, self._growth(batch_size)
        base, growth = known
        if context_tokens <= self._base_context:
            return base
        return base * (1 + growth * (context_tokens - self._base_context))

    def _growth(self, batch_size: int) -> float:
        """Share of a step's seconds that each further token of context adds."""
        base = sorted(self._seconds[self._base_context].items())
        shares: dict[int, float] = {}
        for context in sorted(self._seconds):
            if context >= _LONG * self._base_context:
                for size, seconds in self._seconds[context].items():
                    added = max(seconds / _on_curve(base, size) - 1, 0.0)
                    shares[size] = added / (context - self._base_context)
        if not shares:
            return 0.0
        size = min(max(batch_size, min(shares)), max(shares))
        return _on_curve(sorted(shares.items()), size, rises=False)

    def state_dict(self) -> list[list[Any]]:
        """All points: batch size, context, seconds."""
        return [
            [batch_size, context, seconds]
            for context, curve in self._seconds.items()
            for batch_size, seconds in curve.items()
        ]

    def load_state_dict(self, state: Sequence[Sequence[Any]]) -> None:
        """Take what `state_dict` gave."""
        self._seconds = {}
        for point in state:
            self.add(*point)


def _on_curve(points: Sequence[Point], size: int, *, rises: bool = True) -> float:
    """The value at a batch size, by points in ascending order."""
    place = bisect_left(points, size, key=lambda point: point[0])
    if place == 0 or len(points) == 1:
        return points[0][1]
    (lower, low), (upper, high) = points[min(place, len(points) - 1) - 1 :][:2]
    slope = (high - low) / (upper - lower)
    return low + (max(slope, 0.0) if rises else slope) * (size - lower)
