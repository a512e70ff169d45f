"""N-grams are believed in where there is a response to look things up in, and not elsewhere."""

import copy
import dataclasses
import itertools
import random
import statistics

import pytest

from fastrl.rollout.model_bandit import ModelBased
from fastrl.rollout.ngram_acceptance import NgramAcceptance, reference_level
from fastrl.types import OFF, DraftStrategy, StepStats
from tests.rollout.worlds import World

CHAIN, DEEP = DraftStrategy.parse("ngram_4_1_5"), DraftStrategy.parse("ngram_8_1_9")
ARMS = ["4_1_5", "8_1_9", "ngram_4_1_5", "ngram_8_1_9"]


def step(world: World, strategy: DraftStrategy, batch_size: int, referenced: int) -> StepStats:
    """Of a world in which n-grams are worth nothing without a reference."""
    barren = World(0.02, 0.0, noise=world.noise)
    is_barren = strategy.drafter == "ngram" and not referenced
    stats = (barren if is_barren else world).step(strategy, batch_size)
    return dataclasses.replace(stats, referenced_rows=referenced)


@pytest.mark.parametrize(
    ("referenced", "batch_size", "level"),
    [(0, 1, 0), (1, 1, 2), (0, 9, 0), (2, 9, 0), (3, 9, 1), (5, 9, 1), (6, 9, 2), (9, 9, 2)],
)
def test_levels_are_thirds_of_the_rows(referenced, batch_size, level):
    assert reference_level(referenced, batch_size) == level


def taught(rows: int = 8, num_steps: int = 40) -> NgramAcceptance:
    """In bucket 3: good with references, bad without."""
    acceptance = NgramAcceptance([CHAIN, DEEP])
    world = World(0.9)
    for _ in range(num_steps):
        for referenced in (0, rows):
            stats = step(world, DEEP, rows, referenced)
            acceptance.record(3, stats)
    acceptance.look(1.0)
    return acceptance


def test_each_level_has_an_estimate_of_its_own():
    acceptance = taught()
    assert acceptance.lengths(3, 0)[CHAIN].mean < 1.2
    assert acceptance.lengths(3, 2)[CHAIN].mean > 3
    assert acceptance.num_rows(3, 1) == 0
    assert not acceptance.contradicted(3)


def test_a_bucket_begins_with_what_others_show_and_goes_by_its_own_steps():
    acceptance = taught()
    known, guessed = acceptance.lengths(3, 2)[DEEP], acceptance.lengths(0, 2)[DEEP]
    unknown = NgramAcceptance([DEEP]).lengths(0, 2)[DEEP]
    assert 2 * unknown.mean < guessed.mean == pytest.approx(known.mean, rel=0.02)
    assert guessed.shared_deviation > 5 * known.shared_deviation
    for _ in range(60):
        acceptance.record(0, step(World(0.1), DEEP, 1, 1))
    acceptance.look(1.0)
    assert acceptance.lengths(0, 2)[DEEP].mean < 1.5
    assert acceptance.lengths(3, 2)[DEEP].mean == pytest.approx(known.mean, rel=0.02)


def test_a_step_counts_once_in_a_bucket_that_nobody_asked_about():
    """Steps of another rank, for instance."""
    acceptance = NgramAcceptance([DEEP])
    acceptance.record(1, step(World(0.5), DEEP, 6, 6))
    assert acceptance.num_rows(1, 2) == 6


def test_a_saved_estimate_goes_on_as_the_one_that_was_saved():
    acceptance = taught(num_steps=5)
    acceptance.lengths(1, 2)  # begins a bucket
    resumed = NgramAcceptance([CHAIN, DEEP])
    resumed.load_state_dict(copy.deepcopy(acceptance.state_dict()))
    for one in (acceptance, resumed):
        for bucket in (1, 3, 5):
            one.record(bucket, step(World(0.7, seed=bucket), CHAIN, 4, 4))
        one.take_notice(0.5, drafter_changed=True)
        one.look(0.9)
    assert resumed.state_dict() == acceptance.state_dict()


def test_a_notice_bounds_what_is_known_and_raises_no_doubt():
    """No drafter was replaced: what n-grams find changes as slowly as the policy."""
    acceptance = taught(num_steps=200)
    before = acceptance.lengths(3, 2)[DEEP]
    for drafter_changed in (True, False, True):
        acceptance.take_notice(0.5, drafter_changed=drafter_changed)
    after = acceptance.lengths(3, 2)[DEEP]
    assert acceptance.num_rows(3, 2) == pytest.approx(32)
    assert after.mean == pytest.approx(before.mean, rel=0.1)
    assert after.shared_deviation < 0.15
    few = taught(num_steps=3)
    few.take_notice(0.5, drafter_changed=True)
    assert few.num_rows(3, 2) == 24  # cells that are seldom visited get sure all the same


def test_steps_that_contradict_a_bucket_s_estimate_begin_another():
    acceptance = taught(num_steps=200)
    for _ in range(16):
        acceptance.record(3, step(World(0.02, 0.0), DEEP, 8, 8))
    acceptance.look(1.0)
    assert acceptance.num_alarms >= 1
    assert acceptance.lengths(3, 2)[DEEP].mean < 1.5


