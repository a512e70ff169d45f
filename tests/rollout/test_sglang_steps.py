"""Decode sessions, by hand-made steps: what is learned, when, and how counts by rank come about."""

import itertools

import numpy as np
import pytest

from fastrl.rollout.bandit import FixedStrategy
from fastrl.rollout.sglang_pool import FEWEST_UNREAD, MOST_UNREAD, StrategyPool
from fastrl.rollout.sglang_steps import (
    DecodeSession,
    DecodeStep,
    Rehearsal,
    RequestSteps,
    VerifiedTree,
    counts_by_rank,
)
from fastrl.types import OFF, DraftStrategy, StepStats
from tests.rollout.test_sglang_rollouts import raw, rollout_of

CHAIN, TREE = DraftStrategy.parse("3_1_4"), DraftStrategy.parse("2_2_6")


class Mark:
    """At a second that the test names; past when the test says so."""

    now = 0.0

    def __init__(self, seconds):
        self.seconds = seconds

    def is_past(self):
        return self.seconds <= Mark.now

    def seconds_to(self, later):
        return later.seconds - self.seconds


class Noted:
    strategies = (OFF, CHAIN)

    def __init__(self, chosen=CHAIN):
        self.steps: list[StepStats] = []
        self.asked: list[tuple] = []
        self.chosen = chosen

    def select(self, batch_size, context_tokens, referenced_rows=0):
        self.asked.append((batch_size, context_tokens))
        return self.chosen

    def record(self, stats):
        self.steps.append(stats)


class Request:
    def __init__(self, rid, prompt=5, response=2):
        self.rid = rid
        self.origin_input_ids, self.output_ids = [0] * prompt, [0] * response
        self.is_over = self.is_retracted = False

    def finished(self):
        return self.is_over

    @property
    def output_ids_through_stop(self):
        return self.output_ids


def begin(session, requests, start, end, *, strategy=CHAIN, follows=True):
    step = DecodeStep(
        strategy=strategy,
        context_tokens=7,
        requests=list(requests),
        start=Mark(start),
        end=Mark(end),
    )
    session.begin(step, follows=follows)


def test_a_step_takes_until_the_next_one_starts_and_is_learned_once_that_is_past():
    session, rows = DecodeSession(selector := Noted()), [Request("a"), Request("b")]
    Mark.now = 10.0
    session.choose(rows)
    begin(session, rows, 1.0, 1.5)
    session.accept([2, 0])
    session.choose(rows)
    assert selector.steps == []  # nobody knows yet when the next one starts
    begin(session, rows, 2.0, 2.5)
    begin(session, rows, 20.0, 21.0)
    session.accept([1, 1])
    session.choose(rows)
    assert [step.seconds for step in selector.steps] == [1.0]
    Mark.now = 20.0
    session.choose(rows)
    assert [step.seconds for step in selector.steps] == [1.0, 18.0]
    assert selector.steps[0].accept_lengths == (3, 1)
    assert selector.steps[0].offered_by_rank == ((2,), (1,), (1,))
    assert selector.steps[0].accepted_by_rank == ((1,), (1,), (0,))
    assert selector.asked[0] == (2, 7)


def test_before_a_prefill_and_at_the_end_a_step_takes_until_its_own_end():
    Mark.now = 100.0
    session, rows = DecodeSession(selector := Noted()), [Request("a")]
    begin(session, rows, 1.0, 1.5)
    session.accept([0])
    begin(session, rows, 9.0, 9.25, follows=False)
    session.accept([3])
    report = session.finish()
    assert [step.seconds for step in selector.steps] == [0.5, 0.25]
    assert report.stats.num_steps == 2
    assert report.stats.accepted_by_depth == (1, 1, 1)
    assert report.requests["a"] == RequestSteps(accept_lengths=[1, 4], num_verify_steps=2)


