"""Ranks of a response's tokens against a loop that drafts one token at a time."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.drafters.token_ranks import token_ranks
from fastrl.types import SequenceFeatures
from tests.rollout.drafters.conftest import VOCAB_SIZE, random_sequences
from tests.rollout.drafters.naive_chains import naive_chains


def in_dtype(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().to(dtype) for tensor in tensors]


def naive_ranks(
    drafter: EagleDrafter,
    embedding_VD: Tensor,
    lm_head_VD: Tensor,
    features: SequenceFeatures,
    depth: int,
) -> list[int]:
    """Of all chains at a depth, by sorting the whole vocabulary."""
    # The first draft is of the response's second token.
    asked = dataclasses.replace(features, num_prompt_tokens=features.num_prompt_tokens + 1)
    with torch.no_grad():
        chains = naive_chains(drafter, embedding_VD, [asked], depth)
    ranks = []
    for chain, (output, _) in enumerate(chains):
        logits = (lm_head_VD @ output).tolist()
        guesses = sorted(range(VOCAB_SIZE), key=lambda token: -logits[token])
        drafted = features.num_prompt_tokens + chain + depth
        ranks.append(guesses.index(int(features.tokens_T[drafted])))
    return ranks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(12, 4), (9, 1), (30, 20)])
@pytest.mark.parametrize("max_chunk_logits", [2**24, 2 * VOCAB_SIZE])
def test_ranks_at_every_depth_are_those_of_a_token_by_token_loop(
    drafter: EagleDrafter,
    shared_weights: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    size: tuple[int, int],
    max_chunk_logits: int,
) -> None:
    (features,) = random_sequences(size)
    features = dataclasses.replace(features, hidden_TD=features.hidden_TD.to(dtype))
    drafter.to(dtype)
    weights = in_dtype(dtype, *shared_weights)
    ranks = token_ranks(drafter, *weights, features, max_depth=5, max_chunk_logits=max_chunk_logits)
    assert len(ranks) == 5
    for depth, found in enumerate(ranks, start=1):
        assert found.tolist() == naive_ranks(drafter, *weights, features, depth)
        assert len(found) == size[0] - size[1] - depth
    for k in (1, 2, 4, 8):
        naive = naive_ranks(drafter, *weights, features, 1)
        assert (ranks[0] < k).float().mean() == pytest.approx(
            sum(rank < k for rank in naive) / len(naive)
        )


def test_tokens_that_are_not_of_the_vocabulary_come_last(
    drafter: EagleDrafter, shared_weights: tuple[Tensor, Tensor]
) -> None:
    (features,) = random_sequences((12, 4))
    everywhere = token_ranks(drafter, *shared_weights, features, max_depth=2)
    listed = (1, 2, 5, 6, 9)
    drafter.trim_vocabulary(listed)
    embedding_VD, lm_head_VD = (weight.detach() for weight in shared_weights)
    for depth, found in enumerate(
        token_ranks(drafter, embedding_VD, lm_head_VD, features, max_depth=2), start=1
    ):
        asked = dataclasses.replace(features, num_prompt_tokens=features.num_prompt_tokens + 1)
        for chain, (output, _) in enumerate(naive_chains(drafter, embedding_VD, [asked], depth)):
            token = int(features.tokens_T[features.num_prompt_tokens + chain + depth])
            logits = lm_head_VD @ output
            guesses = sorted(listed, key=lambda one, logits=logits: -logits[one].item())
            assert found[chain] == (guesses.index(token) if token in listed else len(listed))
        assert len(found) == len(everywhere[depth - 1])


def test_equal_logits_rank_by_token_id(
    drafter: EagleDrafter, shared_weights: tuple[Tensor, Tensor]
) -> None:
    """Rounding makes equals of many; none of them may pass for the best."""
    (features,) = random_sequences((12, 4))
    embedding_VD, lm_head_VD = in_dtype(torch.float32, *shared_weights)
    (ranks,) = token_ranks(
        drafter, embedding_VD, torch.zeros_like(lm_head_VD), features, max_depth=1
    )
    assert ranks.tolist() == features.tokens_T[5:].tolist()


def test_depths_beyond_the_response_are_left_out(
    drafter: EagleDrafter, shared_weights: tuple[Tensor, Tensor]
) -> None:
    """Of three response tokens the first is the prefill's, so drafts of two tokens are possible."""
    lengths = []
    for size in ((7, 4), (6, 4), (5, 4), (2, 1)):
        (features,) = random_sequences(size)
        ranks = token_ranks(drafter, *shared_weights, features, max_depth=6)
        lengths.append([len(one) for one in ranks])
    assert lengths == [[2, 1], [1], [], []]
