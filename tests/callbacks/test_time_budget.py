"""The co-training budget on a clock of its own: shares, predictions, debts, savings, resume."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest

from fastrl.callbacks.time_budget import SpentTime, TimeBudget


class FakeClock:
    """Stands still until it is told how much time goes by."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def run_rl_step(
    budget: TimeBudget,
    clock: FakeClock,
    *,
    others: float,
    step_seconds: Callable[[], float],
    opening: float = 0.0,
    closing: float = 0.0,
    max_steps: int = 1000,
) -> tuple[int, SpentTime]:
    """An RL step of `others` seconds beside co-training; the optimizer steps it had room for."""
    clock.advance(others)
    budget.open()
    clock.advance(opening)
    num_steps = 0
    while num_steps < max_steps and budget.has_room():
        with budget.optimizer_step():
            clock.advance(step_seconds())
        num_steps += 1
    clock.advance(closing)
    return num_steps, budget.close()


def test_a_known_step_time_gives_the_most_steps_that_the_share_allows() -> None:
    """8 s of rollouts and update, steps of 0.25 s, a fifth of the whole: 2 s of 10, 8 steps."""
    clock = FakeClock()
    budget = TimeBudget(0.2, clock)
    for _ in range(5):
        num_steps, spent = run_rl_step(budget, clock, others=8.0, step_seconds=lambda: 0.25)
        assert num_steps == 8
        assert (spent.seconds, spent.step_seconds) == (2.0, 10.0)
        assert spent.share == pytest.approx(0.2)


def test_evaluation_and_publication_count() -> None:
    """Of 2 s, 0.5 go before the training. The 0.5 after it the first RL step overruns its share by,
    and the others make up for."""
    clock = FakeClock()
    budget = TimeBudget(0.2, clock)
    steps = [
        run_rl_step(budget, clock, others=8.0, step_seconds=lambda: 0.25, opening=0.5, closing=0.5)
        for _ in range(4)
    ]
    assert [num_steps for num_steps, _ in steps] == [6, 4, 4, 4]
    assert [spent.seconds for _, spent in steps] == [2.5, 2.0, 2.0, 2.0]


@pytest.mark.parametrize("seed", range(5))
def test_no_rl_step_exceeds_its_share_while_no_step_takes_longer_than_the_last_ones(
    seed: int,
) -> None:
    """RL steps of any length, optimizer steps ever cheaper; and all but one step's time is used."""
    draw = random.Random(seed)
    clock = FakeClock()
    share = draw.uniform(0.05, 0.5)
    budget = TimeBudget(share, clock)
    costs = (0.99995**number for number in itertools.count())
    run_rl_step(budget, clock, others=1000.0, step_seconds=lambda: next(costs), max_steps=4)
    for _ in range(50):
        others = draw.uniform(30.0, 90.0)
        _, spent = run_rl_step(budget, clock, others=others, step_seconds=lambda: next(costs))
        assert share * spent.step_seconds - 1.0 < spent.seconds <= share * spent.step_seconds


def test_a_step_too_long_for_one_share_is_taken_once_enough_is_saved() -> None:
    """Each RL step of 9 s and more earns 0.9 s; a step takes 2.7 s: every third or fourth RL
    step."""
    clock = FakeClock()
    budget = TimeBudget(0.1, clock)
    steps = [run_rl_step(budget, clock, others=9.0, step_seconds=lambda: 2.7) for _ in range(100)]
    gaps = [num_steps for num_steps, _ in steps]
    assert set(gaps) == {0, 1}
    assert 25 <= sum(gaps) <= 37
    trained = sum(spent.seconds for _, spent in steps)
    assert trained <= 0.1 * sum(spent.step_seconds for _, spent in steps) + 2.7


def test_unused_time_is_not_hoarded() -> None:
    """After a hundred RL steps without training, one gets its own share and no more."""
    clock = FakeClock()
    budget = TimeBudget(0.2, clock)
    run_rl_step(budget, clock, others=8.0, step_seconds=lambda: 0.25)
    for _ in range(100):
        run_rl_step(budget, clock, others=8.0, step_seconds=lambda: 0.25, max_steps=0)
    num_steps, spent = run_rl_step(budget, clock, others=8.0, step_seconds=lambda: 0.25)
    assert (num_steps, spent.seconds) == (8, 2.0)
    for _ in range(100):
        run_rl_step(budget, clock, others=8.0, step_seconds=lambda: 0.25, max_steps=0)
    late, _ = run_rl_step(budget, clock, others=8.0, step_seconds=lambda: 0.25, opening=4.0)
    assert late == 0  # the evaluation alone took the share, and one step's savings