def test_a_response_that_has_ended_emits_nothing_more():
    """With overlapped scheduling it takes part in one step too many."""
    Mark.now = 100.0
    session, rows = DecodeSession(selector := Noted()), [Request("a"), Request("b")]
    begin(session, rows, 1.0, 2.0)
    session.accept([3, 3])
    for row in rows:
        row.output_ids += [0] * 4
    rows[1].is_over = True
    begin(session, rows, 2.0, 3.0)
    session.accept([3, 3])
    begin(session, rows[1:], 3.0, 4.0)
    session.accept([3])
    report = session.finish()
    assert [step.batch_size for step in selector.steps] == [2, 1]
    assert report.requests["b"].accept_lengths == [4]
    assert report.stats.row_steps == 3


def test_tokens_after_a_responses_end_are_not_counted():
    """Of four that the last step emitted, the response took two."""
    Mark.now = 100.0
    session, rows = DecodeSession(selector := Noted()), [Request("a"), Request("b")]
    begin(session, rows, 1.0, 2.0)
    session.accept([3, 3])
    rows[0].output_ids += [0] * 2
    rows[0].is_over = True
    rows[1].output_ids += [0] * 4
    report = session.finish()
    assert selector.steps[0].accept_lengths == (2, 4)
    assert report.requests["a"].accept_lengths == [2]
    assert report.stats.accepted_tokens == 6
    assert report.stats.accepted_by_depth == (2, 2, 2)  # the drafts were right all the same


def test_a_step_that_a_retraction_undid_is_not_counted():
    """SGLang drops what it emitted for the request, which comes back by a prefill."""
    Mark.now = 100.0
    session, rows = DecodeSession(selector := Noted()), [Request("a"), Request("b")]
    begin(session, rows, 1.0, 2.0)
    rows[0].is_retracted = True
    session.accept([3, 1])
    report = session.finish()
    assert selector.steps[0].accept_lengths == (2,)
    assert "a" not in report.requests


def test_a_stand_in_of_n_grams_is_plain_decoding():
    """What an excluded FixedStrategy answers with: SGLang runs no n-gram trees."""
    selector = FixedStrategy("3_1_4")
    session = DecodeSession(selector)
    assert session.choose([Request("a")])[0] == CHAIN
    selector.exclude([CHAIN])
    assert selector.select(1, 7).drafter == "ngram"
    assert session.choose([Request("a")])[0] == OFF


def test_results_of_other_rows_than_the_steps_are_refused():
    session = DecodeSession(Noted())
    begin(session, [Request("a")], 1.0, 2.0)
    with pytest.raises(RuntimeError, match=r"reported 2 rows.*the step had 1 rows"):
        session.accept([1, 1])
    session.accept([1])
    with pytest.raises(RuntimeError, match="no step waits"):
        session.accept([1])


def test_a_rehearsal_runs_each_strategy_in_turn_and_ends_the_rows():
    Mark.now = 100.0
    selector = Noted()
    session = DecodeSession(selector, Rehearsal(strategies=[OFF, CHAIN], batch_size=2, num_steps=3))
    rows = [Request("a"), Request("b")]
    chosen = [session.choose(rows[:1])[0]]  # not all rows are there yet
    begin(session, rows[:1], 0.0, 0.5, strategy=chosen[0])
    session.accept([0])
    for number in range(7):
        assert not session.is_over
        strategy, _ = session.choose(rows)
        chosen.append(strategy)
        begin(session, rows, number + 1.0, number + 1.5, strategy=strategy)
        session.accept([0, 0])
    assert chosen == [OFF, OFF, OFF, OFF, CHAIN, CHAIN, CHAIN, OFF]
    assert session.is_over
    report = session.finish()
    assert report.step_seconds == {"off": [1.0] * 3, "3_1_4": [1.0] * 3}
    assert selector.steps == selector.asked == []
    assert report.bandit_state is None


