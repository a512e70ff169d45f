"""The drafter's buffer: its bound, who leaves first, the law of its draws, and its state."""

import itertools
from collections import Counter

import pytest
import torch

from fastrl.callbacks.feature_buffer import RECENCY_DECAY, FeatureBuffer
from fastrl.types import SequenceFeatures


def sequence(
    num_tokens: int, rl_step: int = 0, num_prompt_tokens: int = 2, mark: float = 0.0
) -> SequenceFeatures:
    return SequenceFeatures(
        tokens_T=torch.arange(num_tokens),
        hidden_TD=torch.full((num_tokens, 3), mark),
        num_prompt_tokens=num_prompt_tokens,
        rl_step=rl_step,
    )


def held(buffer: FeatureBuffer) -> list[tuple[int, int]]:
    """(RL step, tokens) of each sequence, oldest first, as the state tells."""
    state = buffer.state_dict()
    return list(zip(state["rl_step"], state["num_tokens"], strict=True))


def test_the_oldest_rl_steps_leave_first_and_the_bound_holds() -> None:
    buffer = FeatureBuffer(max_tokens=20)
    buffer.add([sequence(6, rl_step=2), sequence(5, rl_step=2)])
    buffer.add([sequence(8, rl_step=3)])
    assert (buffer.num_tokens, len(buffer)) == (19, 3)
    buffer.add([sequence(4, rl_step=1)])
    assert held(buffer) == [(2, 6), (2, 5), (3, 8)]
    buffer.add([sequence(9, rl_step=4)])
    assert held(buffer) == [(3, 8), (4, 9)]
    assert buffer.num_tokens == 17


def test_a_sequence_larger_than_the_buffer_is_refused_and_counted_and_evicts_nobody() -> None:
    buffer = FeatureBuffer(max_tokens=10)
    assert buffer.add([sequence(7)]) == 0
    assert buffer.add([sequence(11, rl_step=1), sequence(3, rl_step=1)]) == 1
    assert held(buffer) == [(0, 7), (1, 3)]


def test_sequences_without_a_response_token_are_left_out() -> None:
    buffer = FeatureBuffer(max_tokens=100)
    assert buffer.add([sequence(5, num_prompt_tokens=5), sequence(2, num_prompt_tokens=1)]) == 0
    assert len(buffer) == 0


def test_the_buffer_shares_no_memory_with_what_it_was_given() -> None:
    buffer = FeatureBuffer(max_tokens=100)
    given = sequence(5, mark=1.0)
    buffer.add([given])
    given.hidden_TD.fill_(7)
    given.tokens_T.fill_(7)
    (kept,) = buffer.sample(torch.Generator(), max_pairs=1)
    assert torch.equal(kept.hidden_TD, torch.ones(5, 3))
    assert torch.equal(kept.tokens_T, torch.arange(5))


def test_draws_follow_response_length_times_recency() -> None:
    """Frequencies of the ordered pair of draws against the sequential law without replacement."""
    buffer = FeatureBuffer(max_tokens=1000)
    buffer.add([sequence(12, rl_step=3), sequence(6, rl_step=5), sequence(7, rl_step=5)])
    weights = [10 * RECENCY_DECAY**2, 4.0, 5.0]
    torch.testing.assert_close(buffer.weights(), torch.tensor(weights, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    num_draws = 20_000
    counts = Counter(
        tuple(len(f) for f in buffer.sample(generator, max_pairs=11)[:2]) for _ in range(num_draws)
    )
    counts_of_first = Counter[int]()
    for drawn, count in counts.items():
        counts_of_first[drawn[0]] += count
    by_length = dict(zip((12, 6, 7), weights, strict=True))
    total = sum(weights)
    for first, second in itertools.permutations(by_length, 2):
        expected = by_length[first] / total * by_length[second] / (total - by_length[first])
        spread = (expected * (1 - expected) / num_draws) ** 0.5
        assert abs(counts[first, second] / num_draws - expected) < 4 * spread
        assert abs(counts_of_first[first] / num_draws - by_length[first] / total) < 0.015


def test_draws_are_distinct_and_stop_when_the_row_is_full() -> None:
    buffer = FeatureBuffer(max_tokens=1000)
    buffer.add([sequence(12, mark=float(mark)) for mark in range(8)])
    drawn = buffer.sample(torch.Generator().manual_seed(0), max_pairs=30)
    assert len(drawn) == 3
    assert len({float(f.hidden_TD[0, 0]) for f in drawn}) == 3
    assert len(buffer.sample(torch.Generator().manual_seed(0), max_pairs=1000)) == 8


def test_very_old_sequences_can_still_be_drawn() -> None:
    """Their weight would underflow: draws without replacement need it positive."""
    buffer = FeatureBuffer(max_tokens=1000)
    buffer.add([sequence(5, rl_step=0), sequence(6, rl_step=10_000)])
    assert (buffer.weights() > 0).all()
    drawn = buffer.sample(torch.Generator().manual_seed(0), max_pairs=100)
    assert [len(f) for f in drawn] == [6, 5]


def test_state_round_trip_draws_the_same_sequences() -> None:
    buffer = FeatureBuffer(max_tokens=1000)
    short_of_one = sequence(9, rl_step=1, mark=1.0)
    short_of_one = SequenceFeatures(
        tokens_T=short_of_one.tokens_T,
        hidden_TD=short_of_one.hidden_TD[:-1],
        num_prompt_tokens=2,
        rl_step=1,
    )
    buffer.add([short_of_one, sequence(5, rl_step=2, mark=2.0), sequence(7, rl_step=2, mark=3.0)])
    resumed = FeatureBuffer(max_tokens=1000)
    resumed.load_state_dict(buffer.state_dict())
    assert resumed.num_tokens == buffer.num_tokens
    of_both = [b.sample(torch.Generator().manual_seed(3), 100) for b in (buffer, resumed)]
    for ours, theirs in zip(*of_both, strict=True):
        assert torch.equal(ours.tokens_T, theirs.tokens_T)
        assert torch.equal(ours.hidden_TD, theirs.hidden_TD)
        assert (ours.rl_step, ours.num_prompt_tokens) == (theirs.rl_step, theirs.num_prompt_tokens)
    resumed.load_state_dict(FeatureBuffer(max_tokens=5).state_dict())
    assert (len(resumed), resumed.num_tokens) == (0, 0)


def test_bad_calls_are_refused() -> None:
    with pytest.raises(ValueError, match="must be >= 1, got 0"):
        FeatureBuffer(max_tokens=0)
    with pytest.raises(ValueError, match="buffer is empty"):
        FeatureBuffer(max_tokens=5).sample(torch.Generator(), max_pairs=3)
