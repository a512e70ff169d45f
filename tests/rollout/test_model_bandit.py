"""The model-based bandit in simulated worlds, against the best that a fixed strategy would do."""

import dataclasses

import pytest

from fastrl.rollout.engine import CostQuery
from fastrl.rollout.model_bandit import ModelBased
from fastrl.rollout.place import Place
from fastrl.types import OFF, DraftStrategy
from tests.rollout.worlds import World, play

ARMS = ["2_1_3", "4_1_5", "6_1_7", "4_2_8", "6_2_12"]
STRATEGIES = [OFF, *map(DraftStrategy.parse, ARMS)]
BATCHES = [1, 2, 4, 8, 16, 32, 64, 128]


def profiled(world: World, *, factor: float = 1.0, only_trees: bool = False) -> ModelBased:
    """A bandit whose cost queries were answered, rightly or by a factor off."""
    bandit = ModelBased(ARMS)
    for query in bandit.cost_queries(128, 200):
        wrong = factor if not only_trees or not query.strategy.is_off else 1.0
        bandit.record_cost(query, wrong * world.cost(query.strategy, query.batch_size))
    return bandit


def best_ratio(world: World, batch_size: int) -> float:
    """Of the best fixed strategy, to off."""
    rates = [world.rate(strategy, batch_size) for strategy in STRATEGIES]
    return max(rates) / rates[0]


@pytest.mark.parametrize("first", [0.0, 0.3, 0.6, 0.85])
@pytest.mark.parametrize("batch_size", BATCHES)
def test_in_a_steady_world_it_does_what_the_best_fixed_strategy_does(first, batch_size):
    world = World(first)
    bandit = profiled(world)
    play(bandit, world, [batch_size] * 100)
    _, ratio = play(bandit, world, [batch_size] * (1000 if batch_size < 16 else 300))
    assert ratio >= 0.97 * best_ratio(world, batch_size)
    assert ratio >= 0.97


@pytest.mark.parametrize("batch_size", [1, 4, 32, 128])
def test_a_useless_drafter_costs_little_from_the_first_step_on(batch_size):
    """The first steps at batch 1, where a row is all there is to learn from, included."""
    world = World(0.0, 0.0)
    _, ratio = play(profiled(world), world, [batch_size] * 800)
    assert ratio >= 0.97


@pytest.mark.parametrize("factor", [0.4, 2.5])
@pytest.mark.parametrize("batch_size", [1, 16, 128])
def test_a_wrong_profile_is_corrected(batch_size, factor):
    """Trees looked too cheap, or too dear."""
    world = World(0.5)
    bandit = profiled(world, factor=factor, only_trees=True)
    play(bandit, world, [batch_size] * 200)
    _, ratio = play(bandit, world, [batch_size] * 300)
    assert ratio >= 0.95 * best_ratio(world, batch_size)


@pytest.mark.parametrize("batch_size", [1, 16, 64])
def test_without_a_profile_it_learns_costs_from_steps(batch_size):
    world = World(0.6)
    bandit = ModelBased(ARMS)
    play(bandit, world, [batch_size] * 100)
    _, ratio = play(bandit, world, [batch_size] * 400)
    assert ratio >= 0.95 * best_ratio(world, batch_size)


def test_it_follows_a_batch_that_shrinks_within_a_rollout():
    world = World(0.6)
    bandit = profiled(world)
    rollout = [size for size in range(128, 0, -1) for _ in range(2)] + [1] * 60
    play(bandit, world, rollout)
    chosen, _ = play(bandit, world, rollout)
    best = [max(STRATEGIES, key=lambda s: world.rate(s, size)) for size in rollout]
    lost = sum(
        1 - world.rate(ours, size) / world.rate(its, size)
        for ours, its, size in zip(chosen, best, rollout, strict=True)
    )
    assert lost / len(rollout) < 0.03


def test_it_follows_a_drafter_that_gets_better():
    """As co-training does: with a notice after every RL step."""
    world = World(0.05)
    bandit = profiled(world)
    ratio = 0.0
    for rl_step in range(12):
        world.first = 0.05 + 0.06 * rl_step
        _, ratio = play(bandit, world, [8] * 60)
        assert ratio >= 0.94 * best_ratio(world, 8)
        bandit.discount(0.5)
    assert ratio > 1.3


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_a_drafter_gone_bad_without_notice_is_left_within_20_steps(batch_size, seed):
    world = World(0.8, seed=seed)
    bandit = profiled(world)
    play(bandit, world, [batch_size] * 300)
    world.first = world.second = 0.0
    play(bandit, world, [batch_size] * 20)
    assert bandit.num_alarms >= 1
    _, ratio = play(bandit, world, [batch_size] * 300)
    assert ratio >= 0.97
    world.first, world.second = 0.8, 0.1
    for _ in range(5):
        bandit.discount(0.5)  # RL steps go by
        play(bandit, world, [batch_size] * 60)
    _, ratio = play(bandit, world, [batch_size] * 200)
    assert ratio >= 0.95 * best_ratio(world, batch_size)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("batch_size", [4, 16, 32])
