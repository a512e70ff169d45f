"""Seconds of an RL step on the wall clock: from the previous step's end to this one's.

Counts everything a step costs, the rollouts fetched before `on_train_batch_start` and the callbacks
after the update included; leaves out what ends with a `resume`, as validation does.
"""

from __future__ import annotations

import time


class StepClock:
    """Stopwatch: resumed when training starts or goes on, lapped at each step's end."""

    def __init__(self) -> None:
        self._resumed_at = time.perf_counter()

    def resume(self) -> None:
        """Start counting here: at an epoch's start, and after validation."""
        self._resumed_at = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last `resume` or `lap`."""
        now = time.perf_counter()
        seconds, self._resumed_at = now - self._resumed_at, now
        return seconds
