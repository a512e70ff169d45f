"""The model-based bandit in simulated worlds, against the best that a fixed strategy would do."""

import dataclasses
import itertools
import random

import pytest

from fastrl.rollout.acceptance_model import AcceptanceModel, static_tree_length
from fastrl.rollout.cost_model import CostModel
from fastrl.rollout.engine import CostQuery
from fastrl.rollout.model_bandit import ModelBased
from fastrl.types import OFF, DraftStrategy
from tests.rollout.worlds import World, play

ARMS = ["2_1_3", "4_1_5", "6_1_7", "4_2_8", "6_2_12"]
STRATEGIES = [OFF, *map(DraftStrategy.parse, ARMS)]
BATCHES = [1, 2, 4, 8, 16, 32, 64, 128]


def profiled(world: World, *, factor: float = 1.0, only_trees: bool = False) -> ModelBased:
    """A bandit whose cost queries were answered, rightly or by a factor off."""
    bandit = ModelBased(ARMS)
    for query in bandit.cost_queries(128):
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
    queries = bandit.cost_queries(64)
    assert {q.batch_size for q in queries if q.strategy.is_off} == {1, 4, 16, 64}
    assert {q.batch_size for q in queries if str(q.strategy) == "8_4_48"} == {1, 4, 16}
    for query in queries:
        bandit.record_cost(query, 1.0)
    assert not bandit.cost_queries(64)
    assert {q.batch_size for q in bandit.cost_queries(256)} == {256}


def test_believed_gains_are_relative_to_off():
    world = World(0.8, noise=0.0)
    bandit = profiled(world)
    play(bandit, world, [1] * 400)
    gains = bandit.report().buckets["1"].believed_gains
    assert gains["off"] == 1
    tree = DraftStrategy.parse("6_1_7")
    assert gains["6_1_7"] == pytest.approx(world.rate(tree, 1) / world.rate(OFF, 1), rel=0.1)


# -- the models ----------------------------------------------------------------------------------


def brute_force_length(levels: list[list[float]], depth: int, num_nodes: int) -> float:
    """Best expected length over all sets of nodes that hold their parents; two children a node."""
    paths = [p for d in range(1, depth + 1) for p in itertools.product(range(2), repeat=d)]
    best = 0.0
    for nodes in itertools.combinations(paths, num_nodes):
        if all(len(path) == 1 or path[:-1] in nodes for path in nodes):
            total = 0.0
            for path in nodes:
                chance = 1.0
                for place, rank in enumerate(path):
                    chance *= levels[place][rank]
                total += chance
            best = max(best, total)
    return 1 + best


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("depth", "verify_tokens"), [(1, 3), (2, 4), (2, 5), (2, 7)])
def test_the_static_tree_is_the_best_of_its_shape(depth, verify_tokens, seed):
    rng = random.Random(seed)
    levels = [sorted((rng.random() / 2, rng.random() / 2), reverse=True) for _ in range(depth)]
    strategy = DraftStrategy(depth, 2, verify_tokens)
    expected = brute_force_length(levels, depth, verify_tokens - 1)
    assert static_tree_length(levels, strategy) == pytest.approx(expected)


def test_acceptance_is_counts_drawn_towards_the_level_above():
    strategy = DraftStrategy.parse("2_2_5")
    model = AcceptanceModel([strategy])
    world = World(0.6)
    steps = [world.step(strategy, 16) for _ in range(30)]
    for stats in steps:
        model.record(stats)
    above = [0.5, 0.1]
    for depth, weight in ((0, 4.0), (1, 8.0)):
        expected = []
        for rank in range(2):
            offered = sum(s.offered_by_rank[depth][rank] for s in steps)
            accepted = sum(s.accepted_by_rank[depth][rank] for s in steps)
            expected.append((accepted + weight * above[rank]) / (offered + weight))
        assert model.probabilities()[depth] == pytest.approx(expected)
        above = expected


def test_no_tree_is_believed_to_yield_more_than_its_depth():
    """Chains show nothing of second children, which get no more than first ones leave."""
    chain, tree = DraftStrategy.parse("6_1_7"), DraftStrategy.parse("6_2_12")
    model = AcceptanceModel([chain, tree])
    world = World(0.97, 0.02)
    for _ in range(200):
        model.record(world.step(chain, 8))
    for level in model.probabilities():
        assert sum(level) <= 1
    lengths = model.expected_lengths()
    assert lengths[tree].mean == pytest.approx(world.expected_length(tree), rel=0.05)
    assert lengths[chain].mean <= lengths[tree].mean <= 7


