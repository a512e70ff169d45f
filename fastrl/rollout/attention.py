"""The attention function registered with transformers: attends over our KV cache under a tree mask.

transformers' decoder layers call it with fresh queries, keys and values; keyword arguments of the
model's forward reach it unchanged, and `kv_view` among them says where keys and values go and what
each query may see. Without a `kv_view` it is plain SDPA, so the same module also trains.

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
    output = scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=kv_view.additive_mask(sliding_window, query.dtype),
        scale=scaling,
        enable_gqa=query.shape[1] != keys.shape[1],
    )
    return output.transpose(1, 2), None


AttentionInterface.register(CACHED_ATTENTION, cached_attention)
AttentionMaskInterface.register(CACHED_ATTENTION, sdpa_mask)
