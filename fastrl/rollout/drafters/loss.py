"""The EAGLE drafter's loss over a packed row: SmoothL1 on hidden states, cross-entropy on
distributions, at each depth of the chains it is trained along (chain.py). An EAGLE-3 drafter has
the latter alone.

    loss at a depth = cross_entropy + hidden_loss_weight * smooth_l1
    loss            = mean over depths d = 1 … num_depths, weighted by DEPTH_DECAY ** (d - 1)

Those of a depth are means over the chains that reach it (SmoothL1 also over hidden dimensions), at
depth 1 the pairs of the loss mask, so none depends on how sequences were packed. The cross-entropy
is against the target's whole distribution (soft labels), without temperature or filters, in
float32. Of a drafter with a vocabulary of its own, tokens that it cannot draft are left out of the
sum, the rest keeping their target probabilities, so that a place counts as much as can be drafted
there. Embedding and LM head are constants here: they get no gradient.

Sources: for one depth EAGLE (Li et al., 2024, arXiv 2401.15077), section 4.2, which weighs
cross-entropy 0.1 to SmoothL1 1; for several HASS (arXiv 2408.15766) and EAGLE-3 (arXiv 2503.01840),
the decay being that of EAGLE-3's code. Leaves out HASS's top-k loss, and sharing the target's
logits between depths. Shape legend: fastrl/types.py; M counts chains.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, smooth_l1_loss
from torch.utils.checkpoint import checkpoint

from fastrl.rollout.drafters.chain import ChainDepth, chain_depths
from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.drafters.packing import PackedFeatures
from fastrl.rollout.sampling import log_distribution
from fastrl.types import SamplingParams

_WHOLE_DISTRIBUTION = SamplingParams()
MAX_CHUNK_LOGITS = 2**24
"""Logits held at a time, of drafter and target each: 64 MiB in float32."""
DEPTH_DECAY = 0.8
"""Weight of a depth against the one before."""


# No slots: jsonargparse reads the fields of a default value from its __dict__.
@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What a drafter's loss counts."""

    num_depths: int = 2
    """Depths of a draft that are trained, from the second on with the drafter's own hidden states
    fed back to it (the training-time test of EAGLE-3); 1 is EAGLE's own loss. Time and memory of an
    optimizer step grow in proportion; a third depth gained the quickstart little."""
    hidden_weight: float = 10.0
    """Of SmoothL1 on hidden states, against 1 for cross-entropy; drafts feed the drafter its own
    hidden states, so a low weight costs accept length deep in a tree. EAGLE-3 has no such part."""

    def __post_init__(self) -> None:
        checks = (
            (self.num_depths >= 1, "num_depths must be >= 1", self.num_depths),
            (
                0 <= self.hidden_weight < math.inf,
                "hidden_weight must be >= 0 and finite",
                self.hidden_weight,
            ),
        )
        for is_valid, expectation, given in checks:
            if not is_valid:
                raise ValueError(f"loss: {expectation}, got {given}")


@dataclass(frozen=True, kw_only=True, slots=True)
class EagleLoss:
    """Loss of one packed row, and its parts at depth 1: float32 scalars, means over the pairs."""

    loss: Tensor  # of all depths; the only one that carries a gradient
    hidden: Tensor  # SmoothL1, unweighted
    cross_entropy: Tensor
    top1_agreement: Tensor  # share of pairs whose most likely token is the target's too
    top1_acceptance: Tensor  # target probability of the drafter's most likely token


def eagle_loss(
    drafter: EagleDrafter,
    embedding_VD: Tensor,
    lm_head_VD: Tensor,
    packed: PackedFeatures,
    *,
    hidden_loss_weight: float,
    num_depths: int = 1,
    max_chunk_logits: int = MAX_CHUNK_LOGITS,
) -> EagleLoss:
    """Loss of the drafter's predictions over one packed row, folded or not.

    Args:
        drafter: under training.
        embedding_VD: the target's token embedding; frozen here.
        lm_head_VD: the target's LM head; frozen here.
        packed: at least one pair in its loss mask; hidden states of the drafter's dtype.
        hidden_loss_weight: of SmoothL1 against cross-entropy.
        num_depths: of the chains; depths that none reaches are left out of the mean.
        max_chunk_logits: places × vocabulary held in memory at a time; backward recomputes them.

    Raises:
        ValueError: the loss mask is empty, so that the means have no denominator.
    """
    by_depth = [
        _loss_at_depth(drafter, chains, lm_head_VD.detach(), hidden_loss_weight, max_chunk_logits)
        for chains in chain_depths(drafter, embedding_VD, packed, max_depth=num_depths)
    ]
    if not by_depth:
        raise ValueError("the packed row has no response token to predict: pack other sequences")
    weights = [DEPTH_DECAY**index for index in range(len(by_depth))]
    weighted = (weight * result.loss for weight, result in zip(weights, by_depth, strict=True))
    total = torch.stack(list(weighted)).sum() / sum(weights)
    return dataclasses.replace(by_depth[0], loss=total)


