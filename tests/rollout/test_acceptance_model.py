"""What is believed of accept lengths, against brute force and simulated rows."""

import dataclasses
import itertools
import random

import pytest

from fastrl.rollout.acceptance_model import AcceptanceModel, static_tree_length
from fastrl.rollout.model_bandit import ModelBased
from fastrl.types import DraftStrategy
from tests.rollout.worlds import World


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


def test_a_step_without_counts_is_refused():
    world = World(0.5)
    stats = world.step(DraftStrategy.parse("4_1_5"), 2)
    bandit = ModelBased(["4_1_5"])
    with pytest.raises(ValueError, match="the engine must fill offered_by_rank"):
        bandit.record(dataclasses.replace(stats, offered_by_rank=(), accepted_by_rank=()))
