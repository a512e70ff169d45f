"""Averages over real ranks, against the definition in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fastrl.rollout.drafters.averaging import (
    average_over_ranks,
    check_same_on_all_ranks,
    checksum,
    gather_numbers,
)
from tests.rollout.ranks import raised, run_ranks

SHAPES = {"fc": (7, 5), "norm": (5,), "head": (3, 2, 4), "bias": (1,)}


def weights_of(rank: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def averaged(num_steps: list[int], bucket_numbers: int) -> dict[str, object]:
    rank = dist.get_rank()
    weights = weights_of(rank)
    optimizer_state = weights["fc"].clone()
    total = average_over_ranks(weights, num_steps[rank], bucket_numbers=bucket_numbers)
    assert torch.equal(optimizer_state, weights_of(rank)["fc"])
    return {"weights": weights, "total": total}


@pytest.mark.parametrize(
    ("num_steps", "bucket_numbers"),
    [([3, 1, 0, 4], 1000), ([3, 1, 0, 4], 8), ([0, 0, 5, 0], 1), ([1, 1, 1, 1], 35)],
)
def test_the_average_is_its_definition_and_the_same_bits_on_all_ranks(
    tmp_path: Path, num_steps: list[int], bucket_numbers: int
) -> None:
    """Whatever fits a bucket; a rank without steps ends with it too."""
    ranks = run_ranks(averaged, tmp_path, num_steps, bucket_numbers, num_ranks=4)
    total = sum(num_steps)
    for name in SHAPES:
        expected = torch.zeros(SHAPES[name], dtype=torch.float64)
        for rank, steps in enumerate(num_steps):
            expected += weights_of(rank)[name].double() * steps / total
        for rank in ranks:
            assert rank["total"] == total
            torch.testing.assert_close(
                rank["weights"][name].double(), expected, rtol=1e-6, atol=1e-6
            )
            assert torch.equal(rank["weights"][name], ranks[0]["weights"][name])
    if num_steps == [0, 0, 5, 0]:
        assert torch.equal(ranks[0]["weights"]["fc"], weights_of(2)["fc"])


def test_without_steps_nothing_changes(tmp_path: Path) -> None:
    ranks = run_ranks(averaged, tmp_path, [0, 0], 8)
    for number, rank in enumerate(ranks):
        assert rank["total"] == 0
        assert all(torch.equal(rank["weights"][n], w) for n, w in weights_of(number).items())


def test_a_process_alone_keeps_its_own() -> None:
    weights = weights_of(0)
    assert average_over_ranks(weights, 3) == 3
    assert all(torch.equal(weights[name], weight) for name, weight in weights_of(0).items())


def checked_with_one_bit_off() -> tuple[str, str]:
    weights = weights_of(0)
    check_same_on_all_ranks(weights)
    if dist.get_rank() == 1:
        weights["norm"].view(torch.int32)[3] ^= 1
    return raised(lambda: check_same_on_all_ranks(weights))


def test_one_bit_that_differs_is_named_on_all_ranks(tmp_path: Path) -> None:
    for kind, message in run_ranks(checked_with_one_bit_off, tmp_path):
        assert kind == "RuntimeError"
        assert "the drafter's norm on ranks [1] is not that of rank 0" in message


def test_a_checksum_tells_bits_and_their_places() -> None:
    numbers = torch.randn(1000)
    swapped = numbers.clone()
    swapped[[3, 700]] = swapped[[700, 3]]
    assert checksum(numbers) == checksum(numbers.clone().view(10, 100))
    assert checksum(numbers) != checksum(swapped)
    assert checksum(torch.zeros(3)) != checksum(-torch.zeros(3))


def gathered() -> tuple[list, list]:
    rank = dist.get_rank()
    return (
        gather_numbers([rank + 0.25, 1e-300], torch.device("cpu")).tolist(),
        gather_numbers([rank - (1 << 62)], torch.device("cpu")).tolist(),
    )


def test_numbers_are_gathered_in_order_and_whole(tmp_path: Path) -> None:
    for reals, integers in run_ranks(gathered, tmp_path):
        assert reals == [[0.25, 1e-300], [1.25, 1e-300]]
        assert integers == [[-(1 << 62)], [1 - (1 << 62)]]