def _loss_at_depth(
    drafter: EagleDrafter,
    chains: ChainDepth,
    lm_head_VD: Tensor,
    hidden_loss_weight: float,
    max_chunk_logits: int,
) -> EagleLoss:
    predicted_MD, target_MD = chains.predicted_MD, chains.target_MD
    hidden = predicted_MD.new_zeros((), dtype=torch.float32)
    if drafter.PREDICTS_HIDDEN:
        hidden = smooth_l1_loss(predicted_MD.float(), target_MD.float())
    sums = distribution_sums(drafter, predicted_MD, target_MD, lm_head_VD, max_chunk_logits)
    cross_entropy, agreement, acceptance = (sums / len(chains)).unbind()
    return EagleLoss(
        loss=cross_entropy + hidden_loss_weight * hidden,
        hidden=hidden.detach(),
        cross_entropy=cross_entropy.detach(),
        top1_agreement=agreement.detach(),
        top1_acceptance=acceptance.detach(),
    )


def distribution_sums(
    drafter: EagleDrafter,
    predicted_MD: Tensor,
    target_MD: Tensor,
    lm_head_VD: Tensor,
    max_chunk_logits: int,
) -> Tensor:
    """[3] float32: cross-entropy, top-1 agreement and top-1 acceptance, summed over M.

    Args:
        drafter: whose vocabulary and LM head it is.
        predicted_MD: hidden states that it predicts.
        target_MD: the target's own, in the same places.
        lm_head_VD: the target's LM head.
        max_chunk_logits: places × vocabulary held in memory at a time; backward recomputes them.
    """
    predicted_MD = drafter.head_input(predicted_MD)
    heads = lm_head_VD, drafter.draft_head(lm_head_VD), drafter.token_map_F
    chunk = max(max_chunk_logits // lm_head_VD.shape[0], 1)
    if len(predicted_MD) <= chunk:
        return _chunk_sums(predicted_MD, target_MD, *heads)
    sums = predicted_MD.new_zeros(3, dtype=torch.float32)
    chunks = zip(torch.split(predicted_MD, chunk), torch.split(target_MD, chunk), strict=True)
    for predicted, target in chunks:
        sums = sums + checkpoint(_chunk_sums, predicted, target, *heads, use_reentrant=False)
    return sums


def _chunk_sums(
    predicted_MD: Tensor,
    target_MD: Tensor,
    lm_head_VD: Tensor,
    draft_head_FD: Tensor,
    token_map_F: Tensor | None,
) -> Tensor:
    with torch.no_grad():
        target_logprobs_MV = log_distribution(_logits(target_MD, lm_head_VD), _WHOLE_DISTRIBUTION)
        target_probs_MV = target_logprobs_MV.exp()
        draftable_MF = target_probs_MV if token_map_F is None else target_probs_MV[:, token_map_F]
    draft_logprobs_MF = log_distribution(_logits(predicted_MD, draft_head_FD), _WHOLE_DISTRIBUTION)
    cross_entropy_M = -(draftable_MF * draft_logprobs_MF).sum(-1)
    draft_best_M = draft_logprobs_MF.argmax(-1)
    if token_map_F is not None:
        draft_best_M = token_map_F[draft_best_M]
    is_agreed_M = draft_best_M == target_logprobs_MV.argmax(-1)
    acceptance_M = target_probs_MV.gather(-1, draft_best_M.unsqueeze(-1)).squeeze(-1)
    return torch.stack((cross_entropy_M.sum(), is_agreed_M.float().sum(), acceptance_M.sum()))


def _logits(hidden_MD: Tensor, lm_head_VD: Tensor) -> Tensor:
    return linear(hidden_MD.to(lm_head_VD.dtype), lm_head_VD)
