"""The drafter's buffer: its bounds, who leaves first, the law of its draws, and its state."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections import Counter
from typing import Any

import pytest
import torch

from fastrl.callbacks.feature_buffer import BufferSettings, FeatureBuffer
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


def buffer_of(**settings: Any) -> FeatureBuffer:
    return FeatureBuffer(BufferSettings(**settings))


def held(buffer: FeatureBuffer) -> list[tuple[int, int]]:
    """(RL step, tokens) of each sequence, oldest first, as the state tells."""
    state = buffer.state_dict()
    return list(zip(state["rl_step"], state["num_tokens"], strict=True))


def test_the_oldest_rl_steps_leave_first_and_the_bound_holds() -> None:
    buffer = buffer_of(max_tokens=20)
    buffer.add([sequence(6, rl_step=2), sequence(5, rl_step=2)])
    buffer.add([sequence(8, rl_step=3)])
    assert (buffer.num_tokens, len(buffer)) == (19, 3)
    buffer.add([sequence(4, rl_step=1)])
    assert held(buffer) == [(2, 6), (2, 5), (3, 8)]
    buffer.add([sequence(9, rl_step=4)])
    assert held(buffer) == [(3, 8), (4, 9)]
    assert buffer.num_tokens == 17


def test_a_sequence_larger_than_the_buffer_is_refused_and_counted_and_evicts_nobody() -> None:
    buffer = buffer_of(max_tokens=10)
    assert buffer.add([sequence(7)]) == 0
    assert buffer.add([sequence(11, rl_step=1), sequence(3, rl_step=1)]) == 1
    assert held(buffer) == [(0, 7), (1, 3)]


def test_sequences_without_a_response_token_are_left_out() -> None:
    buffer = buffer_of(max_tokens=100)
    assert buffer.add([sequence(5, num_prompt_tokens=5), sequence(2, num_prompt_tokens=1)]) == 0
    assert len(buffer) == 0


def test_the_buffer_shares_no_memory_with_what_it_was_given() -> None:
    buffer = buffer_of(max_tokens=100)
    given = sequence(5, mark=1.0)
    buffer.add([given])
    given.hidden_TD.fill_(7)
    given.tokens_T.fill_(7)
    (kept,) = buffer.sample(torch.Generator(), max_pairs=1)
    assert torch.equal(kept.hidden_TD, torch.ones(5, 3))
    assert torch.equal(kept.tokens_T, torch.arange(5))


@pytest.mark.parametrize("seed", range(4))
def test_both_bounds_hold_under_random_adds_and_the_newest_are_kept(seed: int) -> None:
    """Against a list that evicts, by (RL step, arrival), until tokens and bytes fit.

    Hidden states are of two dtypes, so that the bounds bind in turn.
    """
    draw = random.Random(seed)
    max_tokens, max_bytes = 120, 2600
    buffer = buffer_of(max_tokens=max_tokens, max_gib=max_bytes / 2**30)
    expected: list[tuple[int, int, int]] = []  # (RL step, tokens, bytes)
    was_full = {"tokens": False, "bytes": False}
    for add in range(60):
        sequences = []
        for _ in range(draw.randrange(4)):
            given = sequence(draw.randint(3, 50), rl_step=add - draw.choice([0, 0, 1]))
            hidden_TD = given.hidden_TD.to(draw.choice([torch.float64, torch.bfloat16]))
            sequences.append(dataclasses.replace(given, hidden_TD=hidden_TD))
        buffer.add(sequences)
        expected += [
            (f.rl_step, len(f), len(f) * (8 + 3 * f.hidden_TD.itemsize)) for f in sequences
        ]
        expected.sort(key=lambda held: held[0])
        while True:
            num_tokens, num_bytes = (sum(held[n] for held in expected) for n in (1, 2))
            is_over = {"tokens": num_tokens > max_tokens, "bytes": num_bytes > max_bytes}
            if not any(is_over.values()):
                break
            was_full = {bound: was_full[bound] or is_over[bound] for bound in is_over}
            expected.pop(0)
        assert held(buffer) == [(rl_step, tokens) for rl_step, tokens, _ in expected]
        assert (buffer.num_tokens, buffer.num_bytes) == (num_tokens, num_bytes)
    assert all(was_full.values())


def test_a_sequence_of_more_bytes_than_the_bound_is_refused_and_counted() -> None:
    """A token takes 8 bytes and 3 × 4 of hidden state: 20 each, 5 tokens fit."""
    buffer = buffer_of(max_gib=100 / 2**30)
    assert buffer.add([sequence(5), sequence(6)]) == 1
    assert held(buffer) == [(0, 5)]


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({}, [10 / 2, 4, 5]),  # half-life 2, exponent 1
        ({"recency_half_life": 1.0, "length_exponent": 2.0}, [100 / 4, 16, 25]),
        ({"recency_half_life": math.inf, "length_exponent": 0.5}, [10**0.5, 2, 5**0.5]),
        ({"recency_half_life": 4.0, "length_exponent": 0.0}, [0.5**0.5, 1, 1]),
    ],
)
def test_draws_follow_length_and_recency_as_stated(
    settings: dict[str, float], weights: list[float]
) -> None:
    """Chi-square of the ordered pairs drawn against the exact law of draws without replacement.

    Responses of 10 tokens, 2 RL steps old, and of 4 and 5 tokens, new. Of six outcomes: 5 degrees
    of freedom, 30 is exceeded once in 70,000 times.
    """
    buffer = buffer_of(**settings)
    buffer.add([sequence(12, rl_step=3), sequence(6, rl_step=5), sequence(7, rl_step=5)])
    ratios = buffer.weights() / torch.tensor(weights, dtype=torch.float64)
    torch.testing.assert_close(ratios, ratios[0].expand(3))
    generator = torch.Generator().manual_seed(0)
    num_draws = 20_000
    counts = Counter(
        tuple(len(f) for f in buffer.sample(generator, max_pairs=11)[:2]) for _ in range(num_draws)
    )
    by_length = dict(zip((12, 6, 7), weights, strict=True))
    total = sum(weights)
    chi_square = 0.0
    for first, second in itertools.permutations(by_length, 2):
        probability = by_length[first] / total * by_length[second] / (total - by_length[first])
        expected = probability * num_draws
        chi_square += (counts[first, second] - expected) ** 2 / expected
    assert counts.total() == num_draws
    assert chi_square < 30


def test_draws_are_distinct_and_stop_when_the_row_is_full() -> None:
    buffer = buffer_of(max_tokens=1000)
    buffer.add([sequence(12, mark=float(mark)) for mark in range(8)])
    drawn = buffer.sample(torch.Generator().manual_seed(0), max_pairs=30)
    assert len(drawn) == 3
    assert len({float(f.hidden_TD[0, 0]) for f in drawn}) == 3
    assert len(buffer.sample(torch.Generator().manual_seed(0), max_pairs=1000)) == 8


def test_very_old_sequences_can_still_be_drawn() -> None:
    """Their weight would underflow: draws without replacement need it positive."""
    buffer = buffer_of(max_tokens=1000)
    buffer.add([sequence(5, rl_step=0), sequence(6, rl_step=10_000)])
    assert (buffer.weights() > 0).all()
    drawn = buffer.sample(torch.Generator().manual_seed(0), max_pairs=100)
    assert [len(f) for f in drawn] == [6, 5]


def test_state_round_trip_draws_the_same_sequences() -> None:
    buffer = buffer_of(max_tokens=1000)
    short_of_one = sequence(9, rl_step=1, mark=1.0)
    short_of_one = SequenceFeatures(
        tokens_T=short_of_one.tokens_T,
        hidden_TD=short_of_one.hidden_TD[:-1],
        num_prompt_tokens=2,
        rl_step=1,
    )
    buffer.add([short_of_one, sequence(5, rl_step=2, mark=2.0), sequence(7, rl_step=2, mark=3.0)])
    resumed = buffer_of(max_tokens=1000)
    resumed.load_state_dict(buffer.state_dict())
    assert resumed.num_tokens == buffer.num_tokens
    of_both = [b.sample(torch.Generator().manual_seed(3), 100) for b in (buffer, resumed)]
    for ours, theirs in zip(*of_both, strict=True):
        assert torch.equal(ours.tokens_T, theirs.tokens_T)
        assert torch.equal(ours.hidden_TD, theirs.hidden_TD)
        assert (ours.rl_step, ours.num_prompt_tokens) == (theirs.rl_step, theirs.num_prompt_tokens)
    resumed.load_state_dict(buffer_of(max_tokens=5).state_dict())
    assert (len(resumed), resumed.num_tokens) == (0, 0)


def test_a_resumed_buffer_goes_on_with_identical_draws() -> None:
    """Adds, evictions and draws after the resume, not the first draw alone."""
    whole, resumed = buffer_of(max_tokens=60), buffer_of(max_tokens=60)
    whole.add(sequence(draw, rl_step=draw // 5, mark=float(draw)) for draw in range(5, 12))
    resumed.load_state_dict(whole.state_dict())
    drawn: list[list[float]] = []
    for buffer in (whole, resumed):
        generator = torch.Generator().manual_seed(3)
        marks: list[float] = []
        for rl_step in range(3, 8):
            buffer.add([sequence(9, rl_step=rl_step, mark=-float(rl_step))])
            marks += [float(f.hidden_TD[0, 0]) for f in buffer.sample(generator, max_pairs=20)]
        drawn.append(marks)
    assert drawn[0] == drawn[1]
    assert held(whole) == held(resumed)
    assert whole.num_bytes == resumed.num_bytes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be >= 1, got 0"),
        ({"max_gib": 0.0}, "max_gib must be > 0, got 0.0"),
        ({"recency_half_life": 0.0}, r"recency_half_life must be > 0 .*, got 0.0"),
        ({"length_exponent": -1.0}, r"length_exponent must be >= 0 .*, got -1.0"),
        ({"length_exponent": math.inf}, "finite, got inf"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BufferSettings(**settings)


def test_an_empty_buffer_has_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match="buffer is empty"):
        buffer_of(max_tokens=5).sample(torch.Generator(), max_pairs=3)
