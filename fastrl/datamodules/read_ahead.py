"""What will be asked for next, made in a thread while a step is computed.

What is made is a function of its position alone, so that results do not depend on timing. The
caller and the thread never work at the same time: `take` and `settle` wait. Leaves out what is
made.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

ResultT = TypeVar("ResultT")

_log = logging.getLogger(__name__)


class ReadAhead(Generic[ResultT]):
    """Makes one result ahead.

    Args:
        make: the result at a position; None where it cannot be made in a thread.
    """

    def __init__(self, make: Callable[[int], ResultT | None]) -> None:
        self._make = make
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
        self._started: tuple[int, Future[ResultT | None]] | None = None

    def start(self, position: int) -> None:
        """Begin with the result at a position, once what was begun is done."""
        self._started = position, self._executor.submit(self._make, position)

    def take(self, position: int) -> ResultT | None:
        """The result at a position, waited for; None if another or none was begun, or made.

        Raises what making it raised; of another position, that is logged alone.
        """
        started, self._started = self._started, None
        if started is None:
            return None
        begun, future = started
        if begun == position:
            return future.result()
        if (error := future.exception()) is not None:
            _log.warning(
                "making the result at position %d ahead failed; position %d was asked for instead",
                begun,
                position,
                exc_info=error,
            )
        return None

    def settle(self) -> None:
        """Wait until nothing is being made; the result stays."""
        if self._started is not None:
            self._started[1].exception()

    def close(self) -> None:
        """End the thread."""
        self._executor.shutdown(cancel_futures=True)
        self._started = None
