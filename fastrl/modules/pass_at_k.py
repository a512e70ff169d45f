"""pass@k: the chance that at least one of k responses to a prompt passes. Pure.

The unbiased estimate from n >= k responses of which c pass is 1 - C(n - c, k) / C(n, k): the share
of all sets of k among them that hold a pass (Chen et al. 2021, arXiv 2107.03374, equation 1).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """The unbiased estimate for one prompt, in [0, 1], for 1 <= k <= num_samples."""
    assert 1 <= k <= num_samples, f"pass@{k} needs as many samples, got {num_samples}"
    assert 0 <= num_passed <= num_samples, f"{num_passed} of {num_samples} samples cannot pass"
    return 1 - math.comb(num_samples - num_passed, k) / math.comb(num_samples, k)


def mean_pass_at_k(is_passed_B: Tensor, group_B: Tensor) -> dict[int, float]:
    """By k (1, 2, 4, … up to the smallest group's number of rows), the mean over prompts.

    Args:
        is_passed_B: bool, which responses pass.
        group_B: int64, rows of one prompt share a number, 0 … num_prompts - 1.
    """
    num_samples = torch.bincount(group_B).tolist()
    num_passed = torch.bincount(group_B[is_passed_B], minlength=len(num_samples)).tolist()
    counts = list(zip(num_samples, num_passed, strict=True))
    powers = [1 << exponent for exponent in range(min(num_samples).bit_length())]
    return {k: sum(pass_at_k(n, c, k) for n, c in counts) / len(counts) for k in powers}
