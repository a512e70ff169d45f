"""Figures of a drafter gone bad, on made-up steps whose paces are known."""

from dataclasses import replace

import pytest
from bad_drafter_figures import (
    BAD,
    GOOD,
    MIN_JUDGED_STEPS,
    NUM_GRACE_STEPS,
    PHASES,
    RECOVERED,
    BucketOfRound,
    Pace,
    Round,
    all_steps,
    buckets_of_round,
    by_live_batch,
    figures,
    quartiles,
)

from fastrl.types import OFF, DraftStrategy, StepStats

TREE = DraftStrategy.parse("2_1_3")
OFF_SECONDS = {1: 0.004, 2: 0.005, 3: 0.006, 4: 0.007}
THRESHOLDS = (1, 2, 5)


def step(strategy: DraftStrategy, seconds: float, batch_size: int, accept: int = 1) -> StepStats:
    return StepStats(
        strategy=strategy,
        batch_size=batch_size,
        context_tokens=10,
        accept_lengths=(accept,) * batch_size,
        seconds=seconds,
    )


def plain(batch_size: int, count: int) -> list[StepStats]:
    return [step(OFF, OFF_SECONDS[batch_size], batch_size) for _ in range(count)]


def shown(round_: Round) -> dict[int, BucketOfRound]:
    """Of the round alone."""
    return buckets_of_round(round_, list(all_steps(round_)), THRESHOLDS)


def made_up(bad: list[StepStats], recovered: list[StepStats]) -> Round:
    """Speculation at twice plain decoding's step time and four tokens a row: a ratio of two."""
    good = [step(TREE, 2 * OFF_SECONDS[size], size, accept=4) for size in (4, 3, 2) * 20]
    return Round(
        steps={GOOD: good, BAD: bad, RECOVERED: recovered},
        off_steps={
            phase: [one for size in OFF_SECONDS for one in plain(size, 3)] for phase in PHASES
        },
        alarm_step=3,
        exclusion_step=None,
    )


def test_a_step_is_held_against_plain_steps_that_emit_its_tokens_at_its_live_batch():
    """Two tokens a row in a step of plain decoding's time is twice its pace, at any batch."""
    bad = [step(TREE, OFF_SECONDS[size], size, accept=2) for size in (4, 2) * 30]
    (bucket,) = shown(made_up(bad, bad)).values()
    assert bucket.good_ratio == pytest.approx(2.0)
    assert bucket.back_ratio == pytest.approx(2.0)
    assert bucket.back_ratio_of_medians == pytest.approx(2.0)
    assert bucket.recovery == pytest.approx(1.0)
    assert bucket.speculation_share == 1.0


def test_a_machine_that_slows_down_between_phases_is_not_taken_for_the_bandits_doing():
    """From one phase on everything takes a fifth longer, plain decoding and the same choices."""
    usual = made_up(plain(2, 60), plain(2, 60))
    for phase in (BAD, RECOVERED):
        slow = [replace(one, seconds=1.2 * one.seconds) for one in plain(2, 60)]
        drifted = replace(
            usual,
            steps={**usual.steps, phase: slow},
            off_steps={**usual.off_steps, phase: slow},
        )
        bucket = shown(drifted)[2]
        assert bucket.back_ratio == pytest.approx(1.0)
        assert bucket.recovery == pytest.approx(0.5)


def test_only_steps_after_those_of_grace_are_judged():
    lost = [step(TREE, 0.015, 2) for _ in range(NUM_GRACE_STEPS)]
    lost_and_found = lost + plain(2, 40)
    (figure,) = figures("silent", 4, [made_up(lost_and_found, lost_and_found)], THRESHOLDS)
    assert figure.bucket == 2
    values = figure.rounds
    assert values["back_ratio"][1] == pytest.approx(1.0)
    assert values["lost_seconds"][1] == pytest.approx(NUM_GRACE_STEPS * (0.015 - 0.005))
    assert values["num_bad_steps"] == (60, 60, 60)
    assert values["speculation_share"] == (0, 0, 0)
    assert values["recovery"][1] == pytest.approx(0.5)
    assert (figure.is_back, figure.is_recovered) == (True, False)
    late = lost + plain(2, 40) + [step(TREE, 0.015, 2)] * 2
    assert not figures("silent", 4, [made_up(late, late)], THRESHOLDS)[0].is_back


