"""Ctrl-C and SIGTERM, which schedulers send: at once between RL steps, within one at its end.

An update stopped halfway leaves a policy that no checkpoint may hold, so a signal in it waits for
the few seconds until the RL step is over; a second one does not. Ranks that train one policy stop
at the same place, or they would wait for one another: there a signal to any of them waits for the
next place that all come to, before or after an update. Leaves out what is done about a stop: both
arrive as KeyboardInterrupt, which Lightning shuts down on.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType

from lightning.pytorch.utilities import rank_zero_info

_STOPPING = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """SIGTERM came: a stop like Ctrl-C, told apart by the exit status."""


class StopSignals:
    """Turns signals into exceptions where a run can take them.

    Lightning restores the handlers of before the run when it shuts down.
    """

    def __init__(self) -> None:
        self._is_held = False
        self._waiting: KeyboardInterrupt | None = None
        self._on_any_rank: Callable[[bool], bool] | None = None
        self.is_stopped_on_all_ranks = False
        """Whether the stop that was raised is raised at the same place on each rank."""

    def install(self, on_any_rank: Callable[[bool], bool] | None = None) -> None:
        """Take the signals over, once Lightning has its own handlers in place.

        Args:
            on_any_rank: tells, on all ranks, whether a flag is set on any; None: there is one rank.
        """
        self._on_any_rank = on_any_rank
        if threading.current_thread() is threading.main_thread():  # Python's own condition
            for number in _STOPPING:
                signal.signal(number, self._receive)

    def hold(self) -> None:
        """From here on, keep the first signal waiting."""
        self._is_held = True

    def release(self) -> None:
        """Raise the signal that has been waiting, if one has, on this rank or any; further ones
        at once, where there is no other rank."""
        self._is_held = False
        waiting = self._waiting
        if self._on_any_rank is not None and self._on_any_rank(waiting is not None):
            waiting = waiting or KeyboardInterrupt()
        if waiting is not None:
            self.is_stopped_on_all_ranks = True
            self._stop(waiting)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        stop = Terminated("SIGTERM") if number == signal.SIGTERM else KeyboardInterrupt()
        must_wait = self._is_held or self._on_any_rank is not None
        if not must_wait or self._waiting is not None:
            self._stop(stop)
        self._waiting = stop
        rank_zero_info("\nstopping at the end of this RL step; once more to stop at once")

    def _stop(self, stop: KeyboardInterrupt) -> None:
        for number in _STOPPING:  # nothing shall disturb the shut-down
            signal.signal(number, signal.SIG_IGN)
        raise stop