def test_a_drafter_that_recovers_without_notice_is_found_by_probes(batch_size, seed):
    world = World(0.85, seed=seed)
    bandit = profiled(world)
    play(bandit, world, [batch_size] * 200)
    world.first = world.second = 0.0
    play(bandit, world, [batch_size] * 200)
    world.first, world.second = 0.85, 0.1
    play(bandit, world, [batch_size] * 150)
    _, ratio = play(bandit, world, [batch_size] * 200)
    assert ratio >= 0.95 * best_ratio(world, batch_size)


def test_a_probe_is_of_a_strategy_whose_time_is_known():
    """Without a profile, a bucket's drafter may be found out before all its strategies have run."""
    bandit = ModelBased(["2_1_3", "4_1_5"])
    chain = DraftStrategy.parse("2_1_3")
    for batch_size, first in [(64, 0.9)] * 30 + [(16, 0.0)] * 3 + [(16, 0.97)]:
        bandit.record(World(first, 0.0).step(chain, batch_size))
    assert bandit.num_alarms == 1
    assert bandit.select(16, 100) == chain


def test_excluded_arms_are_not_chosen():
    world = World(0.8)
    bandit = profiled(world)
    bandit.exclude(STRATEGIES[1:])
    chosen, _ = play(bandit, world, [1] * 50)
    assert set(chosen) == {OFF}
    bandit.exclude([])
    chosen, _ = play(bandit, world, [1] * 50)
    assert set(chosen) - {OFF}


def test_a_resumed_bandit_decides_as_the_one_that_was_saved():
    world, twin = World(0.6), World(0.6)
    bandit = profiled(world)
    play(bandit, world, [8] * 83)
    play(twin_bandit := profiled(twin), twin, [8] * 83)
    resumed = ModelBased(ARMS)
    resumed.load_state_dict(twin_bandit.state_dict())
    assert resumed.state_dict() == twin_bandit.state_dict()
    sequence = [8, 4, 4, 2, 1, 1, 64] * 20
    assert play(bandit, world, sequence) == play(resumed, twin, sequence)


def test_costs_are_asked_once_and_only_where_arms_may_run():
    bandit = ModelBased(["4_1_5", "8_4_48"])
    queries = bandit.cost_queries(64, 200)
    assert {q.batch_size for q in queries if q.strategy.is_off} == {1, 4, 16, 64}
    assert {q.batch_size for q in queries if str(q.strategy) == "8_4_48"} == {
        1,
        4,
        16,
        42,
    }  # 2048 // 48
    for query in queries:
        bandit.record_cost(query, 1.0)
    assert not bandit.cost_queries(64, 200)
    assert {q.batch_size for q in bandit.cost_queries(256, 200)} == {256}


def test_costs_are_asked_in_long_contexts_too_at_few_rows():
    def places_asked(max_batch_size, max_context):
        queries = bandit.cost_queries(max_batch_size, max_context)
        return {(query.batch_size, query.context_tokens) for query in queries}

    bandit = ModelBased(["4_1_5"])
    short = {(size, 128) for size in (1, 4, 16, 64)}
    assert places_asked(64, 1000) == short
    assert places_asked(64, 2000) == {*short, (1, 2000), (16, 2000)}
    assert places_asked(1, 40_000) == {(1, 128), (1, 4096)}
    assert places_asked(4, 60) == {(1, 60), (4, 60)}
    for query in bandit.cost_queries(64, 1100):
        bandit.record_cost(query, 1.0)
    assert not places_asked(64, 2000)
    assert places_asked(64, 40_000) == {(1, 4096), (16, 4096)}


def test_answers_for_contexts_that_were_cut_are_answers():
    """A tiny model leaves little room beside the steps; nothing is asked twice for that."""
    bandit = ModelBased(["16_1_17"])
    for query in bandit.cost_queries(4, 120):
        cut = dataclasses.replace(query, context_tokens=16)
        bandit.record_cost(cut, 1.0)
    assert not bandit.cost_queries(4, 120)


