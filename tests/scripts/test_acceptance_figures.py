"""Counts of the acceptance report: small cases by hand, parts against the whole."""

import json

import pytest
import torch
from acceptance_figures import (
    KS,
    Part,
    PlaceCounts,
    RankCounts,
    bucket,
    depth_figures,
    length_figures,
    steps_with_places,
    topk_figures,
)
from acceptance_report import Report, draw, print_report, write_json

from fastrl.types import DraftStrategy, EngineStats, FinishReason, Rollout, StepStats
from tests.rollout.tiny_models import make_prompts


def rollout(*accept_lengths: int) -> Rollout:
    (prompt,) = make_prompts(1)
    num_tokens = 1 + sum(accept_lengths)
    return Rollout(
        prompt=prompt,
        sample_index=0,
        tokens=(3,) * num_tokens,
        logprobs=(0.0,) * num_tokens,
        text="",
        finish_reason=FinishReason.LENGTH,
        policy_version=0,
        accept_lengths=accept_lengths,
    )


def step(*rows: tuple[int, tuple[int, ...], tuple[int, ...]]) -> StepStats:
    """Of rows by place, accepted ranks, and children of the nodes that they got to."""
    places, ranks, num_children = zip(*rows, strict=True)
    return StepStats(
        strategy=DraftStrategy.parse("2_2_5"),
        batch_size=len(rows),
        context_tokens=10,
        accept_lengths=tuple(1 + len(accepted) for accepted in ranks),
        seconds=1.0,
        places=places,
        ranks_by_row=ranks,
        num_children_by_row=num_children,
    )


STEPS = {
    "sums": [
        step((1, (0, 1), (2, 2)), (1, (), (2,)), (6, (1,), (2, 1))),
        step((2, (), (1,)), (7, (), (2,))),
    ],
    "words": [step((1, (0,), (2, 0)))],
}
"""By task; the last row accepted a node without children."""


def counted(steps: dict[str, list[StepStats]]) -> RankCounts:
    counts = RankCounts()
    for task, of_task in steps.items():
        counts.task = task
        for one in of_task:
            counts.add(one)
    return counts


def test_buckets_are_powers_of_two():
    edges = [bucket(place) for place in (1, 2, 3, 4, 7, 8, 1023, 1024)]
    assert edges == [
        *((1, 1), (2, 3), (2, 3), (4, 7)),
        *((4, 7), (8, 15), (512, 1023), (1024, 2047)),
    ]


def test_a_steps_place_is_its_first_token():
    """Token 0 is the prefill's; the steps emit tokens 1-3, 4, 5-6."""
    assert list(steps_with_places(rollout(3, 1, 2))) == [(1, 3), (4, 1), (5, 2)]


def test_accept_lengths_of_a_case_by_hand():
    figures = length_figures(
        "4_2_8", {"sums": [rollout(3, 1, 2), rollout(1)], "words": [rollout(4)]}
    )
    found = {figure.part: (figure.num_tokens, figure.num_steps) for figure in figures}
    assert found == {
        Part(): (11, 5),
        Part(task="sums"): (7, 4),
        Part(task="words"): (4, 1),
        Part(places=(1, 1)): (8, 3),
        Part(places=(4, 7)): (3, 2),
    }
    assert [figure.part for figure in figures] == list(found)  # the order of the tables
    assert figures[0].accept_length == 2.2
    assert [part.name for part in found] == ["all", "sums", "words", "1", "4-7"]


def test_parts_add_up_to_the_whole():
    generator = torch.Generator().manual_seed(0)
    by_task = {
        task: [
            rollout(*torch.randint(1, 6, (1 + 9 * index,), generator=generator).tolist())
            for index in range(6)
        ]
        for task in ("a", "b", "c")
    }
    whole, *parts = length_figures("4_2_8", by_task)
    assert whole.part == Part()
    for is_of_kind in (lambda part: part.task is not None, lambda part: part.places is not None):
        chosen = [figure for figure in parts if is_of_kind(figure.part)]
        assert sum(figure.num_steps for figure in chosen) == whole.num_steps
        assert sum(figure.num_tokens for figure in chosen) == whole.num_tokens
    responses = [one for rollouts in by_task.values() for one in rollouts]
    assert whole.num_tokens == sum(len(one.tokens) - 1 for one in responses)


def test_ranks_of_a_case_by_hand():
    figures = counted(STEPS).figures("2_2_5")
    found = {(f.part, f.depth, f.rank): (f.num_offered, f.num_accepted) for f in figures}
    sums, words = Part(task="sums"), Part(task="words")
    first, second, later = Part(places=(1, 1)), Part(places=(2, 3)), Part(places=(4, 7))
    assert found == {
        **{(Part(), 1, 1): (6, 2), (Part(), 1, 2): (5, 1)},
        **{(Part(), 2, 1): (2, 0), (Part(), 2, 2): (1, 1)},
        **{(sums, 1, 1): (5, 1), (sums, 1, 2): (4, 1)},
        **{(sums, 2, 1): (2, 0), (sums, 2, 2): (1, 1)},
        **{(words, 1, 1): (1, 1), (words, 1, 2): (1, 0)},
        **{(first, 1, 1): (3, 2), (first, 1, 2): (3, 0)},
        **{(first, 2, 1): (1, 0), (first, 2, 2): (1, 1)},
        (second, 1, 1): (1, 0),
        **{(later, 1, 1): (2, 0), (later, 1, 2): (2, 1), (later, 2, 1): (1, 0)},
    }
    assert list(dict.fromkeys(f.part for f in figures)) == [
        *(Part(), sums, words, first, second, later)
    ]
    assert figures[0].rate == 1 / 3


