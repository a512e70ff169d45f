"""One estimate for all buckets, until a bucket's own steps contradict it."""

import pytest

from fastrl.rollout.bucket_acceptance import BucketAcceptance
from fastrl.rollout.model_bandit import ModelBased
from fastrl.types import OFF, DraftStrategy
from tests.rollout.worlds import World, play

CHAIN, DEEP = DraftStrategy.parse("4_1_5"), DraftStrategy.parse("8_1_9")
FULL, LAST = 6, 0
"""Buckets of 128 rows, and of one."""


def taught(num_steps: int = 10) -> BucketAcceptance:
    acceptance = BucketAcceptance([CHAIN, DEEP])
    world = World(0.8)
    for _ in range(num_steps):
        acceptance.record(FULL, world.step(DEEP, 128))
    acceptance.look(1.0)
    return acceptance


def test_what_one_bucket_shows_is_believed_in_all():
    acceptance = taught()
    assert acceptance.lengths(LAST) == acceptance.lengths(FULL)
    assert acceptance.lengths(LAST)[CHAIN].mean > 2.5


def test_a_hard_last_row_changes_no_belief_about_the_next_full_batch():
    acceptance = taught()
    before = acceptance.lengths(FULL)[DEEP].mean
    hard = World(0.1)
    alarms = [acceptance.record(LAST, hard.step(CHAIN, 1)) for _ in range(40)]
    acceptance.look(1.0)
    assert sum(alarms) == acceptance.num_alarms == 1
    assert alarms.index(True) < 20
    assert acceptance.lengths(LAST)[DEEP].mean < 1.5
    assert acceptance.lengths(FULL)[DEEP].mean == pytest.approx(before, rel=0.03)


def test_a_bucket_whose_own_estimate_is_contradicted_shares_again():
    acceptance = taught()
    for _ in range(40):
        acceptance.record(LAST, World(0.1).step(CHAIN, 1))
    easy = World(0.8, seed=1)
    alarms = [acceptance.record(LAST, easy.step(CHAIN, 1)) for _ in range(40)]
    assert sum(alarms) == 1
    assert acceptance.lengths(LAST) == acceptance.lengths(FULL)


def test_a_saved_estimate_goes_on_as_the_one_that_was_saved():
    acceptance = taught()
    for _ in range(20):
        acceptance.record(LAST, World(0.1).step(CHAIN, 1))
    resumed = BucketAcceptance([CHAIN, DEEP])
    resumed.load_state_dict(acceptance.state_dict())
    world, twin = World(0.6), World(0.6)
    for bucket in [LAST, FULL] * 10:
        for estimate, its in ((acceptance, world), (resumed, twin)):
            estimate.record(bucket, its.step(DEEP, 8))
            estimate.look(0.9)
        assert resumed.state_dict() == acceptance.state_dict()


def test_rollouts_that_end_with_hard_rows_keep_their_strategy_while_the_batch_is_full():
    """The bandit's choice at the start of the next rollout."""
    easy, hard = World(0.85), World(0.1)
    bandit = ModelBased(["8_1_9"])
    for query in bandit.cost_queries(8, 200):
        bandit.record_cost(query, easy.cost(query.strategy, query.batch_size))
    assert easy.rate(DEEP, 8) > 1.2 * easy.rate(OFF, 8)
    shares = []
    for _ in range(4):
        chosen, _ = play(bandit, easy, [8] * 40)
        shares.append(chosen[:10].count(DEEP) / 10)
        play(bandit, hard, [1] * 40)
    assert min(shares[1:]) >= 0.8