class _AttentiveWorld(World):
    """Each token verified reads the whole context, so that drafting pays in short ones only."""

    context_tokens = 100

    def cost(self, strategy, batch_size):
        nodes_tokens = batch_size * strategy.verify_tokens * self.context_tokens
        return super().cost(strategy, batch_size) + 2e-6 * nodes_tokens


def test_what_a_long_context_costs_is_known_before_any_step_in_one():
    world = _AttentiveWorld(0.6, noise=0.0)
    bandit = ModelBased(ARMS)
    for query in bandit.cost_queries(4, 4000):
        world.context_tokens = query.context_tokens
        bandit.record_cost(query, world.cost(query.strategy, query.batch_size))
    world.context_tokens = 100
    play(bandit, world, [4] * 600)  # in contexts of 100 tokens
    bandit.start_period()
    world.context_tokens = 4000
    step = dataclasses.replace(world.step(OFF, 4), context_tokens=4000)
    bandit.record(step)
    believed = bandit.report().buckets["2-4"].believed_gains
    off_rate = world.rate(OFF, 4)
    for strategy in STRATEGIES:
        assert believed[str(strategy)] == pytest.approx(world.rate(strategy, 4) / off_rate, rel=0.1)
    assert max(believed.values()) == 1  # while at 100 tokens, drafting pays:
    world.context_tokens = 100
    assert best_ratio(world, 4) > 1.1


def test_believed_gains_are_relative_to_off():
    world = World(0.8, noise=0.0)
    bandit = profiled(world)
    play(bandit, world, [1] * 400)
    gains = bandit.report().buckets["1"].believed_gains
    assert gains["off"] == 1
    tree = DraftStrategy.parse("6_1_7")
    assert gains["6_1_7"] == pytest.approx(world.rate(tree, 1) / world.rate(OFF, 1), rel=0.1)


# -- the models ----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 16])
@pytest.mark.parametrize("seed", range(4))
def test_a_drafter_that_became_good_is_tried_soon_after_the_notice(batch_size, seed):
    """However long it had been useless."""
    world = World(0.0, 0.0, seed=seed)
    bandit = profiled(world)
    play(bandit, world, [batch_size] * 150)
    bandit.discount(0.5)
    world.first, world.second = 0.85, 0.1
    play(bandit, world, [batch_size] * 40)
    chosen, _ = play(bandit, world, [batch_size] * 40)
    assert sum(not strategy.is_off for strategy in chosen) >= 0.8 * len(chosen)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 16])
@pytest.mark.parametrize("seed", range(4))
def test_a_drafter_that_was_published_bad_costs_little_after_20_steps(batch_size, seed):
    """After a notice a change is likely, so that little evidence is enough."""
    world = World(0.9, 0.05, noise=0.05, seed=seed)
    bandit = profiled(world)
    play(bandit, world, [batch_size] * 300)
    bandit.discount(0.5)
    world.first, world.second = 0.03, 0.01
    play(bandit, world, [batch_size] * 20)
    _, ratio = play(bandit, world, [batch_size] * 300)
    assert ratio >= 0.97


@pytest.mark.parametrize("batch_size", [4, 16, 128])
def test_a_drafter_that_was_not_replaced_is_not_tried_anew_for_every_new_policy(batch_size):
    """It drafts as well as it did, or nearly."""
    world = World(0.1, 0.0)
    bandit = profiled(world)
    play(bandit, world, [batch_size] * 200)
    ratios = []
    for _ in range(10):
        bandit.discount(0.5, drafter_changed=False)
        ratios.append(play(bandit, world, [batch_size] * 40)[1])
    assert sum(ratios) / len(ratios) >= 0.98


def test_a_cost_query_names_the_step():
    query = ModelBased(ARMS).cost_queries(1, 200)[0]
    assert query == CostQuery(strategy=OFF, batch_size=1, context_tokens=query.context_tokens)


def test_a_strategy_that_ran_in_bad_times_only_is_tried_again():
    """What was seen of it gives way to how far off the others are."""
    world = World(0.8)
    bandit = profiled(world)
    best = DraftStrategy.parse("6_1_7")
    for _ in range(10):
        stats = world.step(best, 1)
        bandit.record(dataclasses.replace(stats, seconds=20 * stats.seconds))
    play(bandit, world, [1] * 2500)
    chosen, _ = play(bandit, world, [1] * 500)
    assert chosen.count(best) > 250


def test_a_profile_of_one_batch_size_is_known_there():
    bandit = ModelBased(["4_1_5"])
    for query in bandit.cost_queries(1, 200):
        bandit.record_cost(query, 1.0)
    assert bandit._usual_seconds(1, Place(0, 0, 1, 100)) == 1.0
    assert bandit._usual_seconds(1, Place(1, 0, 2, 100)) is None