def test_second_children_that_were_accepted_where_they_were_offered_leave_nothing_above_one():
    tree = DraftStrategy.parse("1_2_3")
    model = AcceptanceModel([tree])
    stats = World(0.9).step(tree, 10)
    for _ in range(50):
        offered_seldom = dataclasses.replace(
            stats, offered_by_rank=((10, 1),), accepted_by_rank=((9, 1),)
        )
        model.record(offered_seldom)
    first, second = model.probabilities()[0]
    assert second == pytest.approx(1 - first)


def test_rows_of_a_step_that_are_all_alike_are_no_alarm():
    """Eight samples of one prompt that stand at the same hard word."""
    strategy = DraftStrategy.parse("4_1_5")
    model = AcceptanceModel([strategy])
    world = World(0.8)
    for _ in range(60):
        model.record(world.step(strategy, 8))
    hard = World(0.0, 0.0).step(strategy, 8)
    assert not model.record(hard)
    assert not model.record(world.step(strategy, 8))
    assert any(model.record(hard) for _ in range(4))


def test_what_a_dynamic_tree_yields_more_is_learnt_and_outlasts_a_notice():
    """A chain needs no correction: its model is exact."""
    tree, chain = DraftStrategy.parse("4_2_8"), DraftStrategy.parse("4_1_5")
    model = AcceptanceModel([tree, chain])
    world = World(0.6)
    for _ in range(400):
        for strategy in (tree, chain):
            model.record(world.step(strategy, 8))
        model.expected_lengths()
    before = model.expected_lengths()
    assert before[tree].mean == pytest.approx(world.expected_length(tree), rel=0.03)
    assert before[chain].mean == pytest.approx(world.expected_length(chain), rel=0.03)
    ratio = before[tree].mean / static_tree_length(model.probabilities(), tree)
    assert ratio > 1.01
    model.take_notice(0.5)
    after = model.expected_lengths()[tree].mean
    assert after / static_tree_length(model.probabilities(), tree) == pytest.approx(ratio, rel=0.01)


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


def test_one_tree_s_steps_tell_about_another_s():
    seen, unseen = DraftStrategy.parse("4_2_8"), DraftStrategy.parse("2_1_3")
    model = AcceptanceModel([seen, unseen])
    world = World(0.8)
    for _ in range(300):
        stats = world.step(seen, 4)
        model.record(stats)
    believed = model.expected_lengths()[unseen]
    assert believed.mean == pytest.approx(world.expected_length(unseen), rel=0.08)
    assert believed.shared_deviation < 0.05


def test_costs_between_profiled_batches_lie_on_the_line_and_hiccups_do_not_count():
    cost = CostModel(1, 1)
    cost.add_profile(0, 1, 1.0)
    cost.add_profile(0, 5, 3.0)
    assert cost.seconds(0, 0, 3) == pytest.approx(2.0)
    assert cost.seconds(0, 0, 7) == pytest.approx(4.0)
    for _ in range(4):
        cost.record(0, 0, 3, 4.0)  # twice the profile
        cost.record(0, 0, 5, 6.0)
    cost.record(0, 0, 3, 400.0)
    assert cost.seconds(0, 0, 1) == pytest.approx(2.0)


def test_a_strategy_without_steps_is_as_far_off_as_others_there_or_as_itself_elsewhere():
    cost = CostModel(3, 3)
    for arm in range(3):
        cost.add_profile(arm, 1, 1.0)
        cost.add_profile(arm, 4, 1.0)
    assert cost.seconds(2, 0, 2) == 1.0
    for _ in range(9):
        cost.record(0, 0, 2, 1.5)
        cost.record(1, 0, 2, 2.0)
        cost.record(2, 1, 2, 3.0)
    assert cost.seconds(2, 0, 2) == 1.5  # of 1.5 and 2
    assert cost.seconds(2, 2, 2) == 3.0
    assert cost.seconds(0, 2, 2) == 1.5
    cost.record(2, 0, 2, 0.5)
    assert cost.seconds(2, 0, 2) == 0.5  # of that and what was believed, the lower


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
    for query in bandit.cost_queries(1):
        bandit.record_cost(query, 1.0)
    assert bandit._usual_seconds(1, 0, 1) == 1.0
    assert bandit._usual_seconds(1, 1, 2) is None


def test_a_step_without_counts_is_refused():
    world = World(0.5)
    stats = world.step(DraftStrategy.parse("4_1_5"), 2)
    bandit = ModelBased(["4_1_5"])
    with pytest.raises(ValueError, match="the engine must fill offered_by_rank"):
        bandit.record(dataclasses.replace(stats, offered_by_rank=(), accepted_by_rank=()))


def test_a_cost_query_names_the_step():
    query = ModelBased(ARMS).cost_queries(1)[0]
    assert query == CostQuery(strategy=OFF, batch_size=1, context_tokens=query.context_tokens)
