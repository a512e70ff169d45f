"""The sliding window and what a bandit derives from it: hand-worked and recomputed numbers."""

from __future__ import annotations

import random
import statistics

import pytest

from fastrl.rollout.bandit import EpsilonGreedy
from fastrl.rollout.bandit_base import Bandit
from fastrl.rollout.bandit_windows import _Window
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
                num_current = rng.randint(0, num_current)
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
    bandit = EpsilonGreedy(["4_2_8"], window_size=10**9)
    for tokens, seconds in ((4, 0.01), (4, 0.5), (1, 0.02)):
        record(bandit, TREE, 1, tokens, seconds)
    record(bandit, TREE, 8, 8, 0.04)
    accept_length = (9 + 16 * 17 / 11) / 19
    assert bandit._rates(0, [1]) == pytest.approx([accept_length / 0.02])


def test_mean_over_all_buckets_forgets_at_the_pace_of_the_window() -> None:
    """Steps of 2, 4 and 2 rows, weights 9/16, 3/4 and 1 at window 4: rows 1.125, 3 and 2."""
    bandit = EpsilonGreedy(["4_2_8"], window_size=4)
    for rows, accept_length in ((2, 1), (4, 2), (2, 4)):
        record(bandit, TREE, rows, rows * accept_length, 0.01)
    mean = (1.125 * 1 + 3 * 2 + 2 * 4) / 6.125
    assert bandit._mean_accept[1] == pytest.approx(mean)


def test_discount_forgets_acceptance_of_old_steps_and_no_times() -> None:
    """Five steps at batch 1, accept lengths 1 1 1 2 3, median 0.03 s throughout.

    Of the five the newest int(0.4 * 5) = 2 count, 5 tokens in 2 rows; the mean over all is 8/5.
    Then none, and 8/5 alone. A new step of 4 tokens finds the old ones at weight 0.4 * 0.1 * 5.
    """
    bandit = EpsilonGreedy(["4_2_8"], window_size=10**9)
    for tokens, seconds in ((1, 0.01), (1, 0.02), (1, 0.03), (2, 0.04), (3, 0.05)):
        record(bandit, TREE, 1, tokens, seconds)
    bandit.discount(0.4)
    assert bandit._rates(0, [1]) == pytest.approx([(5 + 16 * 1.6) / 18 / 0.03])
    bandit.discount(0.1)
    assert bandit._rates(0, [1]) == pytest.approx([1.6 / 0.03])
    record(bandit, TREE, 1, 4, 0.03)
    mean = (0.2 * 1.6 + 4) / 1.2
    assert bandit._rates(0, [1]) == pytest.approx([(4 + 16 * mean) / 17 / 0.03])


def test_arm_untried_for_very_long_keeps_its_mean_and_yields_to_its_next_step() -> None:
    bandit = EpsilonGreedy(["4_2_8"])
    record(bandit, TREE, 1, 3, 0.01)
    for _ in range(3000):
        bandit.discount(0.5)
    assert bandit._rates(0, [1]) == pytest.approx([3 / 0.01])
    record(bandit, TREE, 1, 2, 0.01)
    assert bandit._rates(0, [1]) == pytest.approx([2 / 0.01])


def test_journal_holds_recorded_steps_only_when_asked_for() -> None:
    bandit = EpsilonGreedy(["4_2_8"])
    record(bandit, OFF, 1, 1, 0.01)
    assert bandit.journal is None
    bandit.journal = []
    record(bandit, TREE, 2, 3, 0.02)
    assert [(step.strategy, step.num_tokens) for step in bandit.journal] == [(TREE, 3)]