def test_steps_until_back_are_those_before_the_first_stretch_that_is_back():
    seconds = [3.0, 1.5, 1.0, 2.0, *[1.0] * 30, 1.1, 1.2]
    pace = Pace(seconds=seconds, off_seconds=[1.0] * len(seconds))
    by_hand = {0.8: 0, 0.9: 1, 0.97: 4, 1.0: 4, 1.01: None}
    for ratio, expected in by_hand.items():
        stretches = [seconds[k : k + 20] for k in range(len(seconds)) if k + 20 <= len(seconds)]
        back = [k for k, stretch in enumerate(stretches) if 20 / sum(stretch) >= ratio]
        assert pace.steps_until(ratio) == (min(back) if back else None) == expected
    assert Pace(seconds=[1.0], off_seconds=[1.0]).steps_until(0.97) is None


def test_a_hiccup_shows_in_wall_time_and_not_in_medians():
    bad = plain(2, 60)
    bad[40] = step(OFF, 0.5, 2)
    bucket = shown(made_up(bad, bad))[2]
    assert bucket.back_ratio < 0.5
    assert bucket.back_ratio_of_medians == pytest.approx(1.0)
    assert bucket.steps_until_back == 0


def test_medians_are_over_rounds_so_that_a_slow_one_counts_no_more_than_its_choices():
    """In the third round everything takes twice as long; what it chose is what the others did."""
    bad = [step(TREE, 0.01, 2) for _ in range(20)] + plain(2, 40)
    rounds = [made_up(bad, bad) for _ in range(3)]
    slow = [replace(one, seconds=2 * one.seconds) for one in bad]
    rounds[2] = replace(rounds[2], steps={**rounds[2].steps, BAD: slow, RECOVERED: slow})
    (figure,) = figures("silent", 4, rounds, THRESHOLDS)
    assert figure.rounds["back_ratio"] == pytest.approx((0.5, 1.0, 1.0))
    assert figure.rounds["back_ratio_of_medians"] == pytest.approx((1.0, 1.0, 1.0))


def test_a_bucket_with_few_steps_in_a_phase_is_not_judged():
    enough = NUM_GRACE_STEPS + MIN_JUDGED_STEPS
    assert 2 in shown(made_up(plain(3, enough), plain(4, enough)))
    few = made_up(plain(3, enough) + plain(1, enough), plain(4, enough - 1) + plain(1, enough))
    assert not shown(few)
    assert figures("silent", 4, [few], THRESHOLDS) == []


def test_plain_steps_between_live_batches_that_occurred_are_interpolated():
    cost = by_live_batch([*plain(1, 2), *plain(4, 1)], lambda seconds: sum(seconds) / len(seconds))
    assert cost(3) == pytest.approx(0.004 + 2 / 3 * 0.003)
    assert cost(9) == pytest.approx(0.007)


def test_quartiles_are_rounds_values_and_never_stands_last():
    assert quartiles([3]) == (3, 3, 3)
    assert quartiles([5, 1, 4, 2, 3]) == (2, 3, 4)
    assert quartiles([4, 1, 3, 2]) == (1, 2, 4)
    assert quartiles([None, 0, 7]) == (0, 7, None)
    assert quartiles([None, 9, None, None, None]) == (None, None, None)


def test_every_figure_of_a_round_has_quartiles():
    rounds = [made_up(plain(2, 50), plain(2, 50)), made_up(plain(2, 60), plain(2, 60))]
    (figure,) = figures("in_run", 4, rounds, THRESHOLDS)
    assert set(figure.rounds) == set(BucketOfRound.__annotations__)
    assert figure.rounds["exclusion_step"] == (None, None, None)
    assert figure.num_rounds == 2
