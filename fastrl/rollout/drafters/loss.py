"""The EAGLE drafter's loss over a packed row: SmoothL1 on hidden states, cross-entropy on
distributions.

    loss = cross_entropy + hidden_loss_weight * smooth_l1

Both are means over the pairs of the loss mask (SmoothL1 also over hidden dimensions), so neither
depends on how sequences were packed. The cross-entropy is against the target's whole distribution
(soft labels), without temperature or filters, in float32. Embedding and LM head are constants here:
they get no gradient.

Source: EAGLE (Li et al., 2024, arXiv 2401.15077), section 4.2, which weighs cross-entropy 0.1 to
SmoothL1 1. Leaves out multi-step training (HASS, EAGLE-3); chain.py measures what that would train.
Shape legend: fastrl/types.py; M counts pairs of the mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, smooth_l1_loss
from torch.utils.checkpoint import checkpoint

from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.drafters.packing import PackedFeatures
from fastrl.rollout.sampling import log_distribution
from fastrl.types import SamplingParams

_WHOLE_DISTRIBUTION = SamplingParams()
MAX_CHUNK_LOGITS = 2**24
"""Logits held at a time, of drafter and target each: 64 MiB in float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EagleLoss:
    """Loss of one packed row and its parts: float32 scalars, means over the loss mask."""

    loss: Tensor  # the only one that carries a gradient
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
    max_chunk_logits: int = MAX_CHUNK_LOGITS,
) -> EagleLoss:
    """Loss of the drafter's predictions over one packed row.

    Args:
        drafter: under training.
        embedding_VD: the target's token embedding; frozen here.
        lm_head_VD: the target's LM head; frozen here.
        packed: at least one pair in its loss mask; hidden states of the drafter's dtype.
        hidden_loss_weight: of SmoothL1 against cross-entropy.
        max_chunk_logits: pairs × vocabulary held in memory at a time; backward recomputes them.

    Raises:
        ValueError: the loss mask is empty, so that the means have no denominator.
    """
    mask_BT = packed.loss_mask_BT
    if not (num_masked := int(mask_BT.sum())):
        raise ValueError("the packed row has no response token to predict: pack other sequences")
    predicted_BTD = drafter(
        embedding(packed.next_tokens_BT, embedding_VD.detach()).to(packed.hidden_BTD.dtype),
        packed.hidden_BTD,
        packed.position_ids_BT,
        attention_mask=packed.attention_mask(),
    )
    predicted_MD, target_MD = predicted_BTD[mask_BT], packed.target_hidden_BTD[mask_BT]
    hidden = smooth_l1_loss(predicted_MD.float(), target_MD.float())
    sums = distribution_sums(predicted_MD, target_MD, lm_head_VD.detach(), max_chunk_logits)
    cross_entropy, agreement, acceptance = (sums / num_masked).unbind()
    return EagleLoss(
        loss=cross_entropy + hidden_loss_weight * hidden,
        hidden=hidden.detach(),
        cross_entropy=cross_entropy.detach(),
        top1_agreement=agreement.detach(),
        top1_acceptance=acceptance.detach(),
    )


def distribution_sums(
    predicted_MD: Tensor, target_MD: Tensor, lm_head_VD: Tensor, max_chunk_logits: int
) -> Tensor:
    """[3] float32: cross-entropy, top-1 agreement and top-1 acceptance, summed over M.

    Args:
        predicted_MD: hidden states that the drafter predicts.
        target_MD: the target's own, in the same places.
        lm_head_VD: the target's LM head.
        max_chunk_logits: places × vocabulary held in memory at a time; backward recomputes them.
    """
    chunk = max(max_chunk_logits // lm_head_VD.shape[0], 1)
    if len(predicted_MD) <= chunk:
        return _chunk_sums(predicted_MD, target_MD, lm_head_VD)
    sums = predicted_MD.new_zeros(3, dtype=torch.float32)
    chunks = zip(torch.split(predicted_MD, chunk), torch.split(target_MD, chunk), strict=True)
    for predicted, target in chunks:
        sums = sums + checkpoint(_chunk_sums, predicted, target, lm_head_VD, use_reentrant=False)
    return sums


def _chunk_sums(predicted_MD: Tensor, target_MD: Tensor, lm_head_VD: Tensor) -> Tensor:
    with torch.no_grad():
        target_logprobs_MV = log_distribution(_logits(target_MD, lm_head_VD), _WHOLE_DISTRIBUTION)
        target_probs_MV = target_logprobs_MV.exp()
    draft_logprobs_MV = log_distribution(_logits(predicted_MD, lm_head_VD), _WHOLE_DISTRIBUTION)
    cross_entropy_M = -(target_probs_MV * draft_logprobs_MV).sum(-1)
    draft_best_M = draft_logprobs_MV.argmax(-1)
    is_agreed_M = draft_best_M == target_logprobs_MV.argmax(-1)
    acceptance_M = target_probs_MV.gather(-1, draft_best_M.unsqueeze(-1)).squeeze(-1)
    return torch.stack((cross_entropy_M.sum(), is_agreed_M.float().sum(), acceptance_M.sum()))


def _logits(hidden_MD: Tensor, lm_head_VD: Tensor) -> Tensor:
    return linear(hidden_MD.to(lm_head_VD.dtype), lm_head_VD)
