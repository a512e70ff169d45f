"""What is believed of step times: between profiled points, without steps, after bad times."""

import pytest

from fastrl.rollout.cost_model import CostModel
from tests.rollout.worlds import at


def test_costs_between_profiled_batches_lie_on_the_line_and_hiccups_do_not_count():
    cost = CostModel(1, 1)
    cost.add_profile(0, 1, 100, 1.0)
    cost.add_profile(0, 5, 100, 3.0)
    assert cost.seconds(0, at(0, 3)) == pytest.approx(2.0)
    assert cost.seconds(0, at(0, 7)) == pytest.approx(4.0)
    for _ in range(4):
        cost.record(0, at(0, 3), 4.0)  # twice the profile
        cost.record(0, at(0, 5), 6.0)
    cost.record(0, at(0, 3), 400.0)
    assert cost.seconds(0, at(0, 1)) == pytest.approx(2.0)


def test_a_strategy_without_steps_is_as_far_off_as_others_there_or_as_itself_elsewhere():
    cost = CostModel(3, 3)
    for arm in range(3):
        cost.add_profile(arm, 1, 100, 1.0)
        cost.add_profile(arm, 4, 100, 1.0)
    assert cost.seconds(2, at(0, 2)) == 1.0
    for _ in range(9):
        cost.record(0, at(0, 2), 1.5)
        cost.record(1, at(0, 2), 2.0)
        cost.record(2, at(1, 2), 3.0)
    assert cost.seconds(2, at(0, 2)) == 1.5  # of 1.5 and 2
    assert cost.seconds(2, at(2, 2)) == 3.0
    assert cost.seconds(0, at(2, 2)) == 1.5
    cost.record(2, at(0, 2), 0.5)
    assert cost.seconds(2, at(0, 2)) == 0.5  # of that and what was believed, the lower
