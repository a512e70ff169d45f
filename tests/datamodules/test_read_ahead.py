"""Results made ahead: those of their positions, whatever was begun, and never two at a time."""

from __future__ import annotations

import threading
import time

import pytest

from fastrl.datamodules.read_ahead import ReadAhead


def test_what_was_begun_is_taken_once_and_another_position_is_not() -> None:
    ahead = ReadAhead(lambda position: f"row {position}")
    assert ahead.take(0) is None
    ahead.start(3)
    assert ahead.take(3) == "row 3"
    assert ahead.take(3) is None
    ahead.start(4)
    assert ahead.take(5) is None
    ahead.close()


def test_it_is_made_in_a_thread_that_take_and_settle_wait_for() -> None:
    made_by: list[threading.Thread] = []
    is_making = threading.Event()

    def make(position: int) -> int:
        is_making.set()
        time.sleep(0.05)
        made_by.append(threading.current_thread())
        is_making.clear()
        return position

    ahead = ReadAhead(make)
    ahead.start(1)
    ahead.settle()
    assert not is_making.is_set()
    assert ahead.take(1) == 1
    ahead.start(2)
    assert ahead.take(7) is None  # of another position: waited for all the same
    assert len(made_by) == 2
    assert threading.current_thread() not in made_by
    ahead.close()


def test_what_making_raises_is_raised_to_the_one_who_takes() -> None:
    ahead = ReadAhead(lambda position: 1 // position)
    ahead.start(0)
    ahead.settle()
    with pytest.raises(ZeroDivisionError):
        ahead.take(0)
    ahead.close()


def test_what_making_another_position_raised_is_logged_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ahead = ReadAhead(lambda position: 1 // position)
    ahead.start(0)
    assert ahead.take(5) is None
    assert "position 0 ahead failed; position 5" in caplog.text
    assert "ZeroDivisionError" in caplog.text
    ahead.start(1)
    assert ahead.take(1) == 1
    ahead.close()
