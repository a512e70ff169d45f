"""Chains by definition: one start, one token at a time; no packing, no cache, no shared forward."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.types import SequenceFeatures


def naive_chains(
    drafter: EagleDrafter,
    embedding_VD: Tensor,
    sequences: list[SequenceFeatures],
    depth: int,
    *,
    is_detached: bool = False,
) -> list[tuple[Tensor, Tensor]]:
    """Hidden states, [D] each, predicted and true, of all chains that reach a depth, in order.

    The drafter runs afresh for each token, over the sequence's true hidden states up to the chain's
    start and what the chain has produced since, with nothing but plain causal attention. Detached,
    what it has produced is a constant where it is read.
    """
    chains = []
    for features in sequences:
        tokens, hidden = features.tokens_T, features.hidden_TD
        for first in range(max(features.num_prompt_tokens, 2), len(tokens) - depth + 1):
            # `first` is the token that depth 1 predicts: true hidden states up to first - 2.
            inputs = list(hidden[: first - 1])
            for token in range(first, first + depth):
                output = drafter(
                    embedding_VD[tokens[1:token]][None],
                    torch.stack(inputs)[None],
                    torch.arange(token - 1)[None],
                )[0, -1]
                inputs.append(output.detach() if is_detached else output)
            chains.append((output, hidden[first + depth - 2]))
    return chains
