"""pass@k against the enumeration of all sets of k responses; its mean over prompts by hand."""

from itertools import combinations

import pytest
import torch

from fastrl.modules.pass_at_k import mean_pass_at_k, pass_at_k


@pytest.mark.parametrize("num_samples", range(1, 8))
def test_it_is_the_share_of_all_sets_of_k_that_hold_a_pass(num_samples: int) -> None:
    for num_passed in range(num_samples + 1):
        is_passed = [index < num_passed for index in range(num_samples)]
        for k in range(1, num_samples + 1):
            sets = list(combinations(is_passed, k))
            expected = sum(map(any, sets)) / len(sets)
            assert pass_at_k(num_samples, num_passed, k) == pytest.approx(expected, abs=1e-12)


def test_large_groups_neither_overflow_nor_lose_the_rare_pass() -> None:
    assert pass_at_k(4096, 1, 1024) == pytest.approx(0.25, rel=1e-12)


def test_its_mean_is_over_prompts_by_powers_of_two_that_every_prompt_allows() -> None:
    group_B = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
    is_passed_B = torch.tensor([1, 0, 0, 0, 0, 1, 0, 1, 1, 0, 0]).bool()
    assert mean_pass_at_k(is_passed_B, group_B) == {
        1: pytest.approx((1 / 5 + 3 / 6) / 2),
        2: pytest.approx((4 / 10 + 12 / 15) / 2),
        4: pytest.approx((4 / 5 + 15 / 15) / 2),
    }


def test_prompts_that_none_or_all_pass_count_too() -> None:
    group_B = torch.tensor([0, 0, 1, 1, 2, 2])
    assert mean_pass_at_k(torch.tensor([0, 0, 1, 1, 0, 0]).bool(), group_B) == {
        1: pytest.approx(1 / 3),
        2: pytest.approx(1 / 3),
    }
    assert mean_pass_at_k(torch.zeros(6, dtype=torch.bool), group_B) == {1: 0, 2: 0}


def test_more_than_there_are_samples_is_refused() -> None:
    with pytest.raises(AssertionError, match="pass@3 needs as many samples, got 2"):
        pass_at_k(2, 1, 3)
