"""How good the drafter is on sequences it has not been trained on, by depth, as log values.

`drafter/held_out_loss_depth_d` is the cross-entropy and `drafter/held_out_acceptance_depth_d` the
target probability of the drafter's most likely token, along the true tokens of a few of the RL
step's sequences, whatever was drafted for them. (`drafter/accept_depth_d` of rollout_metrics.py is
of the trees that were served: of the strategies chosen, the temperature and the filters.) As in
training, hidden states are those before the step's update, the LM head is the one after it.

Leaves out the computation (fastrl/rollout/drafters/agreement.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrl.rollout.drafters.agreement import agreement_by_depth
from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.drafters.packing import fold_segments, num_loss_pairs, pack_sequences
from fastrl.types import SequenceFeatures

MAX_DEPTH = 6
MAX_PAIRS = 256
"""Of the one row evaluated: it costs about what an optimizer step on so many pairs does."""


def held_out_metrics(
    drafter: EagleDrafter,
    embedding_VD: Tensor,
    lm_head_VD: Tensor,
    features: Sequence[SequenceFeatures],
    *,
    max_pairs: int,
    seed: int,
) -> dict[str, float]:
    """Agreement by depth on one row of the sequences; none for depths that no chain reaches.

    Args:
        drafter: under training.
        embedding_VD: the policy's.
        lm_head_VD: the policy's.
        features: sequences the drafter has not seen.
        max_pairs: most pairs of the row; at most MAX_PAIRS are taken.
        seed: of the choice of sequences.
    """
    usable = [f for f in features if num_loss_pairs(f) > 0]
    if not usable:
        return {}
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(usable), generator=generator).tolist()
    packed = pack_sequences([usable[index] for index in order], min(max_pairs, MAX_PAIRS))
    parameter = next(drafter.parameters())
    agreements = agreement_by_depth(
        drafter,
        embedding_VD,
        lm_head_VD,
        fold_segments(packed).to(parameter.device, parameter.dtype),
        max_depth=MAX_DEPTH,
    )
    metrics: dict[str, float] = {}
    for depth, agreement in enumerate(agreements, start=1):
        metrics[f"drafter/held_out_loss_depth_{depth}"] = agreement.cross_entropy
        metrics[f"drafter/held_out_acceptance_depth_{depth}"] = agreement.top1_acceptance
    return metrics
