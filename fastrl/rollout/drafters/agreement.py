"""How good a drafter is at each depth of a draft, with its own hidden states fed back to it.

What is compared is distributions; what tokens responses have is token_ranks.py's. Leaves out the
forward itself (chain.py), and trees; nothing takes a gradient. Shape legend: fastrl/types.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrl.rollout.drafters.chain import ChainDepth, chain_depths
from fastrl.rollout.drafters.distribution_loss import distribution_loss
from fastrl.rollout.drafters.eagle import EagleDrafter
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
    depths = list(chain_depths(drafter, embedding_VD, packed, max_depth=max_depth))
    return agreement_of_depths(drafter, lm_head_VD, depths)


@torch.no_grad()
def agreement_of_depths(
    drafter: EagleDrafter, lm_head_VD: Tensor, depths: Sequence[ChainDepth]
) -> list[DepthAgreement]:
    """Agreement at depths 1, 2, …, those given."""
    if not depths:
        return []
    sums_N3 = distribution_loss(drafter, depths, lm_head_VD, weights=[1.0] * len(depths)).sums_N3
    return [
        DepthAgreement(
            num_chains=len(chains),
            cross_entropy=cross_entropy / len(chains),
            top1_acceptance=acceptance / len(chains),
        )
        for chains, (cross_entropy, _, acceptance) in zip(depths, sums_N3.tolist(), strict=True)
    ]
