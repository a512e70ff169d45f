"""Idle time of ranks, by hand-worked examples and against seconds that are counted one by one."""

import random

import pytest

from fastrl.callbacks.timeline_spans import RankStep, idle_time, joined, waits
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


def test_idle_time_is_from_a_ranks_own_end_to_the_last_ones() -> None:
    ranks = [rank(11), rank(5, ((6, 8), (8, 10.5))), rank(8)]
    idle = idle_time(ranks)
    assert idle.rank_seconds == 60
    assert idle.idle_seconds == 6 + 3
    assert idle.trained_seconds == 4.5
    assert idle.num_free_steps == 2
    assert idle.delay_seconds == 0
    assert idle.share_before == pytest.approx(9 / 60)
    assert idle.share_after == pytest.approx(4.5 / 60)


def test_training_that_goes_on_beyond_delays_and_is_not_free() -> None:
    idle = idle_time([rank(11), rank(5, ((10, 11.5),))])
    assert idle.trained_seconds == 1
    assert idle.delay_seconds == 0.5


def test_training_at_the_batchs_end_is_neither_free_nor_a_delay() -> None:
    idle = idle_time([rank(11), rank(5, ((20, 25),))])
    assert (idle.trained_seconds, idle.num_free_steps, idle.delay_seconds) == (0, 0, 0)
    assert idle.rank_seconds == 50


def test_machines_whose_clocks_differ_are_set_side_by_side() -> None:
    here = idle_time([rank(11), rank(5, ((6, 8),))])
    elsewhere = idle_time([rank(11), rank(5, ((6, 8),), clock=1e6)])
    assert elsewhere.idle_seconds == pytest.approx(here.idle_seconds)
    assert elsewhere.trained_seconds == pytest.approx(here.trained_seconds)
    assert elsewhere.rank_seconds == pytest.approx(here.rank_seconds)


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