def test_counts_by_rank_of_trees_are_those_of_their_definition():
    """Against walking every row's tree by parents."""
    rng = np.random.default_rng(0)
    depth, topk, size, num_rows = 3, 3, 9, 40
    strategy = DraftStrategy(depth, topk, size)
    next_token = np.full((num_rows, size), -1)
    next_sibling = np.full((num_rows, size), -1)
    paths = np.full((num_rows, depth + 1), -1)
    offered = np.zeros((depth, topk), int)
    accepted = np.zeros((depth, topk), int)
    num_accepted = []
    rows = [row for row in range(num_rows) if row % 5]
    for row in range(num_rows):
        level, children = {0: 0}, {node: [] for node in range(size)}
        for node in range(1, size):
            able = [n for n in level if level[n] < depth and len(children[n]) < topk]
            parent = int(rng.choice(able))
            level[node] = level[parent] + 1
            children[parent].append(node)
        for parent, own in children.items():
            if own:
                next_token[row, parent] = own[0]
            for one, other in itertools.pairwise(own):
                next_sibling[row, one] = other
        path = [0]
        while children[path[-1]] and rng.random() < 0.7:
            path.append(int(rng.choice(children[path[-1]])))
        paths[row, : len(path)] = np.array(path) + row * size
        if row in rows:
            num_accepted.append(len(path) - 1)
            for place, node in enumerate(path[:depth]):
                for rank, child in enumerate(children[node]):
                    offered[place, rank] += 1
                    accepted[place, rank] += child in path
    tree = VerifiedTree(next_token_BN=next_token, next_sibling_BN=next_sibling, accepted_BD=paths)
    shown = counts_by_rank(strategy, num_accepted, tree, rows)
    assert np.array_equal(shown[0], offered)
    assert np.array_equal(shown[1], accepted)
    assert accepted.sum() == sum(num_accepted) > 20


def test_accept_lengths_come_in_order_and_end_with_the_response():
    def shown(lengths, num_tokens):
        rollout = rollout_of(
            raw(num_tokens, steps=RequestSteps(accept_lengths=lengths, num_verify_steps=2))
        )
        assert rollout.num_verify_steps == 2
        return rollout.accept_lengths

    assert shown([1, 3, 2], 7) == (1, 3, 2)
    assert shown([1, 3, 4], 6) == (1, 3, 1)  # verified beyond the end
    assert shown([1, 3], 7) == (1, 3, 1, 1)  # tokens of prefills after a pause
    assert shown([], 1) == ()


def test_a_pool_goes_through_the_environment_and_bounds_graphs():
    large = DraftStrategy.parse("8_4_32")
    pool = StrategyPool(largest_batch={CHAIN: None, large: 20}, unread_gib=0.5)
    environment: dict[str, str] = {}
    pool.write_to(environment)
    assert StrategyPool.from_environment(environment) == pool
    assert (pool.depth, pool.topk, pool.verify_tokens) == (8, 4, 32)
    assert pool.strategies == [OFF, CHAIN, large]
    captured = [1, 2, 4, 8, 16, 24, 32]
    assert pool.batch_sizes(CHAIN, captured) == pool.batch_sizes(OFF, captured) == captured
    assert pool.batch_sizes(large, captured) == [1, 2, 4, 8, 16, 24]
    assert pool.allowed(20) == [OFF, CHAIN, large]
    assert pool.allowed(21) == [OFF, CHAIN]
    assert StrategyPool(largest_batch={large: 16}).batch_sizes(large, captured) == captured[:5]
    assert StrategyPool(largest_batch={large: 99}).batch_sizes(large, captured) == captured
    with pytest.raises(RuntimeError, match="FASTRL_STRATEGIES is not set"):
        StrategyPool.from_environment({})
    with pytest.raises(ValueError, match="n-gram trees"):
        StrategyPool(largest_batch={DraftStrategy.parse("ngram_3_1_4"): None})
    with pytest.raises(ValueError, match="needs a draft tree"):
        StrategyPool(largest_batch={OFF: None})


def test_what_waits_for_the_drafter_is_bounded_by_memory():
    def most(unread_gib: float, num_rows: int, width: int) -> int:
        pool = StrategyPool(largest_batch={CHAIN: None}, unread_gib=unread_gib)
        return pool.most_unread_tokens(num_rows, 2 * width)

    assert most(1.0, 512, 3584) == 292  # 2**30 / (512 * 7168)
    assert most(2.0, 512, 3584) == 585
    assert most(0.0, 512, 3584) == FEWEST_UNREAD
    assert most(1.0, 1, 64) == MOST_UNREAD
