"""Where tokens stand in the cache: rows of the token pool, filled, read and moved."""

import ctypes

import torch


def assign_req_to_token_pool_cpu(
    req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, pool_len
):
    """Write new places into each request's row, from its start to its end."""
    taken = 0
    for row, start, end in _ranges(req_pool_indices, start_offset, end_offset):
        places = out_cache_loc[taken : taken + end - start]
        req_to_token[row, start:end] = places.to(req_to_token.dtype)
        taken += end - start


def assign_extend_cache_locs_cpu(
    req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, pool_len
):
    """Read the places from each request's start to its end, one request after the other."""
    given = 0
    for row, start, end in _ranges(req_pool_indices, start_offset, end_offset):
        places = req_to_token[row, start:end]
        out_cache_loc[given : given + end - start] = places.to(out_cache_loc.dtype)
        given += end - start


def assign_draft_cache_locs_contiguous_cpu(
    req_pool_indices, req_to_token, seq_lens, out_cache_loc, pool_len, topk, num_steps
):
    """Read the topk * num_steps places after each request's tokens."""
    count = topk * num_steps
    assign_extend_cache_locs_cpu(
        req_pool_indices, req_to_token, seq_lens, seq_lens + count, out_cache_loc, pool_len
    )


def build_draft_decode_metadata_cpu(
    req_to_token, req_pool_indices, seq_lens, topk, num_steps, pool_len
):
    """[B * topk, P]: a row for each branch, of its request's tokens and the branch's own places."""
    rows_BP = req_to_token[req_pool_indices.long()]
    branches = rows_BP.repeat_interleave(topk, 0)
    for request, length in enumerate(seq_lens.tolist()):
        own = rows_BP[request, length : length + topk * num_steps].view(topk, num_steps)
        branches[request * topk : (request + 1) * topk, length : length + num_steps] = own
    return branches


def copy_all_layer_kv_cache_cpu(data_ptrs, strides, tgt_loc, src_loc):
    """Move cache entries in every layer's buffer, given as address and bytes an entry."""
    targets, sources = tgt_loc.tolist(), src_loc.tolist()
    for address, size in zip(data_ptrs.tolist(), strides.tolist(), strict=True):
        entries = [ctypes.string_at(address + source * size, size) for source in sources]
        for target, entry in zip(targets, entries, strict=True):
            ctypes.memmove(address + target * size, entry, size)


def fill_accept_out_cache_loc_cpu(accept_index, out_cache_loc, accept_out_cache_loc):
    """Places of the accepted nodes, moved to the front."""
    accepted = accept_index.flatten()
    accepted = accepted[accepted >= 0].long()
    places = out_cache_loc[accepted].to(accept_out_cache_loc.dtype)
    accept_out_cache_loc[: accepted.numel()] = places


def fill_bonus_tokens_cpu(accept_tokens, accept_lens, bonus_tokens, stride):
    """The last accepted token of each request, each having `stride` places."""
    last = torch.arange(accept_lens.numel()) * stride + accept_lens.long() - 1
    bonus_tokens.copy_(accept_tokens.flatten()[last].to(bonus_tokens.dtype))


def rotate_input_ids_cpu(input_ids, start_loc, seq_lens, topk_index, select_index=None):
    """Shift each request's tokens one to the left, and put its drafted token at the end."""
    for request, (start, length) in enumerate(
        zip(start_loc.tolist(), seq_lens.tolist(), strict=True)
    ):
        if length == 0:
            continue
        input_ids[start : start + length - 1] = input_ids[start + 1 : start + length].clone()
        last = start + length - 1 if select_index is None else int(select_index[request])
        input_ids[last] = topk_index.flatten()[request]


def _ranges(rows, starts, ends):
    return zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True)
