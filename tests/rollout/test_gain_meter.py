"""Measured gains against plain recomputation, and in worlds whose true gains are known."""

from __future__ import annotations

import random

import pytest

from fastrl.rollout.gain_meter import GainMeter
from fastrl.rollout.model_bandit import ModelBased
from fastrl.types import OFF, DraftStrategy
from tests.rollout.worlds import World, play

ARMS = ["4_1_5", "6_2_12"]
TREES = [DraftStrategy.parse(arm) for arm in ARMS]


def profiled(world: World) -> ModelBased:
    bandit = ModelBased(ARMS)
    for query in bandit.cost_queries(128):
        bandit.record_cost(query, world.cost(query.strategy, query.batch_size))
    return bandit


def realised_gain(bandit: ModelBased, world: World, batches: list[int]) -> float:
    """Of the tokens that came and true step times, noise and hiccups aside."""
    needed = spent = 0.0
    for batch_size in batches:
        stats = world.step(bandit.select(batch_size, 100), batch_size)
        bandit.record(stats)
        needed += stats.num_tokens / batch_size * world.cost(OFF, batch_size)
        spent += world.cost(stats.strategy, batch_size)
    return needed / spent


def test_gains_are_seconds_of_off_over_seconds_taken_as_recomputed_from_the_steps() -> None:
    """Seconds a multiple of the usual ones, three at most; those of `off` fixed: their mean is 1.5
    times their median, which is learnt from the steps of `off` (those of one kind, so exactly)."""
    rng = random.Random(0)
    meter = GainMeter(2, 3)
    for _ in range(2000):
        meter.add(0, 0, 1, 1, 1.5, 1.0, 1.0)
    meter.start_period()
    steps = []
    for _ in range(300):
        bucket, arm, rows = rng.randrange(2), rng.randrange(1, 3), rng.randint(1, 9)
        tokens, usual, off = rng.randint(rows, 5 * rows), rng.random() + 0.1, rng.random() + 0.1
        seconds = usual * rng.choice((0.9, 1.1, 40.0))
        meter.add(bucket, arm, rows, tokens, seconds, usual, off)
        steps.append((bucket, arm, rows, tokens, min(seconds, 3 * usual), 1.5 * off))

    def expected(buckets: list[int], arms: list[int]) -> float:
        own = [step for step in steps if step[0] in buckets and step[1] in arms]
        needed = sum(tokens * off / rows for _, _, rows, tokens, _, off in own)
        return needed / sum(seconds for *_, seconds, _ in own)

    assert meter.gain([0, 1]) == pytest.approx(expected([0, 1], [1, 2]), rel=5e-3)
    for bucket in (0, 1):
        assert meter.gain([bucket]) == pytest.approx(expected([bucket], [1, 2]), rel=5e-3)
        for arm, gain in meter.arm_gains(bucket).items():
            assert gain == pytest.approx(expected([bucket], [arm]), rel=5e-3)
        own = [step for step in steps if step[0] == bucket]
        assert meter.batch_size(bucket) == round(sum(step[2] for step in own) / len(own))
        rate = sum(step[3] for step in own) / sum(step[4] for step in own)
        assert meter.tokens_per_second(bucket) == pytest.approx(rate)


def test_what_was_expected_and_what_was_lost_weigh_arms_by_their_seconds() -> None:
    meter = GainMeter(1, 3)
    for arm, seconds in ((0, 1.0), (1, 2.0), (1, 1.0), (2, 4.0)):
        meter.add(0, arm, 1, 1, seconds, seconds, 1.0)
    gains = {0: 1.0, 1: 1.5, 2: 2.0}
    assert meter.expected_gain(0, gains) == pytest.approx((1 + 3 * 1.5 + 4 * 2) / 8)
    assert meter.expected_gain(0, {2: 2.0}) == 2
    assert meter.expected_gain(0, {}) is None
    assert meter.lost_seconds({0: gains}) == pytest.approx(1 * 0.5 + 3 * 0.25)
    assert meter.total_seconds == 8


@pytest.mark.parametrize("first", [0.0, 0.5, 0.85])
@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_in_a_world_measured_gains_are_the_true_ones(first: float, batch_size: int) -> None:
    """And were predicted, in noise and with hiccups; whichever arms were chosen. Of six worlds on
    average, since few steps of `off` are there to compare with."""
    measured = predicted = 0.0
    for seed in range(6):
        world = World(first, seed=seed)
        bandit = profiled(world)
        play(bandit, world, [batch_size] * 300)
        bandit.start_period()
        true_gain = realised_gain(bandit, world, [batch_size] * 600)
        (bucket,) = bandit.report().buckets.values()
        assert bucket.predicted_gain is not None
        measured += bucket.gain / true_gain / 6
        predicted += bucket.predicted_gain / true_gain / 6
    assert measured == pytest.approx(1, rel=0.05)
    assert predicted == pytest.approx(1, rel=0.05)


def test_acceptance_alone_is_no_gain() -> None:
    """Drafts are accepted, but a step with them takes as much longer as it yields more."""

    class DearDrafts(World):
        def cost(self, strategy: DraftStrategy, batch_size: int) -> float:
            return 1e-3 * self.expected_length(strategy)

    world = DearDrafts(0.8)
    assert world.expected_length(TREES[0]) > 2
    bandit = profiled(world)
    play(bandit, world, [4] * 600)
    assert bandit.report().gain == pytest.approx(1, rel=0.06)


def test_off_is_run_now_and_then_though_it_is_slower_and_a_wrong_profile_of_it_found_out() -> None:
    """Plain steps take three times what the profile says."""
    world = World(0.85)
    bandit = ModelBased(ARMS)
    for query in bandit.cost_queries(128):
        wrong = 1 / 3 if query.strategy.is_off else 1
        bandit.record_cost(query, wrong * world.cost(query.strategy, query.batch_size))
    for _ in range(3):
        play(bandit, world, [2] * 300)
        bandit.start_period()
    true_gain = realised_gain(bandit, world, [2] * 1000)
    assert 0.005 <= bandit.report().arm_shares["off"] <= 0.01
    assert bandit.report().gain == pytest.approx(true_gain, rel=0.1)


def test_regret_is_small_in_a_steady_world_and_counts_on_over_periods() -> None:
    world = World(0.7)
    bandit = profiled(world)
    last = 0.0
    for _ in range(5):
        play(bandit, world, [2] * 300)
        report = bandit.report()
        assert 0 <= report.regret_share < 0.05
        assert report.regret_s > last
        last = report.regret_s
        bandit.start_period()
        assert bandit.report().regret_s == pytest.approx(last)


def test_wrong_choices_are_regretted() -> None:
    """Half of the steps run at half the rate: a third of the time was for nothing."""

    class TwoSpeeds(World):
        def cost(self, strategy: DraftStrategy, batch_size: int) -> float:
            slow = 2 if strategy == TREES[1] else 1
            return slow * 1e-3 * self.expected_length(strategy)

    world = TwoSpeeds(0.6, noise=0.0)
    bandit = profiled(world)
    for _ in range(200):
        for strategy in (OFF, TREES[1]):
            bandit.record(world.step(strategy, 4))
    seconds = {s: world.cost(s, 4) for s in (OFF, TREES[1])}
    expected = seconds[TREES[1]] / 2 / sum(seconds.values())
    assert bandit.report().regret_share == pytest.approx(expected, rel=0.1)
