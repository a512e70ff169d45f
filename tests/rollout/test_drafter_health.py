"""A drafter is found bad by its weights or by what it gets accepted, and named; no other is."""

import pytest
import torch

from fastrl.rollout.bandit import EpsilonGreedy
from fastrl.rollout.drafter_health import DrafterHealth, WatchedSelector
from fastrl.rollout.engine import StrategySelector
from fastrl.types import DraftStrategy, StepStats

WEIGHTS = {"fc.weight": torch.ones(2, 3), "fc.bias": torch.zeros(2)}


def step(strategy: str, rows: int, accepted: int) -> StepStats:
    """A step in which so many of its rows accepted a token at depth 1, at one rank or another."""
    parsed = DraftStrategy.parse(strategy)
    first = (accepted - accepted // 2, accepted // 2)[: parsed.topk] if parsed.topk > 1 else (
        accepted,
    )  # fmt: skip
    return StepStats(
        strategy=parsed,
        batch_size=rows,
        context_tokens=9,
        accept_lengths=(1,) * rows,
        seconds=0.1,
        offered_by_rank=((rows,) * len(first),),
        accepted_by_rank=(first,),
    )


def served(**changes: object) -> DrafterHealth:
    health = DrafterHealth(min_acceptance=0.05, window_rows=100)
    health.start("drafter version 7", (WEIGHTS | changes).items())
    return health


def test_finite_weights_and_accepted_drafts_are_healthy():
    health = served()
    for _ in range(300):
        health.record(step("4_2_8", 10, 1))
    assert health.failure is None


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_no_numbers_are_named(value):
    bias = torch.tensor([0.0, value])
    assert served(**{"fc.bias": bias}).failure == (
        "drafter version 7: its weights are not finite: ['fc.bias']"
    )


def test_a_drafter_whose_tokens_are_not_accepted_is_bad_once_the_window_is_full():
    health = served()
    for _ in range(9):
        health.record(step("4_2_8", 11, 0))
    assert health.failure is None  # 99 rows
    health.record(step("2_1_3", 1, 0))
    assert health.failure is not None
    assert health.failure.startswith("drafter version 7: 0 of the last 100 rows accepted")


def test_the_share_at_the_floor_is_healthy_and_one_row_less_is_not():
    at, below = served(), served()
    at.record(step("4_2_8", 100, 5))
    below.record(step("4_2_8", 100, 4))
    assert at.failure is None
    assert below.failure is not None


def test_only_the_newest_rows_count():
    health = served()
    for _ in range(20):
        health.record(step("4_2_8", 10, 10))
    for _ in range(9):
        health.record(step("4_2_8", 10, 0))
    assert health.failure is None  # the last good step is one tenth of the window
    health.record(step("4_2_8", 10, 0))
    assert health.failure is not None


def test_steps_of_other_drafters_and_of_none_show_nothing():
    health = served()
    for _ in range(99):
        health.record(step("ngram_4_2_8", 10, 0))
        health.record(StepStats(
            strategy=DraftStrategy.parse("off"), batch_size=10, context_tokens=9,
            accept_lengths=(1,) * 10, seconds=0.1,
        ))  # fmt: skip
    assert health.failure is None


def test_a_bad_drafter_stays_bad_until_the_next_which_starts_anew():
    health = served()
    health.record(step("4_2_8", 100, 0))
    found = health.failure
    health.record(step("4_2_8", 100, 100))
    assert health.failure == found
    health.start("drafter version 8", WEIGHTS.items())
    assert health.failure is None
    health.record(step("4_2_8", 99, 0))
    assert health.failure is None  # nothing of the one before is counted
    health.record(step("4_2_8", 1, 0))
    assert health.failure is not None
    assert health.failure.startswith("drafter version 8")


def test_a_watched_selector_decides_and_learns_as_its_own():
    seen: list[StepStats] = []
    plain, inner = (EpsilonGreedy(["4_2_8", "2_1_3"], seed=3) for _ in range(2))
    watched = WatchedSelector(inner, seen.append)
    assert isinstance(watched, StrategySelector)
    assert watched.strategies == plain.strategies
    for number in range(60):
        strategy = watched.select(4, 9)
        assert strategy == plain.select(4, 9)
        if strategy.is_off:
            continue
        one = step(str(strategy), 4, number % 3)
        watched.record(one)
        plain.record(one)
        assert seen[-1] is one
    assert inner.state_dict() == plain.state_dict()
    learned = [arm for arm in plain.arms if not arm.is_off]
    watched.exclude(learned)
    assert all(watched.select(4, 9).is_off for _ in range(20))
    assert list(watched.cost_queries(8, 200)) == list(plain.cost_queries(8, 200))
