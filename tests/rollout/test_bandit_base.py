"""The sliding window and what a bandit derives from it: hand-worked and recomputed numbers."""

from __future__ import annotations

import random
import statistics

import pytest

from fastrl.rollout.bandit import EpsilonGreedy
from fastrl.rollout.bandit_base import Bandit, _Window
from fastrl.types import OFF, DraftStrategy, StepStats

TREE = DraftStrategy.parse("4_2_8")


def record(bandit: Bandit, strategy: DraftStrategy, rows: int, tokens: int, seconds: float) -> None:
    accept_lengths = (1,) * (rows - 1) + (tokens - rows + 1,)
    bandit.record(
        StepStats(
            strategy=strategy,
            batch_size=rows,
            context_tokens=10,
            accept_lengths=accept_lengths,
            seconds=seconds,
        )
    )


def test_window_keeps_medians_and_sums_of_its_newest_steps() -> None:
    window = _Window(3)
    window.append(2, 1, 0.5)
    window.append(6, 2, 0.1)
    assert window.median_seconds == pytest.approx(0.3)
    assert window.median_tokens_per_second == pytest.approx(32)  # of 4 and 60
    window.append(4, 2, 0.2)
    assert window.median_seconds == 0.2
    window.append(9, 3, 0.9)  # the first one leaves
    assert window.median_seconds == 0.2
    assert window.median_tokens_per_second == pytest.approx(20)  # of 60, 20 and 10
    assert (window.tokens, window.rows) == (19, 7)


def test_window_agrees_with_a_plain_recomputation_over_random_operations() -> None:
    rng = random.Random(0)
    for size in (1, 2, 7):
        window, num_current = _Window(size), 0
        plain: list[tuple[int, int, float]] = []
        for _ in range(300):
            step = (rng.randint(1, 9), rng.randint(1, 4), rng.choice((0.1, 0.2, 0.3, 0.7)))
            window.append(*step)
            plain = [*plain, step][-size:]
            num_current = min(num_current + 1, size)
            if rng.random() < 0.1:
                num_current = rng.randint(1, num_current)
                window.keep_acceptance(num_current)
            current = plain[len(plain) - num_current :]
            assert list(window.steps) == plain
            assert window.median_seconds == statistics.median(s for _, _, s in plain)
            assert window.tokens == sum(tokens for tokens, _, _ in current)
            assert window.rows == sum(rows for _, rows, _ in current)


def test_rate_is_shrunk_mean_accept_length_over_median_seconds() -> None:
    """At batch 1: 9 tokens in 3 rows; elsewhere 8 tokens in 8 rows; so 17 / 11 over all buckets.

    Accept length at batch 1: (9 + 16 * 17/11) / (3 + 16).
    """
    bandit = EpsilonGreedy(["4_2_8"])
    for tokens, seconds in ((4, 0.01), (4, 0.5), (1, 0.02)):
        record(bandit, TREE, 1, tokens, seconds)
    record(bandit, TREE, 8, 8, 0.04)
    accept_length = (9 + 16 * 17 / 11) / 19
    assert bandit._rate(0, 1) == pytest.approx(accept_length / 0.02)


def test_discount_forgets_acceptance_of_old_steps_and_no_times() -> None:
    """Of five steps the newest ceil(0.4 * 5) = 2 count: 5 tokens in 2 rows; the median stays."""
    bandit = EpsilonGreedy(["4_2_8"])
    for tokens, seconds in ((1, 0.01), (1, 0.02), (1, 0.03), (2, 0.04), (3, 0.05)):
        record(bandit, TREE, 1, tokens, seconds)
    bandit.discount(0.4)
    assert bandit._rate(0, 1) == pytest.approx(2.5 / 0.03)
    bandit.discount(0.0)
    assert bandit._rate(0, 1) == pytest.approx(3 / 0.03)
    record(bandit, TREE, 1, 1, 0.03)
    assert bandit._rate(0, 1) == pytest.approx(2 / 0.03)


def test_pooled_acceptance_stays_the_sum_over_windows() -> None:
    bandit, rng = EpsilonGreedy(["4_2_8"], [1, 3, 6], window_size=5), random.Random(0)
    for _ in range(200):
        rows = rng.randint(1, 9)
        record(bandit, rng.choice((OFF, TREE)), rows, rows + rng.randint(0, 4), rng.random())
        if rng.random() < 0.05:
            bandit.discount(rng.random())
        for arm in (0, 1):
            windows = [bucket[arm] for bucket in bandit._windows]
            assert bandit._pooled_tokens[arm] == sum(window.tokens for window in windows)
            assert bandit._pooled_rows[arm] == sum(window.rows for window in windows)


def test_journal_holds_recorded_steps_only_when_asked_for() -> None:
    bandit = EpsilonGreedy(["4_2_8"])
    record(bandit, OFF, 1, 1, 0.01)
    assert bandit.journal is None
    bandit.journal = []
    record(bandit, TREE, 2, 3, 0.02)
    assert [(step.strategy, step.num_tokens) for step in bandit.journal] == [(TREE, 3)]