def profiled(world: World) -> ModelBased:
    bandit = ModelBased(ARMS)
    for query in bandit.cost_queries(16, 200):
        bandit.record_cost(query, world.cost(query.strategy, query.batch_size))
    return bandit


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("seed", range(3))
def test_n_grams_are_chosen_where_they_have_references(batch_size, seed):
    """In turns of a few steps, as a group's first response and then its others."""
    eagle, ngram = World(0.6, seed=seed), World(0.95, 0.0, seed=seed)
    bandit = profiled(eagle)
    chosen: dict[int, list[DraftStrategy]] = {0: [], batch_size: []}
    for referenced in itertools.islice(itertools.cycle([0] * 5 + [batch_size] * 12), 800):
        strategy = bandit.select(batch_size, 100, referenced)
        chosen[referenced].append(strategy)
        world = ngram if strategy.drafter == "ngram" else eagle
        bandit.record(step(world, strategy, batch_size, referenced))
    strategies = [OFF, *map(DraftStrategy.parse, ARMS)]
    best = max(strategies, key=lambda arm: ngram.rate(arm, batch_size))
    with_reference, without = chosen[batch_size][-300:], chosen[0][-100:]
    assert sum(arm.drafter == "ngram" for arm in with_reference) > 0.9 * len(with_reference)
    rate = statistics.mean(ngram.rate(arm, batch_size) for arm in with_reference)
    assert rate > 0.95 * ngram.rate(best, batch_size)
    assert sum(arm.needs_learned_drafter for arm in without) > 0.9 * len(without)


@pytest.mark.parametrize("batch_size", [1, 4, 16])
@pytest.mark.parametrize("seed", range(3))
def test_n_grams_that_find_nothing_any_more_are_left_soon(batch_size, seed):
    """The last rows of a rollout, whose siblings have ended, go another way."""
    world = World(0.0, 0.0, seed=seed)
    bandit = profiled(world)
    good, barren = World(0.95, 0.0, seed=seed), World(0.02, 0.0, seed=seed)

    def play(num_steps: int, ngram: World) -> float:
        """Pace to that of `off`."""
        ours = off = 0.0
        for _ in range(num_steps):
            strategy = bandit.select(batch_size, 100, batch_size)
            its = ngram if strategy.drafter == "ngram" else world
            bandit.record(step(its, strategy, batch_size, batch_size))
            ours += its.cost(strategy, batch_size)
            off += its.expected_length(strategy) * its.cost(OFF, batch_size)
        return off / ours

    for _ in range(20):
        play(60, good)
        bandit.discount(0.5)
    play(40, barren)
    assert play(160, barren) >= 0.95


@pytest.mark.parametrize("batch_size", [4, 16])
def test_n_grams_that_never_find_anything_cost_little(batch_size):
    """Though policies change, and cells are seldom visited."""
    world = World(0.0, 0.0)
    bandit = profiled(world)
    rng = random.Random(0)
    ratios = []
    for _ in range(25):
        ours = off = 0.0
        for referenced in [rng.randint(0, batch_size)] * 40:
            strategy = bandit.select(batch_size, 100, referenced)
            bandit.record(step(world, strategy, batch_size, referenced))
            ours += world.cost(strategy, batch_size)
            off += world.expected_length(strategy) * world.cost(OFF, batch_size)
        ratios.append(off / ours)
        bandit.discount(0.5, drafter_changed=False)
    assert statistics.mean(ratios[5:]) >= 0.97


@pytest.mark.parametrize(("num_bare", "num_referenced"), [(10, 20), (20, 10)])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_gains_are_predicted_and_regretted_by_level(batch_size, num_bare, num_referenced):
    """Choosing n-grams where they have references, and the drafter elsewhere, loses nothing."""
    eagle, ngram = World(0.6, noise=0.03), World(0.95, 0.0, noise=0.03, seed=1)
    bandit = profiled(eagle)

    def play(num_turns: int) -> float:
        """The true gain."""
        ours = off = 0.0
        for referenced in ([0] * num_bare + [batch_size] * num_referenced) * num_turns:
            strategy = bandit.select(batch_size, 100, referenced)
            world = ngram if strategy.drafter == "ngram" else eagle
            stats = step(world, strategy, batch_size, referenced)
            bandit.record(stats)
            ours += world.cost(strategy, batch_size)
            off += stats.num_tokens / batch_size * world.cost(OFF, batch_size)
        return off / ours

    play(20)
    bandit.start_period()
    gain = play(20)
    report = bandit.report()
    (bucket,) = report.buckets.values()
    assert bucket.predicted_gain == pytest.approx(gain, rel=0.1)
    assert report.regret_share < 0.03


def test_a_resumed_bandit_chooses_as_the_one_that_went_on():
    world, twin = World(0.8), World(0.8)
    bandit = profiled(world)
    rng = random.Random(1)

    def play(one: ModelBased, its: World, batches: list[tuple[int, int]]) -> list[DraftStrategy]:
        chosen = []
        for batch_size, referenced in batches:
            chosen.append(one.select(batch_size, 100, referenced))
            one.record(step(its, chosen[-1], batch_size, referenced))
        return chosen

    batches = [(size, rng.randint(0, size)) for size in rng.choices((1, 4, 16), k=200)]
    play(bandit, world, batches[:103])
    twin.rng.setstate(world.rng.getstate())
    resumed = ModelBased(ARMS)
    resumed.load_state_dict(copy.deepcopy(bandit.state_dict()))
    assert play(resumed, twin, batches[103:]) == play(bandit, world, batches[103:])
    assert resumed.state_dict() == bandit.state_dict()
