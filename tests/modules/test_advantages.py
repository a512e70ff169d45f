"""Advantages against hand-worked numbers and a naive float64 loop."""

import random
import statistics

import pytest
import torch

from fastrl.modules.advantages import (
    batch_mean_advantages,
    group_normalized_advantages,
    leave_one_out_advantages,
)


def random_groups(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Groups of 2 to 6 rows, interleaved."""
    rng = random.Random(seed)
    groups = [g for g in range(5) for _ in range(rng.randint(2, 6))]
    rng.shuffle(groups)
    rewards = [rng.choice([0.0, 0.5, 1.0, rng.gauss(0, 3)]) for _ in groups]
    return torch.tensor(rewards), torch.tensor(groups)


def naive(rewards: list[float], groups: list[int], normalize_std: bool) -> list[float]:
    result = []
    for reward, group in zip(rewards, groups, strict=True):
        peers = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        centered = reward - statistics.fmean(peers)
        result.append(centered / (statistics.stdev(peers) + 1e-6) if normalize_std else centered)
    return result


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("normalize_std", [True, False])
def test_group_advantages_equal_a_naive_loop(seed: int, normalize_std: bool) -> None:
    rewards_B, group_B = random_groups(seed)
    advantages_B = group_normalized_advantages(rewards_B, group_B, normalize_std=normalize_std)
    expected = naive(rewards_B.tolist(), group_B.tolist(), normalize_std)
    torch.testing.assert_close(advantages_B, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_group_advantages_by_hand() -> None:
    # Group 0: mean 2, deviations -1, 0, 1, sample variance 1. Group 1: mean 1/2, variance 1/2.
    advantages_B = group_normalized_advantages(
        torch.tensor([1.0, 0.0, 2.0, 3.0, 1.0]), torch.tensor([0, 1, 0, 0, 1])
    )
    expected = torch.tensor([-1.0, -(0.5**0.5), 0.0, 1.0, 0.5**0.5])
    torch.testing.assert_close(advantages_B, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reward", [0.1, 1 / 3, 0.7])
def test_equal_rewards_give_exactly_no_advantage(reward: float) -> None:
    rewards_B, group_B = torch.full((7,), reward), torch.zeros(7, dtype=torch.int64)
    assert group_normalized_advantages(rewards_B, group_B).abs().max() < 1e-9


def test_leave_one_out_by_hand_and_in_proportion_to_the_centered_reward() -> None:
    rewards_B, group_B = torch.tensor([1.0, 0.0, 5.0, 2.0, 6.0]), torch.tensor([0, 0, 1, 0, 1])
    advantages_B = leave_one_out_advantages(rewards_B, group_B)
    assert advantages_B.tolist() == [1 - 1, 0 - 1.5, 5 - 6, 2 - 0.5, 6 - 5]
    centered_B = group_normalized_advantages(rewards_B, group_B, normalize_std=False)
    sizes_B = torch.tensor([3.0, 3.0, 2.0, 3.0, 2.0])
    torch.testing.assert_close(advantages_B, centered_B * sizes_B / (sizes_B - 1))


def test_batch_mean_by_hand() -> None:
    rewards = torch.tensor([0.0, 1.0, 5.0])
    assert batch_mean_advantages(rewards, rewards).tolist() == [-2.0, -1.0, 3.0]
    assert batch_mean_advantages(rewards[1:], rewards).tolist() == [-1.0, 3.0]


@pytest.mark.parametrize("advantages", [group_normalized_advantages, leave_one_out_advantages])
def test_a_group_of_one_row_is_an_error_with_its_cure(advantages: object) -> None:
    assert callable(advantages)
    with pytest.raises(ValueError, match=r"got 1; set data\.group_size, or use .*Reinforce"):
        advantages(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0, 0, 1]))
