"""Logits and tokens of a draft head, with and without a bias, against indexing by hand."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.drafters.eagle3 import Eagle3Drafter
from fastrl.rollout.torch_engine.draft_head import DraftHead

CONFIG = LlamaConfig(
    vocab_size=11,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=3,
    num_attention_heads=2,
)
TOKENS = [1, 4, 9]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("tokens", [None, TOKENS])
def test_logits_are_the_targets_of_the_vocabulary(has_bias: bool, tokens: list[int] | None) -> None:
    torch.manual_seed(0)
    lm_head = nn.Linear(8, 11, bias=has_bias)
    drafter = EagleDrafter.for_target(CONFIG, seed=0)
    if tokens is not None:
        drafter.trim_vocabulary(tokens)
    head, hidden = DraftHead(drafter, lm_head), torch.randn(2, 3, 8)
    places = tokens or list(range(11))
    for _ in range(2):
        with torch.no_grad():
            logits = head.logits(hidden)
            assert logits.shape == (2, 3, len(places))
            torch.testing.assert_close(logits, lm_head(hidden)[..., places])
            lm_head.weight.mul_(-2)  # as a publication does
            if has_bias:
                lm_head.bias.add_(3)
        head.refresh()
    assert head.tokens(torch.tensor([[0, 2]])).tolist() == [[places[0], places[2]]]


@pytest.mark.parametrize("tokens", [None, TOKENS])
def test_an_eagle_3_drafter_has_its_own(tokens: list[int] | None) -> None:
    torch.manual_seed(0)
    drafter = Eagle3Drafter.for_target(CONFIG, seed=0, token_ids=tokens)
    head, hidden = DraftHead(drafter, nn.Linear(8, 11)), torch.randn(2, 8)
    expected = drafter.lm_head(drafter.norm(hidden))
    torch.testing.assert_close(head.logits(hidden), expected)
    assert head.tokens(torch.tensor([1])).tolist() == [4 if tokens else 1]
