"""Packs rollouts and their rewards into the tensors an RL step trains on. Pure.

Rows are right-padded: prompt, response, padding. Shape legend: fastrl/types.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fastrl.types import (
    EngineStats,
    FinishReason,
    RewardResult,
    Rollout,
    RolloutBatch,
    SamplingParams,
    Span,
)


def collate(
    rollouts: Sequence[Rollout],
    reward_results: Sequence[RewardResult],
    *,
    sampling: SamplingParams,
    rl_step: int,
    pad_token_id: int,
    stats: EngineStats,
    timings: Mapping[str, float],
    spans: tuple[Span, ...] = (),
) -> RolloutBatch:
    """One row a rollout, in order.

    Args:
        rollouts: prompt-major: the samples of a prompt stand together and form a group.
        reward_results: one a rollout.
        sampling: how the rollouts were sampled.
        rl_step: RL steps finished when they were.
        pad_token_id: fills rows up; masked everywhere.
        stats: what the engine did.
        timings: seconds by phase.
        spans: the same phases as they followed one another.
    """
    assert rollouts, "collate needs at least one rollout"
    num_rows = len(rollouts)
    num_columns = max(len(rollout.prompt.tokens) + len(rollout.tokens) for rollout in rollouts)
    tokens_BT = torch.full((num_rows, num_columns), pad_token_id, dtype=torch.int64)
    attention_mask_BT = torch.zeros((num_rows, num_columns), dtype=torch.bool)
    response_mask_BT = torch.zeros_like(attention_mask_BT)
    rollout_logprobs_BT = torch.zeros((num_rows, num_columns), dtype=torch.float32)
    for row, rollout in enumerate(rollouts):
        assert len(rollout.logprobs) == len(rollout.tokens), (
            f"rollout {rollout.sample_index} of prompt {rollout.prompt.prompt_id} has "
            f"{len(rollout.tokens)} tokens and {len(rollout.logprobs)} log-probabilities"
        )
        start = len(rollout.prompt.tokens)
        end = start + len(rollout.tokens)
        tokens_BT[row, :end] = torch.tensor(rollout.prompt.tokens + rollout.tokens)
        attention_mask_BT[row, :end] = True
        response_mask_BT[row, start:end] = True
        rollout_logprobs_BT[row, start:end] = torch.tensor(rollout.logprobs)
    return RolloutBatch(
        tokens_BT=tokens_BT,
        attention_mask_BT=attention_mask_BT,
        response_mask_BT=response_mask_BT,
        rollout_logprobs_BT=rollout_logprobs_BT,
        rewards_B=_rewards(reward_results, num_rows),
        group_B=_groups(rollouts),
        is_truncated_B=torch.tensor([r.finish_reason is FinishReason.LENGTH for r in rollouts]),
        policy_version_B=torch.tensor([rollout.policy_version for rollout in rollouts]),
        sampling=sampling,
        rl_step=rl_step,
        rollouts=tuple(rollouts),
        reward_results=tuple(reward_results),
        stats=stats,
        timings=dict(timings),
        spans=spans,
    )


def _rewards(reward_results: Sequence[RewardResult], num_rows: int) -> torch.Tensor:
    """[B] float32."""
    assert len(reward_results) == num_rows, f"{len(reward_results)} rewards, {num_rows} rollouts"
    return torch.tensor([result.score for result in reward_results], dtype=torch.float32)


def _groups(rollouts: Sequence[Rollout]) -> torch.Tensor:
    """[B] int64: rollouts of one prompt share a number, counted from 0 in order of appearance."""
    numbers: dict[int, int] = {}
    return torch.tensor(
        [numbers.setdefault(rollout.prompt.prompt_id, len(numbers)) for rollout in rollouts]
    )
