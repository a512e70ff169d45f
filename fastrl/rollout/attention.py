"""The attention function registered with transformers: attends over our KV cache under a tree mask.

transformers' decoder layers call it with fresh queries, keys and values; keyword arguments of the
model's forward reach it unchanged, and `kv_view` among them says where keys and values go and what
each query may see. Without a `kv_view` it is plain SDPA, so the same module also trains.

`attend` is that attention itself, for forwards that are not transformers' too.

Source: transformers' `AttentionInterface` (docs: attention_interface). Shape legend: types.py.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

CACHED_ATTENTION = "fastrl_cached"
"""Name under which the function is registered: a config's `_attn_implementation`."""


_UNSUPPORTED = ("s_aux", "softcap")
"""Arguments of transformers' attention functions that change its result: sinks, capped scores."""
_MOST_FOLDED = 16
"""Queries up to which a CPU gains by folding: beyond, its kernel is as fast without."""


class KVView(Protocol):
    """Where one forward pass writes its keys and values, and what its queries may see."""

    def update(self, layer: int, keys_BHTd: Tensor, values_BHTd: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new entries; return all visible ones, [B, H, S, d] each."""
        ...

    def additive_mask(self, sliding_window: int | None, dtype: torch.dtype) -> Tensor | None:
        """[B, 1, T, S]: 0 where a query may see a key, dtype's lowest elsewhere; None: sees all."""
        ...


def cached_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    kv_view: KVView | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over `kv_view`; returns ([B, T, H, d], None), as transformers expects.

    Args:
        query: [B, H, T, d]; key, value: [B, H_kv, T, d], rotary embedding applied.
        attention_mask: used only without a `kv_view`, as SDPA does.
    """
    if kv_view is None:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    if unknown := [name for name in _UNSUPPORTED if kwargs.get(name) is not None]:
        raise ValueError(
            f"{type(module).__name__} asks for attention with {unknown}, which the embedded engine "
            f"does not compute; use the SGLang engine for this architecture"
        )
    keys, values = kv_view.update(module.layer_idx, key, value)  # type: ignore[arg-type]
    mask = kv_view.additive_mask(sliding_window, query.dtype)
    return attend(query, keys, values, mask, scaling).transpose(1, 2), None


def attend(
    query_BHTd: Tensor,
    keys_BHSd: Tensor,
    values_BHSd: Tensor,
    mask_B1TS: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Attention of grouped query heads, [B, H, T, d].

    PyTorch's kernel for CPUs reads keys and values once for each query head, and slowly where
    there are few queries. There the query heads that share a key head become queries of one head:
    the same sums in the same order.

    Args:
        query_BHTd: of H heads, a multiple of those of keys and values; consecutive ones share one.
        mask_B1TS: added to the scores; None for none.
        scale: of the scores; None for 1 / sqrt(d).
    """
    num_rows, num_heads, num_tokens, head_dim = query_BHTd.shape
    group_size = num_heads // keys_BHSd.shape[1]
    is_folded = group_size > 1 and num_tokens <= _MOST_FOLDED and query_BHTd.device.type == "cpu"
    if is_folded:
        query_BHTd = query_BHTd.reshape(num_rows, -1, group_size * num_tokens, head_dim)
        if mask_B1TS is not None:
            mask_B1TS = mask_B1TS.repeat(1, 1, group_size, 1)
    output_BHTd = scaled_dot_product_attention(
        query_BHTd,
        keys_BHSd,
        values_BHSd,
        attn_mask=mask_B1TS,
        scale=scale,
        enable_gqa=group_size > 1 and not is_folded,
    )
    if is_folded:
        output_BHTd = output_BHTd.reshape(num_rows, num_heads, num_tokens, head_dim)
    return output_BHTd


AttentionInterface.register(CACHED_ATTENTION, cached_attention)
AttentionMaskInterface.register(CACHED_ATTENTION, sdpa_mask)
