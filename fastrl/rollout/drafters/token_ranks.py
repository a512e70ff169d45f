"""Where a response's tokens stand among a drafter's guesses: what top-k accuracy is counted of.

The drafter is run along a response's true tokens, its own hidden states fed back to it from depth 2
on (chain.py), from every place at which serving could ask it: after the response's first token,
which comes from the prefill, or a later one. What is ranked is the token that the response has, so
at any temperature the share of ranks below k is the share of tokens that k guesses would catch.
Leaves out trees, and counting. Shape legend: fastrl/types.py; M counts chains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastrl.rollout.drafters.chain import ChainDepth, chain_depths
from fastrl.rollout.drafters.distribution_loss import default_chunk_logits
from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.drafters.packing import num_loss_pairs, num_pairs, pack_sequences
from fastrl.types import SequenceFeatures


@torch.no_grad()
def token_ranks(
    drafter: EagleDrafter,
    embedding_VD: Tensor,
    lm_head_VD: Tensor,
    features: SequenceFeatures,
    *,
    max_depth: int,
    max_chunk_logits: int | None = None,
) -> list[Tensor]:
    """Ranks by depth, int64 [M] each, 0 for the drafter's most likely token.

    Entry i of depth d, both from 0, is of response token i + d + 1, drafted when the response had
    been sampled up to token i. Equal logits rank by token id; a token that is not of the drafter's
    vocabulary comes after all that are. Depths that the response is too short
    for are left out.

    Args:
        drafter: of the target whose hidden states are given.
        embedding_VD: the target's.
        lm_head_VD: the target's.
        features: of one prompt and response.
        max_depth: most depths.
        max_chunk_logits: places × vocabulary held in memory at a time; None: as suits the device.
    """
    # The loss counts the response's first token as well, which no drafter is asked for.
    asked = dataclasses.replace(features, num_prompt_tokens=features.num_prompt_tokens + 1)
    if num_loss_pairs(asked) == 0:
        return []
    parameter = next(drafter.parameters())
    packed = pack_sequences([asked], num_pairs(asked)).to(parameter.device, parameter.dtype)
    tokens_T = features.tokens_T.to(parameter.device)
    return ranks_by_depth(
        drafter,
        lm_head_VD,
        chain_depths(drafter, embedding_VD, packed, max_depth=max_depth),
        tokens_T[features.num_prompt_tokens + 1 :],
        max_chunk_logits=max_chunk_logits,
    )


@torch.no_grad()
def ranks_by_depth(
    drafter: EagleDrafter,
    lm_head_VD: Tensor,
    depths: Iterable[ChainDepth],
    tokens_M: Tensor,
    *,
    max_chunk_logits: int | None = None,
) -> list[Tensor]:
    """Ranks by depth, int64 [M] each, of the tokens that a row's chains draft.

    Args:
        drafter: whose chains they are.
        lm_head_VD: the target's.
        depths: of a row, from the first on.
        tokens_M: what depth 1's chains draft, int64.
        max_chunk_logits: as in `token_ranks`.
    """
    max_chunk_logits = max_chunk_logits or default_chunk_logits(lm_head_VD.device)
    head_FD = drafter.draft_head(lm_head_VD)
    chunk = max(max_chunk_logits // len(head_FD), 1)
    ranks = []
    for chains in depths:
        parts = zip(
            torch.split(drafter.head_input(chains.predicted_MD), chunk),
            torch.split(tokens_M[chains.target_index_M], chunk),
            strict=True,
        )
        ranks.append(
            torch.cat(
                [_ranks(hidden, given, head_FD, drafter.token_map_F) for hidden, given in parts]
            )
        )
    return ranks


def _ranks(
    hidden_MD: Tensor, tokens_M: Tensor, head_FD: Tensor, token_map_F: Tensor | None
) -> Tensor:
    if token_map_F is None:
        return _ranks_of_places(hidden_MD, tokens_M, head_FD)
    place_M = torch.searchsorted(token_map_F, tokens_M).clamp_max(len(token_map_F) - 1)
    ranks_M = _ranks_of_places(hidden_MD, place_M, head_FD)
    return torch.where(token_map_F[place_M] == tokens_M, ranks_M, len(token_map_F))


def _ranks_of_places(hidden_MD: Tensor, tokens_M: Tensor, lm_head_VD: Tensor) -> Tensor:
    logits_MV = linear(hidden_MD.to(lm_head_VD.dtype), lm_head_VD)
    own_M1 = logits_MV.gather(1, tokens_M.unsqueeze(1))
    ids_V = torch.arange(logits_MV.shape[1], device=logits_MV.device)
    is_before_MV = (logits_MV > own_M1) | ((logits_MV == own_M1) & (ids_V < tokens_M.unsqueeze(1)))
    return is_before_MV.sum(1)
