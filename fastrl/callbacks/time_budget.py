"""Keeps the drafter's training at the batch's end within a share of the RL step's wall time.

The step's time is all of it: rollouts, update, and co-training itself, its evaluation and its
publication included. One more optimizer step is taken only if it ends within the share, taking as
long as the median of the last few: a stall foretells no other. Between RL steps,

    balance += share * step seconds - seconds spent

is kept within [-share * step seconds, one optimizer step]. Debt, left by what was not foreseen and
by the publication, comes off the next RL step's time. Savings are drawn on only for an RL step's
first optimizer step: one too long for a single RL step's share is taken once a few have saved up
for it.

Leaves out what is trained, and idle time, which costs the run nothing.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fastrl.callbacks.step_clock import Clock, StepClock

_STEPS_REMEMBERED = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class SpentTime:
    """What co-training took of one RL step."""

    seconds: float
    step_seconds: float

    @property
    def share(self) -> float:
        """Of the RL step's wall time."""
        return self.seconds / self.step_seconds if self.step_seconds else 0.0


class TimeBudget:
    """Says whether there is time for one more optimizer step.

    Each RL step: `open`, then `optimizer_step` while `has_room`, then `close`.

    Args:
        share: of the RL step's wall time, in (0, 1); None: there is always time.
        clock: where the time comes from; the tests give their own.
    """

    def __init__(self, share: float | None, clock: Clock = time.perf_counter) -> None:
        if share is not None and not 0 < share < 1:
            raise ValueError(
                f"max_step_share is a share of the RL step's time, in (0, 1), or null for no "
                f"limit, got {share}"
            )
        self.share = share
        self._clock = clock
        self._step_clock = StepClock(clock)
        self._opened_at = clock()
        self._has_stepped = False
        self._balance = 0.0
        self._step_seconds: deque[float] = deque(maxlen=_STEPS_REMEMBERED)

    def resume(self) -> None:
        """Count the RL step's time from here: at training's start, and after validation."""
        self._step_clock.resume()

    def open(self) -> None:
        """Co-training has the RL step from here on, to `close`."""
        self._opened_at = self._clock()
        self._has_stepped = False

    def has_room(self) -> bool:
        """Whether one more optimizer step ends within the share, by what the last ones took."""
        if self.share is None:
            return True
        balance = min(self._balance, 0.0) if self._has_stepped else self._balance
        predicted = self._predicted_step()
        spent = self._clock() - self._opened_at + predicted
        return spent <= self.share * (self._step_clock.seconds() + predicted) + balance

    @contextmanager
    def optimizer_step(self) -> Iterator[None]:
        """Time an optimizer step, of idle time too: it ends when its losses are on the host."""
        start = self._clock()
        yield
        self._step_seconds.append(self._clock() - start)
        self._has_stepped = True

    def close(self) -> SpentTime:
        """End the RL step: what it took, and what the next one owes or may draw on."""
        spent = SpentTime(
            seconds=self._clock() - self._opened_at, step_seconds=self._step_clock.lap()
        )
        if self.share is not None:
            earned = self.share * spent.step_seconds
            balance = self._balance + earned - spent.seconds
            self._balance = min(max(balance, -earned), self._predicted_step())
        return spent

    def _predicted_step(self) -> float:
        return statistics.median(self._step_seconds) if self._step_seconds else 0.0

    def state_dict(self) -> dict[str, Any]:
        """The balance, and what predictions rest on."""
        return {"balance": self._balance, "step_seconds": list(self._step_seconds)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave."""
        self._balance = state["balance"]
        self._step_seconds = deque(state["step_seconds"], maxlen=_STEPS_REMEMBERED)
