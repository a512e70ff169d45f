"""The rows an RL step trains on: checked, weighted, split into mini-batches and micro-batches.

A mini-batch is one optimizer step; a micro-batch is one forward and backward of it. Both splits
depend on the rows' order and lengths alone. Shape legend: fastrl/types.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fastrl.modules.objectives import Aggregation, token_weights
from fastrl.types import RolloutBatch

MiniBatch = list[list[int]]
"""Micro-batches of one optimizer step, each a list of row numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MiniBatchSize:
    """What a mini-batch's loss is divided by."""

    num_rows: int
    num_tokens: int
    """Of its responses."""


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


def training_rows(
    batch: RolloutBatch,
    lengths: Sequence[int],
    mini_batches: Sequence[MiniBatch],
    sizes: Sequence[MiniBatchSize],
    advantages: Tensor,
    aggregation: Aggregation,
) -> TrainingRows:
    """Rows of a rollout batch, each token weighted as its mini-batch's loss wants it.

    Args:
        batch: B rollouts.
        lengths: tokens of each row.
        mini_batches: which rows make an optimizer step.
        sizes: of the mini-batches over all ranks.
        advantages: of each row, [B], or of each token, [B, T].
        aggregation: of token losses.
    """
    mask_BT = batch.response_mask_BT
    if advantages.ndim == 1:
        advantages = advantages.unsqueeze(1).expand_as(mask_BT)
    weights_BT = torch.zeros(mask_BT.shape, device=mask_BT.device)
    for mini_batch, size in zip(mini_batches, sizes, strict=True):
        members = _rows_of(mini_batch)
        weights_BT[members] = token_weights(
            mask_BT[members],
            aggregation,
            num_rows=size.num_rows,
            num_tokens=size.num_tokens,
            max_tokens=batch.sampling.max_tokens,
        )
    return TrainingRows(
        tokens_BT=batch.tokens_BT,
        response_mask_BT=mask_BT,
        lengths=tuple(lengths),
        weights_BT=weights_BT,
        advantages_BT=advantages,
        rollout_logprobs_BT=batch.rollout_logprobs_BT,
    )


def mini_batch_sizes(
    response_mask_BT: Tensor, mini_batches: Sequence[MiniBatch]
) -> list[MiniBatchSize]:
    """Of this rank's rows."""
    num_tokens = response_mask_BT.sum(1).tolist()
    return [
        MiniBatchSize(num_rows=len(rows), num_tokens=sum(num_tokens[row] for row in rows))
        for rows in map(_rows_of, mini_batches)
    ]


def sizes_over_ranks(of_ranks: Sequence[Sequence[MiniBatchSize]]) -> list[MiniBatchSize]:
    """Of the mini-batches that the ranks' own make together.

    Raises:
        ValueError: the ranks have other numbers of them; whichever rank asks.
    """
    _check_alike(of_ranks)
    return [
        MiniBatchSize(
            num_rows=sum(one.num_rows for one in sizes),
            num_tokens=sum(one.num_tokens for one in sizes),
        )
        for sizes in zip(*of_ranks, strict=True)
    ]


def _check_alike(of_ranks: Sequence[Sequence[object]]) -> None:
    if len(set(map(len, of_ranks))) > 1:
        raise ValueError(
            f"ranks that train one policy must take as many optimizer steps, but split their "
            f"rollout batches into {[len(one) for one in of_ranks]} mini-batches (by rank); give "
            f"all ranks the same model.num_mini_batches"
        )


def _rows_of(mini_batch: MiniBatch) -> list[int]:
    return [row for micro_batch in mini_batch for row in micro_batch]


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


def common_numbers(of_ranks: Sequence[Sequence[MiniBatch]]) -> list[int]:
    """Micro-batches of each mini-batch that all ranks can make: the most of any.

    Args:
        of_ranks: the mini-batches of each rank.

    Raises:
        ValueError: a rank has too few rows for them, or other mini-batches; whichever rank asks.
    """
    _check_alike(of_ranks)
    numbers = []
    for place, mini_batches in enumerate(zip(*of_ranks, strict=True)):
        number = max(map(len, mini_batches))
        num_rows = [sum(map(len, mini_batch)) for mini_batch in mini_batches]
        if number > min(num_rows):
            raise ValueError(
                f"mini-batch {place}: one rank splits its rows into {number} micro-batches, and "
                f"all must make as many, but the ranks have {num_rows} rows; give all ranks as "
                f"many rows, or raise model.micro_batch_tokens"
            )
        numbers.append(number)
    return numbers


def split_further(micro_batches: Sequence[list[int]], number: int) -> list[list[int]]:
    """As many micro-batches of the same rows, those with the most rows halved."""
    result = list(micro_batches)
    while len(result) < number:
        place = max(range(len(result)), key=lambda place: len(result[place]))
        largest = result[place]
        assert len(largest) > 1, f"{len(result)} rows make no {number} micro-batches"
        middle = len(largest) // 2
        result[place : place + 1] = [largest[:middle], largest[middle:]]
    return result


def check_trainable(batch: RolloutBatch, policy_version: int) -> None:
    """Raise ValueError unless the batch is on-policy, sampled (not greedy), right-padded."""
    versions = batch.policy_version_B.unique().tolist()  # type: ignore[no-untyped-call]
    if versions != [policy_version]:
        raise ValueError(
            f"rollouts must come from the current policy (lag 0): it is version {policy_version}, "
            f"they were sampled by {versions}; publish the policy to the engine before generating "
            f"(engine.load_policy), and give the loader a length, or Lightning fetches a batch "
            f"ahead"
        )
    if batch.sampling.temperature == 0:
        raise ValueError(
            "sampling.temperature must be > 0 to train, got 0: greedy rollouts have no gradient; "
            "set data.sampling.temperature, 1 for instance"
        )
    mask_BT = batch.attention_mask_BT
    is_right_padded = not (mask_BT[:, 1:] & ~mask_BT[:, :-1]).any()
    if not is_right_padded or batch.response_mask_BT[:, 0].any():
        raise ValueError(
            "every row must be a prompt of at least one token, its response, then padding on the "
            "right; got padding before a token, or a response without a prompt"
        )
