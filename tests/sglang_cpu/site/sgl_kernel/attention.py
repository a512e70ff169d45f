"""Attention over the token pool, request by request: SGLang's `intel_amx` backend calls it.

Keys and values stand where `req_to_token[request, position]` says. Leaves out cross-attention,
attention sinks, encoders and quantized caches.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention


def register():
    """SGLang takes these two from torch.ops."""
    torch.ops.sgl_kernel.extend_attention_cpu = _as_called(extend_attention_cpu, 6, 20)
    torch.ops.sgl_kernel.decode_attention_cpu = _as_called(decode_attention_cpu, 3, 17)


def _as_called(kernel, scales_at, num_older):
    """The kernel as 0.5.19 calls it too: without scales of the cache, `num_older` arguments."""

    def call(*args):
        if len(args) == num_older:
            args = (*args[:scales_at], None, None, *args[scales_at:])
        return kernel(*args)

    return call


def extend_attention_cpu(
    q_THd,
    k_THd,
    v_THd,
    output_THd,
    key_buffer,
    value_buffer,
    key_scale,
    value_scale,
    req_to_token,
    req_pool_indices,
    seq_lens,
    extend_seq_lens,
    extend_start_loc,
    max_extend_len,
    scaling,
    logit_cap,
    is_cross_attention,
    sliding_window,
    encoder_lens,
    sinks,
    tree_mask,
    is_causal,
):
    """New tokens of each request see its cache and one another, causally or by the tree's mask."""
    _check_supported(logit_cap, is_cross_attention, encoder_lens, sinks)
    for index, (request, length, num_new, start) in enumerate(
        zip(
            req_pool_indices.tolist(),
            seq_lens.tolist(),
            extend_seq_lens.tolist(),
            extend_start_loc.tolist(),
            strict=True,
        )
    ):
        places = req_to_token[request, :length].long()
        keys, values = key_buffer[places], value_buffer[places]  # copies
        new = slice(start, start + num_new)
        if k_THd is not None:
            keys[length - num_new :] = k_THd.view(-1, *keys.shape[1:])[new]
            values[length - num_new :] = v_THd.view(-1, *values.shape[1:])[new]
        mask_TS = None
        if is_causal:
            mask_TS = _mask(tree_mask, index, num_new, length, sliding_window)
        output_THd[new] = _attend(q_THd[new], keys, values, scaling, mask_TS)


def decode_attention_cpu(
    q_BHd,
    key_buffer,
    value_buffer,
    key_scale,
    value_scale,
    output_BHd,
    k_BHd,
    v_BHd,
    out_cache_loc,
    attn_logits,
    req_to_token,
    req_pool_indices,
    seq_lens,
    scaling,
    logit_cap,
    is_cross_attention,
    sliding_window,
    encoder_lens,
    sinks,
):
    """One new token a request, written to the cache first."""
    _check_supported(logit_cap, is_cross_attention, encoder_lens, sinks)
    if k_BHd is not None:
        key_buffer[out_cache_loc] = k_BHd.view(-1, *key_buffer.shape[1:])
        value_buffer[out_cache_loc] = v_BHd.view(-1, *value_buffer.shape[1:])
    for index, (request, length) in enumerate(
        zip(req_pool_indices.tolist(), seq_lens.tolist(), strict=True)
    ):
        first = max(0, length - sliding_window) if sliding_window > 0 else 0
        places = req_to_token[request, first:length].long()
        row = slice(index, index + 1)
        output_BHd[row] = _attend(
            q_BHd[row], key_buffer[places], value_buffer[places], scaling, mask_TS=None
        )


def _check_supported(logit_cap, is_cross_attention, encoder_lens, sinks):
    if logit_cap or is_cross_attention or encoder_lens is not None or sinks is not None:
        raise NotImplementedError("tests/sglang_cpu attends within plain decoders only")


def _mask(tree_mask, index, num_new, length, sliding_window):
    """[T, S] bool: what new tokens see. The mask of a tree holds its own nodes only, [B, N, N]."""
    if tree_mask is None:
        among_new = torch.ones(num_new, num_new, dtype=torch.bool).tril()
    else:
        among_new = tree_mask.view(-1, num_new, num_new)[index].bool()
    num_cached = length - num_new
    mask_TS = torch.cat([torch.ones(num_new, num_cached, dtype=torch.bool), among_new], dim=1)
    if sliding_window > 0:
        positions = torch.arange(length)
        mask_TS &= positions > positions[num_cached:, None] - sliding_window
    return mask_TS


def _attend(q_THd, k_SHd, v_SHd, scaling, mask_TS):
    group = q_THd.shape[1] // k_SHd.shape[1]
    q, k, v = (
        heads.transpose(0, 1).repeat_interleave(repeats, 0)
        for heads, repeats in ((q_THd, 1), (k_SHd, group), (v_SHd, group))
    )
    output = scaled_dot_product_attention(q[None], k[None], v[None], mask_TS, scale=scaling)
    return output[0].transpose(0, 1)
