"""Idle training against none: what is drawn, compared, and said."""

import json
import statistics

import pytest
from bench_idle import Bench, Step, figures_of, lengths_of, run, trains_in


def test_a_tiny_run_trains_in_idle_time_alone_and_says_so(tmp_path, capsys):
    bench = Bench(
        num_ranks=2,
        num_pairs=2,
        responses_per_rank=2,
        longest_tokens=40,
        seconds_per_token=0.02,
        tokens_per_step=64,
        publish_every_n_steps=2,
        num_polls=10,
        json=tmp_path / "bench.json",
        seed=3,
    )
    figures = run(bench)
    steps = [Step(**one) for one in json.loads(bench.json.read_text())["steps"]]
    assert [one.pair for one in steps] == [0, 0, 1, 1, 2, 2]
    assert all(one.num_steps == 0 for one in steps if not one.trains)
    assert figures.drafter_steps == sum(one.num_steps for one in steps if one.pair)
    assert figures.drafter_steps > 0
    assert 0 < figures.used_share <= 1
    assert "generation is a sleep" in capsys.readouterr().out


def test_pairs_have_one_step_of_either_and_each_comes_first_as_often():
    assert [trains_in(step) for step in range(8)] == [True, False, False, True] * 2


def test_lengths_have_a_long_tail_and_are_those_of_the_pair():
    bench = Bench()
    lengths = [n for pair in range(20) for rank in range(4) for n in lengths_of(bench, pair, rank)]
    assert max(lengths) / statistics.median(lengths) >= 10
    assert 2 <= min(lengths) <= max(lengths) <= bench.longest_tokens
    assert lengths_of(bench, 1, 2) == lengths_of(bench, 1, 2) != lengths_of(bench, 1, 3)


def test_figures_are_over_pairs_and_leave_the_first_out():
    bench = Bench(num_ranks=2, num_pairs=2)

    def step(pair, trains, seconds, share=0.0, num_steps=0, overrun_s=0.0):
        return Step(
            pair=pair,
            trains=trains,
            seconds=seconds,
            rollout_s=seconds / 2,
            idle_s=2.0,
            used_share=share,
            num_steps=num_steps,
            overrun_s=overrun_s,
        )

    steps = [
        step(0, True, 99.0),
        step(0, False, 1.0),
        step(1, False, 4.0),
        step(1, True, 5.0, 0.5, 10, 0.1),
        step(2, True, 3.0, 1.0, 20, 0.3),
        step(2, False, 4.0),
    ]
    figures = figures_of(bench, steps, 1e-5)
    assert figures.step_ratio == pytest.approx((5 / 4 + 3 / 4) / 2)
    assert figures.rollout_ratio == figures.step_ratio
    assert figures.used_share == pytest.approx(0.75)
    assert figures.idle_share == pytest.approx(4.0 / (2 * 8.0))
    assert figures.micro_step_s == pytest.approx(3.0 / 30)
    assert (figures.overrun_s, figures.worst_overrun_s) == (pytest.approx(0.2), 0.3)
    assert figures.drafter_steps == 30