def test_depths_by_place_of_a_case_by_hand():
    """A depth is offered to a row that got there, whether or not its node had a child."""
    figures = counted(STEPS).by_place.figures("2_2_5")
    found = {(f.part.places, f.depth): (f.num_offered, f.num_accepted) for f in figures}
    assert found == {
        **{((1, 1), 1): (3, 2), ((1, 1), 2): (2, 1)},
        ((2, 3), 1): (1, 0),
        **{((4, 7), 1): (2, 1), ((4, 7), 2): (1, 0)},
    }


def test_depths_by_place_of_an_engine_that_tells_no_rows_leave_ends_out():
    """Steps emit tokens 1-3, 4 and 5-6, with which the response ends, a draft or not."""
    figures = PlaceCounts.of_rollouts([rollout(3, 1, 2)], depth=2).figures("2_2_5")
    found = {(f.part.places, f.depth): (f.num_offered, f.num_accepted) for f in figures}
    assert found == {
        **{((1, 1), 1): (1, 1), ((1, 1), 2): (1, 1)},
        ((4, 7), 1): (2, 1),
    }


def test_depths_add_up_over_the_calls_of_tasks():
    calls = {
        "sums": EngineStats(offered_by_depth=(10, 6, 0), accepted_by_depth=(6, 0, 0)),
        "words": EngineStats(offered_by_depth=(5, 2, 1), accepted_by_depth=(2, 1, 1)),
    }
    found = [
        (f.part.task, f.depth, f.num_offered, f.num_accepted) for f in depth_figures("3_1_4", calls)
    ]
    assert found == [
        *((None, 1, 15, 8), (None, 2, 8, 1), (None, 3, 1, 1)),
        *(("sums", 1, 10, 6), ("sums", 2, 6, 0)),
        *(("words", 1, 5, 2), ("words", 2, 2, 1), ("words", 3, 1, 1)),
    ]


def test_topk_accuracy_of_a_case_by_hand():
    """Depth 1 drafts tokens 1 to 3 of the response, depth 2 tokens 2 and 3."""
    ranks = {"sums": [[torch.tensor([0, 5, 1]), torch.tensor([3, 0])]]}
    figures = topk_figures(ranks)
    counts = {(f.part, f.depth, f.k): (f.num_hits, f.num_tokens) for f in figures}
    assert [counts[Part(), 1, k] for k in KS] == [(1, 3), (2, 3), (2, 3), (3, 3)]
    assert [counts[Part(), 2, k] for k in KS] == [(1, 2), (1, 2), (2, 2), (2, 2)]
    assert [counts[Part(places=(2, 3)), 1, k] for k in KS] == [(0, 2), (1, 2), (1, 2), (2, 2)]
    assert counts[Part(places=(1, 1)), 2, 1] == (0, 1)  # by the place of the chain's first draft
    for depth in (1, 2):
        for k in KS:
            buckets = [f for f in figures if f.part.places and (f.depth, f.k) == (depth, k)]
            assert sum(f.num_tokens for f in buckets) == counts[Part(), depth, k][1]
            assert sum(f.num_hits for f in buckets) == counts[Part(), depth, k][0]


def test_tables_and_files_say_what_was_counted(tmp_path, capsys):
    counts = counted(STEPS)
    calls = {
        "sums": EngineStats(offered_by_depth=(5, 2), accepted_by_depth=(2, 1)),
        "words": EngineStats(offered_by_depth=(1, 1), accepted_by_depth=(1, 0)),
    }
    report = Report(
        subject={"model": "m"},
        lengths=length_figures("2_2_5", {"sums": [rollout(3, 1, 2)]}),
        depths=[*depth_figures("2_2_5", calls), *counts.by_place.figures("2_2_5")],
        ranks=counts.figures("2_2_5"),
        topk=topk_figures({"sums": [[torch.tensor([0, 5, 1])]]}),
    )
    print_report(report)
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    for line in (
        *(["all", "2.00"], ["4-7", "1.50"], ["depth", "1", "0.500", "(6)"]),
        ["2_2_5:", "the", "same", "by", "task", "and", "by", "place", "in", "the", "response"],
        *(["sums", "0.400", "(5)", "0.500", "(2)"], ["words", "1.000", "(1)", "0.000", "(1)"]),
        *(["1", "0.667", "(3)", "0.500", "(2)"], ["2-3", "0.000", "(1)", "-"]),
        ["depth", "2", "0.000", "1.000"],
        ["all,", "depth", "1", "0.333", "0.667", "0.667", "1.000"],
    ):
        assert line in printed
    write_json(report, tmp_path / "report.json")
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["lengths"][0] == {
        **{"strategy": "2_2_5", "task": None, "places": None},
        **{"num_steps": 3, "num_tokens": 6, "accept_length": 2.0},
    }
    of_later = [entry for entry in written["ranks"] if entry["places"] == [4, 7]]
    assert [(entry["depth"], entry["rank"], entry["rate"]) for entry in of_later] == [
        *((1, 1, 0.0), (1, 2, 0.5), (2, 1, 0.0)),
    ]
    assert {entry["task"]: entry["rate"] for entry in written["depths"] if entry["depth"] == 1} == {
        **{"sums": 0.4, "words": 1.0},
        None: 0.5,  # that of the last place, which has no task either
    }
    assert written["topk"][0]["accuracy"] == pytest.approx(1 / 3)
    draw(report, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
