"""Seconds of an RL step on the wall clock: from the previous step's end to this one's.

Counts everything a step costs, the rollouts fetched before `on_train_batch_start` and the callbacks
after the update included; leaves out what ends with a `resume`, as validation does.
"""

from __future__ import annotations

import time
from collections.abc import Callable

Clock = Callable[[], float]
"""Seconds since some fixed moment."""


class StepClock:
    """Stopwatch: resumed when training starts or goes on, lapped at each step's end.

    Args:
        clock: where the time comes from; the tests give their own.
    """

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self._clock = clock
        self._resumed_at = clock()

    def resume(self) -> None:
        """Start counting here: at training's and an epoch's start, and after validation."""
        self._resumed_at = self._clock()

    def seconds(self) -> float:
        """Seconds since the last `resume` or `lap`."""
        return self._clock() - self._resumed_at

    def lap(self) -> float:
        """Seconds since the last `resume` or `lap`, and start counting here."""
        now = self._clock()
        seconds, self._resumed_at = now - self._resumed_at, now
        return seconds
