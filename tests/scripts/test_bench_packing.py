"""Packed against padded training: the same loss, and what padding is."""

import bench_packing
import pytest
import torch
from bench_packing import LAYOUTS, Bench, draw_sequences, padded_row_each, run

from tests.rollout.tiny_models import make_target


@pytest.fixture
def bench(tmp_path):
    make_target(tmp_path / "target")
    return Bench(
        model=str(tmp_path / "target"),
        num_sequences=6,
        median_tokens=12,
        longest_tokens=60,
        prompt_tokens=3,
        num_depths=2,
        rounds=3,
        device="cpu",
    )


def test_both_ways_take_the_same_steps_and_are_timed(bench, capsys):
    figures = run(bench)
    assert figures.packed_per_s > 0
    assert figures.padded_per_s > 0
    assert figures.spread[0] <= figures.ratio <= figures.spread[1]
    assert 0 < figures.filled_share < 1
    assert "sequences a second" in capsys.readouterr().out


def test_a_way_that_computes_another_loss_is_an_error(bench, monkeypatch):
    monkeypatch.setitem(LAYOUTS, "padded", lambda some: padded_row_each(some[1:]))
    with pytest.raises(RuntimeError, match="different losses"):
        run(bench)


def test_lengths_are_long_tailed_and_bounded(bench):
    generator = torch.Generator().manual_seed(0)
    sequences = [one for _ in range(50) for one in draw_sequences(bench, 40, 4, generator)]
    lengths = sorted(len(one) for one in sequences)
    assert lengths[0] > 3
    assert 40 < lengths[-1] <= 60
    assert 10 <= lengths[len(lengths) // 2] <= 15
    assert sum(lengths) / len(lengths) > lengths[len(lengths) // 2] + 1


def test_padded_rows_have_a_sequence_each(bench):
    sequences = draw_sequences(bench, 40, 4, torch.Generator().manual_seed(0))
    padded = padded_row_each(sequences)
    assert padded.segment_BT.shape == (6, max(map(len, sequences)) - 2)
    for row, features in enumerate(sequences):
        num_pairs = len(features) - 2
        assert padded.segment_BT[row, :num_pairs].eq(0).all()
        assert padded.segment_BT[row, num_pairs:].eq(-1).all()
        assert not padded.loss_mask_BT[row, num_pairs:].any()
    assert bench_packing.packed_rows(sequences).segment_BT.numel() < padded.segment_BT.numel()
