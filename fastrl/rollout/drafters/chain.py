"""The drafter's forward along chains: its own hidden states fed back to it, depth by depth.

A chain starts at a pair t of a packed row (packing.py). At depth 1 the drafter reads target hidden
state t and predicts the distribution of token t+2. At depth d it reads the true token t+d and its
own output of depth d-1 in place of target hidden state t+d-1, sees the true pairs up to t and its
own chain, and predicts token t+d+1: what serving asks of it once d-1 drafts were accepted.

All chains of a row run side by side, one forward a depth. The one definition for training
(loss.py) and measurement (agreement.py). Source: HASS (Zhang et al., 2024, arXiv 2408.15766) and
the "training-time test" of EAGLE-3 (Li et al., 2025, arXiv 2503.01840). Leaves out trees. Shape
legend: fastrl/types.py; T counts pairs, A those of all rows, M counts chains.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding

from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.drafters.packing import PackedFeatures


@dataclass(frozen=True, kw_only=True, slots=True)
class ChainDepth:
    """Where the chains of a packed row are at one depth: those that reach it, at least one."""

    predicted_MD: Tensor  # the drafter's hidden states
    target_MD: Tensor  # the target's last ones, of the same tokens
    target_index_M: Tensor  # int64, ascending: which of depth 1's chains has the same target

    def __len__(self) -> int:
        return len(self.predicted_MD)


def chain_depths(
    drafter: EagleDrafter,
    embedding_VD: Tensor,
    packed: PackedFeatures,
    *,
    max_depth: int,
    detaches_depths: bool = False,
) -> Iterator[ChainDepth]:
    """Depths 1, 2, …, as far as a chain of the row reaches, at most `max_depth`.

    Chains start at the pairs of the loss mask; those that would leave their segment end there.
    Gradients flow to the drafter's weights, none to the embedding.

    Args:
        drafter: of the target whose hidden states are packed.
        embedding_VD: the target's token embedding.
        packed: hidden states of the drafter's dtype; a segment's loss mask ends with the segment.
        max_depth: at least 1; 1 is EAGLE's own forward.
        detaches_depths: what the drafter reads of its own is a constant, as in HASS; else gradients
            flow through all depths.
    """
    view = _ChainView(
        packed.attention_mask(), drafter.config.num_attention_heads // drafter.num_kv_heads
    )
    # All before the first forward: a GPU has nothing to finish yet when it is asked for counts.
    places_by_depth = [_places(packed, depth) for depth in range(max_depth)]
    target_AD = packed.target_hidden_BTD[..., : drafter.config.hidden_size].flatten(0, 1)
    index_A = packed.loss_mask_BT.flatten().cumsum(0) - 1
    hidden_BTD = drafter.start(packed.hidden_BTD)
    for shift, places_M in enumerate(places_by_depth):
        if not len(places_M):
            break
        tokens_BT = packed.next_tokens_BT.roll(-shift, 1)
        hidden_BTD = drafter(
            embedding(tokens_BT, embedding_VD.detach()).to(hidden_BTD.dtype),
            hidden_BTD.detach() if detaches_depths and shift else hidden_BTD,
            packed.position_ids_BT + shift,
            kv_view=view,
        )
        yield ChainDepth(
            predicted_MD=hidden_BTD.flatten(0, 1)[places_M],
            target_MD=target_AD[places_M + shift],
            target_index_M=index_A[places_M + shift],
        )


def _places(packed: PackedFeatures, shift: int) -> Tensor:
    """Where the chains start that get `shift` pairs on; counted over all rows, ascending."""
    segment_BT = packed.segment_BT
    reaches_BT = packed.loss_mask_BT & (segment_BT.roll(-shift, 1) == segment_BT)
    reaches_BT[:, max(len(packed) - shift, 0) :] = False  # rolled around the row's end
    return reaches_BT.flatten().nonzero().squeeze(1)


class _ChainView:
    """A `KVView` that keeps the pairs' keys and values, then those of each further depth.

    Args:
        true_mask: [B, 1, T, T] bool, which pairs a chain's start sees.
        num_groups: query heads a key head serves. Keys are repeated for them, for CUDA's
            memory-efficient attention takes no grouped heads, and the fallback keeps all scores.
    """

    def __init__(self, true_mask: Tensor, num_groups: int) -> None:
        self._mask = true_mask
        self._own_entry = torch.eye(
            true_mask.shape[-1], dtype=torch.bool, device=true_mask.device
        ).expand_as(true_mask)
        self._num_groups = num_groups
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def update(self, layer: int, keys_BHTd: Tensor, values_BHTd: Tensor) -> tuple[Tensor, Tensor]:
        """Append a depth's entries; return all."""
        if self._keys:
            self._mask = torch.cat((self._mask, self._own_entry), dim=-1)
        self._keys.append(keys_BHTd.repeat_interleave(self._num_groups, dim=1))
        self._values.append(values_BHTd.repeat_interleave(self._num_groups, dim=1))
        return torch.cat(self._keys, dim=2), torch.cat(self._values, dim=2)

    def additive_mask(self, sliding_window: int | None, dtype: torch.dtype) -> Tensor:
        """[B, 1, T, S]: a chain sees the true pairs up to its start, and its own entries."""
        mask = torch.zeros(self._mask.shape, dtype=dtype, device=self._mask.device)
        return mask.masked_fill_(~self._mask, torch.finfo(dtype).min)
