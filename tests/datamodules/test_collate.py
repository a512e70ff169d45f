"""Packing rollouts into tensors, against a naive loop and a hand-worked case."""

from __future__ import annotations

import random

import pytest
import torch

from fastrl.datamodules.collate import collate
from fastrl.types import (
    EngineStats,
    FinishReason,
    Prompt,
    RewardResult,
    Rollout,
    RolloutBatch,
    SamplingParams,
)

PAD = 99


def rollout(
    prompt: Prompt,
    tokens: tuple[int, ...],
    logprobs: tuple[float, ...],
    sample_index: int = 0,
    finish_reason: FinishReason = FinishReason.STOP,
    policy_version: int = 0,
) -> Rollout:
    return Rollout(
        prompt=prompt,
        sample_index=sample_index,
        tokens=tokens,
        logprobs=logprobs,
        text="",
        finish_reason=finish_reason,
        policy_version=policy_version,
    )


def pack(rollouts: list[Rollout], scores: list[float]) -> RolloutBatch:
    return collate(
        rollouts,
        [RewardResult(score=score) for score in scores],
        sampling=SamplingParams(),
        rl_step=7,
        pad_token_id=PAD,
        stats=EngineStats(num_tokens=3),
        timings={"rollout": 1.5},
    )


def test_a_hand_worked_batch() -> None:
    first = Prompt(prompt_id=42, tokens=(1, 2, 3), text="", answer="")
    second = Prompt(prompt_id=7, tokens=(4,), text="", answer="")
    rollouts = [
        rollout(first, (5, 6), (-0.5, -0.25), 0, FinishReason.LENGTH, 3),
        rollout(first, (8,), (-1.0,), 1, policy_version=3),
        rollout(second, (9, 10, 11), (-2.0, -3.0, -4.0), 0, policy_version=2),
    ]
    batch = pack(rollouts, [1.0, 0.0, 0.5])
    assert batch.tokens_BT.tolist() == [[1, 2, 3, 5, 6], [1, 2, 3, 8, PAD], [4, 9, 10, 11, PAD]]
    assert batch.attention_mask_BT.int().tolist() == [
        [1, 1, 1, 1, 1],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 0],
    ]
    assert batch.response_mask_BT.int().tolist() == [
        [0, 0, 0, 1, 1],
        [0, 0, 0, 1, 0],
        [0, 1, 1, 1, 0],
    ]
    assert batch.rollout_logprobs_BT.tolist() == [
        [0, 0, 0, -0.5, -0.25],
        [0, 0, 0, -1, 0],
        [0, -2, -3, -4, 0],
    ]
    assert batch.rewards_B.tolist() == [1.0, 0.0, 0.5]
    assert batch.group_B.tolist() == [0, 0, 1]
    assert batch.is_truncated_B.tolist() == [True, False, False]
    assert batch.policy_version_B.tolist() == [3, 3, 2]
    assert (batch.rl_step, batch.stats.num_tokens, batch.timings) == (7, 3, {"rollout": 1.5})
    assert batch.rollouts == tuple(rollouts)
    assert [result.score for result in batch.reward_results] == [1.0, 0.0, 0.5]
    dtypes = {"tokens_BT": torch.int64, "attention_mask_BT": torch.bool, "group_B": torch.int64}
    dtypes |= {"rollout_logprobs_BT": torch.float32, "rewards_B": torch.float32}
    dtypes |= {"response_mask_BT": torch.bool, "is_truncated_B": torch.bool}
    assert all(getattr(batch, name).dtype == dtype for name, dtype in dtypes.items())


def test_every_position_matches_a_naive_loop() -> None:
    rng = random.Random(0)
    rollouts = []
    for prompt_id in rng.sample(range(1000), 6):
        tokens = tuple(rng.randrange(50) for _ in range(rng.randint(1, 9)))
        prompt = Prompt(prompt_id=prompt_id, tokens=tokens, text="", answer="")
        for sample in range(3):
            length = rng.randint(0, 12)
            response = tuple(rng.randrange(50) for _ in range(length))
            logprobs = tuple(-rng.randrange(64) / 8 for _ in range(length))
            rollouts.append(rollout(prompt, response, logprobs, sample))
    batch = pack(rollouts, [0.0] * len(rollouts))
    assert batch.group_B.tolist() == [row // 3 for row in range(18)]
    for row, source in enumerate(rollouts):
        for column in range(batch.tokens_BT.shape[1]):
            place = column - len(source.prompt.tokens)
            expected: tuple[int, bool, bool, float]
            if place < 0:
                expected = (source.prompt.tokens[column], True, False, 0.0)
            elif place < len(source.tokens):
                expected = (source.tokens[place], True, True, source.logprobs[place])
            else:
                expected = (PAD, False, False, 0.0)
            tensors = (
                batch.tokens_BT,
                batch.attention_mask_BT,
                batch.response_mask_BT,
                batch.rollout_logprobs_BT,
            )
            assert tuple(tensor[row, column].item() for tensor in tensors) == expected


def test_mismatched_lengths_are_refused() -> None:
    prompt = Prompt(prompt_id=0, tokens=(1,), text="", answer="")
    with pytest.raises(AssertionError, match="2 tokens and 1 log-probabilities"):
        pack([rollout(prompt, (1, 2), (-1.0,))], [0.0])
    with pytest.raises(AssertionError, match="2 rewards, 1 rollouts"):
        pack([rollout(prompt, (1,), (-1.0,))], [0.0, 1.0])
