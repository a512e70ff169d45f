"""Attention of grouped heads, folded or not, against a loop over heads in float64."""

import pytest
import torch

from fastrl.rollout.attention import attend


@pytest.mark.parametrize("num_tokens", [1, 3, 16, 17])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("is_masked", [True, False], ids=["masked", "all visible"])
def test_query_heads_attend_to_their_group_s_keys(num_heads, num_kv_heads, num_tokens, is_masked):
    torch.manual_seed(0)
    num_rows, num_columns, head_dim = 2, 23, 8
    # Strided as the engine's: queries by token, keys a part of the cache.
    query = torch.randn(num_rows, num_tokens, num_heads, head_dim).transpose(1, 2)
    keys, values = (
        torch.randn(num_rows, 40, num_kv_heads, head_dim)[:, :num_columns].transpose(1, 2)
        for _ in range(2)
    )
    mask = None
    if is_masked:
        hidden = torch.rand(num_rows, 1, num_tokens, num_columns) < 0.4
        hidden[..., 0] = False
        mask = hidden * torch.finfo(torch.float32).min
    attended = attend(query, keys, values, mask, 0.3)
    for head in range(num_heads):
        group = head // (num_heads // num_kv_heads)
        scores = 0.3 * query[:, head].double() @ keys[:, group].double().transpose(1, 2)
        if mask is not None:
            scores = scores + mask[:, 0].double()
        expected = scores.softmax(-1) @ values[:, group].double()
        torch.testing.assert_close(attended[:, head].double(), expected, rtol=1e-5, atol=1e-6)
