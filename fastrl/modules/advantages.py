"""Advantages of whole responses from their rewards: how much better than the baseline each one was.

Pure functions, tensors in, tensors out, computed in float64 (so that equal rewards give exactly no
advantage) and returned in float32. Leaves out advantages by token (a critic's, GAE).
Shape legend: fastrl/types.py.

Sources: GRPO (Shao et al. 2024, arXiv 2402.03300, section 4.1.2); Dr.GRPO, which leaves out the
standard deviation (Liu et al. 2025, arXiv 2503.20783); leave-one-out baseline (Kool et al. 2019;
Ahmadian et al. 2024, arXiv 2402.14740).
"""

from __future__ import annotations

import torch
from torch import Tensor


def group_normalized_advantages(
    rewards_B: Tensor, group_B: Tensor, *, normalize_std: bool = True, eps: float = 1e-6
) -> Tensor:
    """GRPO: (reward - group mean) / (group standard deviation + eps), [B] float32.

    Args:
        rewards_B: [B] float.
        group_B: [B] int64, rows of one prompt share a number.
        normalize_std: divide by the standard deviation; without it this is Dr.GRPO's advantage. The
            standard deviation is the sample one: its denominator is the group's size - 1.
        eps: added to the standard deviation.

    Raises:
        ValueError: a group of fewer than two rows, which has no baseline.
    """
    sizes_G = _checked_group_sizes(group_B)
    rewards_B = rewards_B.double()
    centered_B = rewards_B - (_group_sum(rewards_B, group_B) / sizes_G.clamp(min=1))[group_B]
    if normalize_std:
        variance_G = _group_sum(centered_B.square(), group_B) / (sizes_G - 1).clamp(min=1)
        centered_B = centered_B / (variance_G.sqrt()[group_B] + eps)
    return centered_B.float()


def leave_one_out_advantages(rewards_B: Tensor, group_B: Tensor) -> Tensor:
    """Reward minus the mean reward of the group's *other* rows, [B] float32.

    Raises:
        ValueError: a group of fewer than two rows, which has no other rows.
    """
    sizes_G = _checked_group_sizes(group_B)
    rewards_B = rewards_B.double()
    others_B = _group_sum(rewards_B, group_B)[group_B] - rewards_B
    return (rewards_B - others_B / (sizes_G[group_B] - 1)).float()


def batch_mean_advantages(rewards_B: Tensor, rewards_of_batch: Tensor) -> Tensor:
    """Reward minus the mean reward of the batch, [B] float32.

    Args:
        rewards_B: [B] float, of this rank's rows.
        rewards_of_batch: those of all ranks' rows, in any order.
    """
    return (rewards_B.double() - rewards_of_batch.double().mean()).float()


def _group_sum(values_B: Tensor, group_B: Tensor) -> Tensor:
    """Sum by group, [G]."""
    return values_B.new_zeros(int(group_B.max()) + 1).index_add(0, group_B, values_B)


def _checked_group_sizes(group_B: Tensor) -> Tensor:
    """Rows by group, [G] int64 (0 for unused numbers); raises where a group has a single row."""
    sizes_G = torch.bincount(group_B)
    if (sizes_G == 1).any():
        raise ValueError(
            "group_size must be >= 2 to form a baseline, got 1; set data.group_size, or use "
            "fastrl.modules.Reinforce with baseline: batch_mean"
        )
    return sizes_G
