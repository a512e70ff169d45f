"""Mini-batches and micro-batches: every row once, the budget kept, no token lost."""

import random

import pytest
import torch

from fastrl.modules.micro_batches import (
    TrainingRows,
    common_numbers,
    split_further,
    split_micro_batches,
    split_mini_batches,
)


@pytest.mark.parametrize("seed", range(20))
def test_micro_batches_cover_each_row_once_within_the_budget(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.randint(1, 60) for _ in range(rng.randint(1, 40))]
    rows = rng.sample(range(len(lengths)), rng.randint(1, len(lengths)))
    budget = rng.randint(1, 200)
    micro_batches = split_micro_batches(rows, lengths, budget)
    assert sorted(row for members in micro_batches for row in members) == sorted(rows)
    for members in micro_batches:
        padded = len(members) * max(lengths[row] for row in members)
        assert padded <= budget or len(members) == 1


def test_micro_batches_by_hand() -> None:
    # 50 alone is over the budget; 20 * 2 = 40; a third row of 20 would be 60.
    assert split_micro_batches([0, 1, 2, 3, 4], [20, 50, 3, 18, 20], 40) == [[1], [0, 4], [3, 2]]


def test_micro_batches_are_halved_until_there_are_as_many_as_on_another_rank() -> None:
    assert split_further([[4, 1], [0, 2, 3]], 2) == [[4, 1], [0, 2, 3]]
    assert split_further([[4, 1], [0, 2, 3]], 4) == [[4], [1], [0], [2, 3]]
    assert split_further([[4, 1], [0, 2, 3]], 5) == [[4], [1], [0], [2], [3]]


def test_ranks_make_as_many_micro_batches_as_the_one_with_the_most() -> None:
    first = [[[0, 1, 2]], [[3], [4]]]
    second = [[[0], [2], [1]], [[3, 4]]]
    assert common_numbers([first]) == [1, 2]
    assert common_numbers([first, second]) == common_numbers([second, first]) == [3, 2]


def test_ranks_whose_rows_cannot_be_split_alike_are_refused_whichever_asks() -> None:
    few, many = [[[0, 1]], [[2, 3]]], [[[0, 1]], [[2], [3], [4]]]
    expected = r"mini-batch 1: one rank splits its rows into 3 .* but the ranks have \[2, 3\] rows"
    with pytest.raises(ValueError, match=expected):
        common_numbers([few, many])
    with pytest.raises(ValueError, match=r"into \[2, 1\] mini-batches \(by rank\)"):
        common_numbers([few, few[:1]])


def test_mini_batches_are_consecutive_and_even() -> None:
    assert split_mini_batches(7, 3) == [range(0, 2), range(2, 4), range(4, 7)]
    assert split_mini_batches(8, 2) == [range(0, 4), range(4, 8)]


def test_more_mini_batches_than_rows_is_an_error() -> None:
    with pytest.raises(ValueError, match="got 5 for 4 rows"):
        split_mini_batches(4, 5)


def test_taking_rows_trims_padding_only() -> None:
    tokens_BT = torch.arange(1, 13).view(3, 4)
    rows = TrainingRows(
        tokens_BT=tokens_BT,
        response_mask_BT=tokens_BT > 2,
        lengths=(4, 2, 3),
        weights_BT=tokens_BT / 10,
        advantages_BT=tokens_BT * 2.0,
        rollout_logprobs_BT=-tokens_BT.float(),
        reference_logprobs_BT=tokens_BT + 0.5,
    )
    taken = rows.take([2, 1])
    assert taken.tokens_BT.tolist() == [[9, 10, 11], [5, 6, 7]]
    assert taken.lengths == (3, 2)
    assert taken.reference_logprobs_BT is not None
    assert taken.reference_logprobs_BT.tolist() == [[9.5, 10.5, 11.5], [5.5, 6.5, 7.5]]
    assert taken.old_logprobs_BT is None
    for name in ("response_mask_BT", "weights_BT", "advantages_BT", "rollout_logprobs_BT"):
        assert torch.equal(getattr(taken, name), getattr(rows, name)[[2, 1], :3])
