"""Ctrl-C and SIGTERM, which schedulers send: at once between RL steps, within one at its end.

An update stopped halfway leaves a policy that no checkpoint may hold, so a signal in it waits for
the few seconds until the RL step is over; a second one does not. Leaves out what is done about a
stop: both arrive as KeyboardInterrupt, which Lightning shuts down on.
"""

from __future__ import annotations

import signal
import threading
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

    def install(self) -> None:
        """Take the signals over, once Lightning has its own handlers in place."""
        if threading.current_thread() is threading.main_thread():  # Python's own condition
            for number in _STOPPING:
                signal.signal(number, self._receive)

    def hold(self) -> None:
        """From here on, keep the first signal waiting."""
        self._is_held = True

    def release(self) -> None:
        """Raise the signal that has been waiting, if one has; further ones at once."""
        self._is_held = False
        if self._waiting is not None:
            self._stop(self._waiting)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        stop = Terminated("SIGTERM") if number == signal.SIGTERM else KeyboardInterrupt()
        if not self._is_held or self._waiting is not None:
            self._stop(stop)
        self._waiting = stop
        rank_zero_info("\nstopping at the end of this RL step; once more to stop at once")

    def _stop(self, stop: KeyboardInterrupt) -> None:
        for number in _STOPPING:  # nothing shall disturb the shut-down
            signal.signal(number, signal.SIG_IGN)
        raise stop
