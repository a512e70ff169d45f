"""Idle time of ranks, by hand-worked examples and against seconds that are counted one by one."""

import random

import pytest

from fastrl.callbacks.timeline_spans import RankStep, idle_shares, joined, waits
from fastrl.types import Span


def span(name: str, start_s: float, end_s: float) -> Span:
    return Span(name=name, start_s=start_s, seconds=end_s - start_s)


def rank(
    finished: float, drafter: tuple[tuple[float, float], ...] = (), *, clock: float = 0.0
) -> RankStep:
    """Generates from 1 on, and scores for half a second; the update is from 12 to 20."""
    return RankStep(
        clock_offset_s=clock,
        phases=(
            span("publish", 0 - clock, 1 - clock),
            span("rollout", 1 - clock, finished - 0.5 - clock),
            span("reward", finished - 0.5 - clock, finished - clock),
            span("update", 12 - clock, 20 - clock),
        ),
        engine=(
            span("prefill", 1 - clock, 2 - clock),
            span("off", 2 - clock, finished - 0.5 - clock),
        ),
        drafter=tuple(span("drafter", start - clock, end - clock) for start, end in drafter),
    )


def test_idle_time_is_from_when_a_rank_has_finished_to_when_the_last_one_has() -> None:
    shares = idle_shares([rank(11), rank(5, ((6, 8), (8, 10.5))), rank(8)])
    assert shares.before == pytest.approx((6 + 3) / 60)
    assert shares.after == pytest.approx((1.5 + 3) / 60)


def test_training_beyond_idle_time_is_not_taken_off_it() -> None:
    shares = idle_shares([rank(11), rank(5, ((10, 11.5), (20, 25)))])
    assert shares.before == pytest.approx(6 / 50)
    assert shares.after == pytest.approx(5 / 50)


def test_machines_whose_clocks_differ_are_set_side_by_side() -> None:
    here = idle_shares([rank(11), rank(5, ((6, 8),))])
    elsewhere = idle_shares([rank(11), rank(5, ((6, 8),), clock=1e6)])
    assert elsewhere.before == pytest.approx(here.before)
    assert elsewhere.after == pytest.approx(here.after)


def test_waits_and_training_fill_the_idle_time_exactly() -> None:
    rng = random.Random(0)
    for _ in range(50):
        edges = sorted(rng.sample(range(40, 110), 6))
        drafter = tuple((edges[i] / 10, edges[i + 1] / 10) for i in (0, 2, 4))
        own_end = rng.randrange(26, 110) / 10
        ranks = [rank(11), rank(own_end, drafter)]
        _, idle = waits(ranks)
        ticks = [0.05 + tick / 10 for tick in range(200)]
        expected = {
            tick
            for tick in ticks
            if own_end < tick < 11 and not any(start < tick < end for start, end in drafter)
        }
        found = {tick for tick in ticks for one in idle if one.start_s < tick < one.end_s}
        assert found == expected
        assert sum(one.seconds for one in idle) == pytest.approx(len(expected) / 10)


def test_neighbours_of_a_name_are_joined_across_small_gaps_alone() -> None:
    spans = [span("drafter", 0, 1), span("drafter", 1.1, 2), span("drafter", 3, 4)]
    assert joined(spans, 0.2) == [span("drafter", 0, 2), span("drafter", 3, 4)]
    others = [span("off", 0, 1), span("4_2_8", 1, 2), span("off", 2, 3)]
    assert joined(others, 0.2) == others
