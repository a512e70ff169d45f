"""One loss of a drafter over given sequences, for whoever trains it: warm-up and co-training.

    sequences → one packed row, folded → eagle_loss, with the target's embedding and LM head

Leaves out where sequences come from, the optimizer's step, and the schedule. Shape legend:
fastrl/types.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.drafters.loss import EagleLoss, LossSettings, eagle_loss
from fastrl.rollout.drafters.packing import PackedFeatures

BETAS = (0.9, 0.95)
"""Of AdamW."""
LOSS_NAMES = ("loss", "loss_hidden", "loss_ce", "top1_agreement", "top1_acceptance")
"""What `loss_values` are, in their order."""


def shared_weights(target: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """The target's embedding and LM head, [V, D] each: the drafter reads, never trains them.

    Raises ValueError for a model that has others than EAGLE can share.
    """
    embedding, lm_head = target.get_input_embeddings(), target.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(embedding, nn.Embedding) or not isinstance(lm_head, nn.Linear):
        raise ValueError(
            f"an EAGLE drafter shares an nn.Embedding and an nn.Linear LM head with the policy, "
            f"got {type(embedding).__name__} and {type(lm_head).__name__}; use another model, or "
            f"train no drafter"
        )
    if lm_head.bias is not None:
        raise ValueError(
            "the policy's LM head has a bias, which an EAGLE drafter does not share; use another "
            "model, or train no drafter"
        )
    return embedding.weight, lm_head.weight


def row_loss(
    drafter: EagleDrafter,
    target: PreTrainedModel | tuple[Tensor, Tensor],
    packed: PackedFeatures,
    settings: LossSettings,
) -> EagleLoss:
    """Loss over one packed row, computed where the drafter is and in its dtype.

    Args:
        drafter: under training.
        target: whose hidden states are packed, or what of it is shared (`shared_weights`).
        packed: at least one pair in its loss mask; folded or not.
        settings: depths, and what counts how much.
    """
    parameter = next(drafter.parameters())
    embedding_VD, lm_head_VD = target if isinstance(target, tuple) else shared_weights(target)
    return eagle_loss(
        drafter,
        embedding_VD,
        lm_head_VD,
        packed.to(parameter.device, parameter.dtype),
        hidden_loss_weight=settings.hidden_weight,
        num_depths=settings.num_depths,
        top_k=settings.top_k,
        top_k_weight=settings.top_k_weight,
        depth_decay=settings.depth_decay,
        detaches_depths=settings.detaches_depths,
    )


def loss_values(result: EagleLoss) -> list[float]:
    """In the order of `LOSS_NAMES`, moved off the device at once."""
    return torch.stack(
        (
            result.loss.detach(),
            result.hidden,
            result.cross_entropy,
            result.top1_agreement,
            result.top1_acceptance,
        )
    ).tolist()
