"""The rows an RL step trains on, split into mini-batches and token-budgeted micro-batches.

A mini-batch is one optimizer step; a micro-batch is one forward and backward of it. Both splits
depend on the rows' order and lengths alone. Shape legend: fastrl/types.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRows:
    """What the update needs of each row; tensors are [B, T], right-padded, about the token at t."""

    tokens_BT: Tensor  # int64
    response_mask_BT: Tensor  # bool
    lengths: tuple[int, ...]  # prompt and response tokens, by row
    weights_BT: Tensor  # float32: of each token in its mini-batch's loss; 0 outside the response
    advantages_BT: Tensor  # float32
    rollout_logprobs_BT: Tensor  # float32: the engine's; compared, never part of a loss
    old_logprobs_BT: Tensor | None = None
    """Of the policy before the batch's first update; None with a single one: the current."""
    reference_logprobs_BT: Tensor | None = None
    """Of the reference model; None without KL regularization."""

    def take(self, rows: Sequence[int]) -> TrainingRows:
        """These rows, padded no further than the longest of them."""
        lengths = tuple(self.lengths[row] for row in rows)
        index = torch.tensor(rows, device=self.tokens_BT.device)

        def trimmed(values_BT: Tensor) -> Tensor:
            return values_BT[:, : max(lengths)].index_select(0, index)

        old, reference = self.old_logprobs_BT, self.reference_logprobs_BT
        return TrainingRows(
            tokens_BT=trimmed(self.tokens_BT),
            response_mask_BT=trimmed(self.response_mask_BT),
            lengths=lengths,
            weights_BT=trimmed(self.weights_BT),
            advantages_BT=trimmed(self.advantages_BT),
            rollout_logprobs_BT=trimmed(self.rollout_logprobs_BT),
            old_logprobs_BT=None if old is None else trimmed(old),
            reference_logprobs_BT=None if reference is None else trimmed(reference),
        )


def split_mini_batches(num_rows: int, num_mini_batches: int) -> list[range]:
    """Consecutive runs of rows, their sizes at most one apart (groups stay together if they can).

    Raises:
        ValueError: more mini-batches than rows.
    """
    if num_mini_batches > num_rows:
        raise ValueError(
            f"num_mini_batches must be <= the rows of a rollout batch (data.prompts_per_step * "
            f"data.group_size), got {num_mini_batches} for {num_rows} rows"
        )
    bounds = [num_rows * i // num_mini_batches for i in range(num_mini_batches + 1)]
    return [range(*pair) for pair in pairwise(bounds)]


def split_micro_batches(
    rows: Sequence[int], lengths: Sequence[int], max_tokens: int
) -> list[list[int]]:
    """Rows of a mini-batch, longest first, packed so that rows * longest <= max_tokens.

    Args:
        rows: row numbers of the mini-batch.
        lengths: tokens of each row of the whole batch.
        max_tokens: budget, padding included; a single row beyond it gets a micro-batch of its own.
    """
    micro_batches: list[list[int]] = []
    for row in sorted(rows, key=lambda row: -lengths[row]):
        if micro_batches:
            current = micro_batches[-1]
            if (len(current) + 1) * lengths[current[0]] <= max_tokens:
                current.append(row)
                continue
        micro_batches.append([row])
    return micro_batches
