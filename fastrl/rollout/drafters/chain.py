"""How good a drafter is at each depth of a draft, with its own hidden states fed back to it.

A chain starts at a pair t of a packed row (packing.py). At depth 1 the drafter reads target hidden
state t and predicts the distribution of token t+2. At depth d it reads the true token t+d and its
own output of depth d-1 in place of target hidden state t+d-1, sees the true pairs up to t and its
own chain, and predicts token t+d+1: what serving asks of it once d-1 drafts were accepted.

All chains of a row run side by side, one forward a depth; nothing takes a gradient. Source: the
"training-time test" of EAGLE-3 (Li et al., 2025, arXiv 2503.01840), as a measurement. Leaves out
trees, and training on it. Shape legend: fastrl/types.py; T counts pairs, B is 1, M counts chains.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding

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
    """Agreement at depths 1, 2, …, as far as a chain of the row reaches, at most `max_depth`.

    Chains start at the pairs of the loss mask; those that would leave their segment end there.
    """
    view = _ChainView(packed.attention_mask()[0, 0])
    hidden_BTD = packed.hidden_BTD
    agreements: list[DepthAgreement] = []
    for depth in range(1, max_depth + 1):
        tokens_BT, target_BTD, reaches_BT = _shifted(packed, depth - 1)
        if not (num_chains := int(reaches_BT.sum())):
            break
        hidden_BTD = drafter(
            embedding(tokens_BT, embedding_VD).to(hidden_BTD.dtype),
            hidden_BTD,
            packed.position_ids_BT + depth - 1,
            kv_view=view,
        )
        sums = distribution_sums(
            hidden_BTD[reaches_BT], target_BTD[reaches_BT], lm_head_VD, MAX_CHUNK_LOGITS
        )
        cross_entropy, _, acceptance = (sums / num_chains).tolist()
        agreements.append(
            DepthAgreement(
                num_chains=num_chains, cross_entropy=cross_entropy, top1_acceptance=acceptance
            )
        )
    return agreements


def _shifted(packed: PackedFeatures, shift: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the pair `shift` places on: its token, its target, and whether a chain gets there."""
    segment_BT = packed.segment_BT
    reaches_BT = packed.loss_mask_BT & (segment_BT.roll(-shift, 1) == segment_BT)
    reaches_BT[:, max(len(packed) - shift, 0) :] = False  # rolled around the row's end
    tokens_BT = packed.next_tokens_BT.roll(-shift, 1)
    return tokens_BT, packed.target_hidden_BTD.roll(-shift, 1), reaches_BT


class _ChainView:
    """A `KVView` that keeps the pairs' keys and values, then those of each further depth."""

    def __init__(self, true_mask_TT: Tensor) -> None:
        self._true_mask_TT = true_mask_TT
        self._own_TT = torch.eye(len(true_mask_TT), device=true_mask_TT.device).bool()
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def update(self, layer: int, keys_BHTd: Tensor, values_BHTd: Tensor) -> tuple[Tensor, Tensor]:
        """Append a depth's entries; return all."""
        self._keys.append(keys_BHTd)
        self._values.append(values_BHTd)
        return torch.cat(self._keys, dim=2), torch.cat(self._values, dim=2)

    def additive_mask(self, sliding_window: int | None, dtype: torch.dtype) -> Tensor:
        """[1, 1, T, S]: a chain sees the true pairs up to its start, and its own entries."""
        num_self_fed = len(self._keys) - 1
        visible_TS = torch.cat((self._true_mask_TT, *[self._own_TT] * num_self_fed), dim=1)
        mask_TS = torch.zeros(visible_TS.shape, dtype=dtype, device=visible_TS.device)
        return mask_TS.masked_fill_(~visible_TS, torch.finfo(dtype).min)[None, None]
