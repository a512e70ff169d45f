"""A tiny EAGLE drafter, the weights it shares with its target, and sequences to train it on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.types import SequenceFeatures

VOCAB_SIZE, HIDDEN_SIZE = 11, 8


@pytest.fixture
def drafter() -> EagleDrafter:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
    )
    return EagleDrafter.for_target(config, seed=0)


@pytest.fixture
def shared_weights() -> tuple[Tensor, Tensor]:
    """Embedding and LM head that would take a gradient if they were given one."""
    generator = torch.Generator().manual_seed(1)
    embedding_VD = torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=generator)
    lm_head_VD = torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=generator)
    return embedding_VD.requires_grad_(), lm_head_VD.requires_grad_()


def random_sequences(*sizes: tuple[int, int]) -> list[SequenceFeatures]:
    """Of (tokens, prompt tokens) each."""
    generator = torch.Generator().manual_seed(2)
    return [
        SequenceFeatures(
            tokens_T=torch.randint(VOCAB_SIZE, (num_tokens,), generator=generator),
            hidden_TD=torch.randn(num_tokens, HIDDEN_SIZE, generator=generator),
            num_prompt_tokens=num_prompt_tokens,
            rl_step=0,
        )
        for num_tokens, num_prompt_tokens in sizes
    ]