def test_an_overrun_comes_off_the_next_budget() -> None:
    """A step of 1 s is expected and takes 5; the next RL step has so much less."""
    clock = FakeClock()
    budget = TimeBudget(0.25, clock)
    run_rl_step(budget, clock, others=15.0, step_seconds=lambda: 1.0)
    costs = itertools.chain([1.0, 1.0, 5.0], itertools.repeat(1.0))
    late, spent = run_rl_step(budget, clock, others=12.0, step_seconds=lambda: next(costs))
    assert (late, spent.seconds) == (3, 7.0)
    owed = 7.0 - 0.25 * 19.0
    num_steps, spent = run_rl_step(budget, clock, others=60.0, step_seconds=lambda: 1.0)
    assert spent.seconds <= 0.25 * spent.step_seconds - owed
    assert num_steps > 0


def test_a_stall_costs_two_rl_steps_training_not_all_that_follow() -> None:
    """An hour within an optimizer step is ten thousand steps' worth of debt."""
    clock = FakeClock()
    budget = TimeBudget(0.25, clock)
    run_rl_step(budget, clock, others=12.0, step_seconds=lambda: 1.0)
    run_rl_step(budget, clock, others=12.0, step_seconds=lambda: 3600.0, max_steps=1)
    steps = [run_rl_step(budget, clock, others=12.0, step_seconds=lambda: 1.0)[0] for _ in range(4)]
    assert steps == [0, 0, 4, 4]


def test_without_a_share_there_is_always_room_and_time_is_still_told() -> None:
    clock = FakeClock()
    budget = TimeBudget(None, clock)
    num_steps, spent = run_rl_step(budget, clock, others=1.0, step_seconds=lambda: 1.0, max_steps=9)
    assert num_steps == 9
    assert spent.share == 0.9


def test_time_before_a_resume_is_not_the_rl_steps() -> None:
    """Validation between RL steps earns no training."""
    clock = FakeClock()
    budget = TimeBudget(0.2, clock)
    run_rl_step(budget, clock, others=8.0, step_seconds=lambda: 0.25)
    clock.advance(1000.0)
    budget.resume()
    num_steps, spent = run_rl_step(budget, clock, others=8.0, step_seconds=lambda: 0.25)
    assert (num_steps, spent.step_seconds) == (8, 10.0)


def test_idle_steps_teach_what_a_step_takes_and_are_not_charged() -> None:
    """Two steps of 3 s in the rollouts' idle time: of the batch end's 2 s none is left for one."""
    clock = FakeClock()
    budget = TimeBudget(0.2, clock)
    for _ in range(2):
        with budget.optimizer_step():
            clock.advance(3.0)
    num_steps, spent = run_rl_step(budget, clock, others=2.0, step_seconds=lambda: 3.0)
    assert num_steps == 0
    assert (spent.seconds, spent.step_seconds) == (0.0, 8.0)


def test_a_restored_budget_decides_as_the_one_that_went_on() -> None:
    def go_on(budget: TimeBudget, clock: FakeClock) -> list[int]:
        costs = itertools.cycle([0.75, 0.5, 0.25])
        return [
            run_rl_step(budget, clock, others=6.0, step_seconds=lambda: next(costs))[0]
            for _ in range(5)
        ]

    clock, fresh_clock, untaught_clock = FakeClock(), FakeClock(), FakeClock()
    budget = TimeBudget(0.25, clock)
    run_rl_step(budget, clock, others=1.0, step_seconds=lambda: 0.875, closing=0.25)
    restored, untaught = TimeBudget(0.25, fresh_clock), TimeBudget(0.25, untaught_clock)
    restored.load_state_dict(budget.state_dict())
    went_on = go_on(budget, clock)
    assert go_on(restored, fresh_clock) == went_on
    assert go_on(untaught, untaught_clock) != went_on


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 15.0])
def test_a_share_is_between_0_and_1(share: float) -> None:
    with pytest.raises(ValueError, match=rf"max_step_share is a share.*got {share}"):
        TimeBudget(share)
