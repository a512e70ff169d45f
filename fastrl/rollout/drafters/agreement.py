"""How good a drafter is at each depth of a draft, with its own hidden states fed back to it.

Leaves out the forward itself (chain.py), and trees; nothing takes a gradient. Shape legend:
fastrl/types.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastrl.rollout.drafters.chain import chain_depths
from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.drafters.loss import MAX_CHUNK_LOGITS, distribution_sums
from fastrl.rollout.drafters.packing import PackedFeatures


@dataclass(frozen=True, kw_only=True, slots=True)
class DepthAgreement:
    """Drafter against target at one depth; means over the chains that reach it."""

    num_chains: int
    cross_entropy: float
    top1_acceptance: float
    """Target probability of the drafter's most likely token, at temperature 1 and unfiltered."""


@torch.no_grad()
def agreement_by_depth(
    drafter: EagleDrafter,
    embedding_VD: Tensor,
    lm_head_VD: Tensor,
    packed: PackedFeatures,
    *,
    max_depth: int,
) -> list[DepthAgreement]:
    """Agreement at depths 1, 2, …, as far as a chain of the row reaches, at most `max_depth`."""
    agreements: list[DepthAgreement] = []
    for chains in chain_depths(drafter, embedding_VD, packed, max_depth=max_depth):
        sums = distribution_sums(
            drafter, chains.predicted_MD, chains.target_MD, lm_head_VD, MAX_CHUNK_LOGITS
        )
        cross_entropy, _, acceptance = (sums / len(chains)).tolist()
        agreements.append(
            DepthAgreement(
                num_chains=len(chains), cross_entropy=cross_entropy, top1_acceptance=acceptance
            )
        )
    return agreements
