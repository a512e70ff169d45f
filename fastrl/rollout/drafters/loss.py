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
there. Embedding and LM head of the target are constants here: they get no gradient.

Sources: for one depth EAGLE (Li et al., 2024, arXiv 2401.15077), section 4.2, which weighs
cross-entropy 0.1 to SmoothL1 1; for several HASS (arXiv 2408.15766) and EAGLE-3 (arXiv 2503.01840),
the decay being that of EAGLE-3's code. Leaves out how the distributions' part is computed
(distribution_loss.py). Shape legend: fastrl/types.py; M counts chains.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import mul

from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from fastrl.rollout.drafters.chain import chain_depths
from fastrl.rollout.drafters.distribution_loss import distribution_loss, statistics_dtype
from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.drafters.packing import PackedFeatures

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
    max_chunk_logits: int | None = None,
) -> EagleLoss:
    """Loss of the drafter's predictions over one packed row, folded or not.

    Args:
        drafter: under training.
        embedding_VD: the target's token embedding; frozen here.
        lm_head_VD: the target's LM head; frozen here.
        packed: at least one pair in its loss mask; hidden states of the drafter's dtype.
        hidden_loss_weight: of SmoothL1 against cross-entropy.
        num_depths: of the chains; depths that none reaches are left out of the mean.
        max_chunk_logits: places × vocabulary held in memory at a time; None: as suits the device.

    Raises:
        ValueError: the loss mask is empty, so that the means have no denominator.
    """
    depths = list(chain_depths(drafter, embedding_VD, packed, max_depth=num_depths))
    if not depths:
        raise ValueError("the packed row has no response token to predict: pack other sequences")
    shares = [DEPTH_DECAY**index for index in range(len(depths))]
    shares = [share / sum(shares) for share in shares]
    distributions = distribution_loss(
        drafter,
        depths,
        lm_head_VD,
        weights=[share / len(chains) for share, chains in zip(shares, depths, strict=True)],
        max_chunk_logits=max_chunk_logits,
    )
    loss, hidden = distributions.loss, distributions.loss.new_zeros(())
    if drafter.PREDICTS_HIDDEN:
        dtype = statistics_dtype(depths[0].predicted_MD)
        distances = [
            smooth_l1_loss(chains.predicted_MD.to(dtype), chains.target_MD.to(dtype))
            for chains in depths
        ]
        loss = loss + hidden_loss_weight * sum(map(mul, shares, distances))
        hidden = distances[0].detach()
    cross_entropy, agreement, acceptance = (distributions.sums_N3[0] / len(depths[0])).unbind()
    return EagleLoss(
        loss=loss,
        hidden=hidden,
        cross_entropy=cross_entropy,
        top1_agreement=agreement,
        top1_acceptance=acceptance,
    )
