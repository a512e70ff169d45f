"""What a drafter of a fixed target trains on: the target's hidden states of given token sequences.

The hidden state is that of co-training (modules/base.py): the base model's last one, after the
final norm, with what else the drafter reads beside it, from a forward without a mask over rows
padded on the right, where causal attention never looks. Which sequences share a forward depends on
the sequences given alone, so the same call gives the same numbers, to the bit, on the same machine.

Leaves out precision (the caller's autocast) and storage. Shape legend: fastrl/types.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from fastrl.rollout.drafters.states import inputs_of_layers
from fastrl.types import SequenceFeatures, TokenSequence


@torch.no_grad()
def sequence_features(
    target: PreTrainedModel,
    sequences: Sequence[TokenSequence],
    *,
    max_tokens: int,
    layers: Sequence[int] = (),
    dtype: torch.dtype | None = None,
) -> list[SequenceFeatures]:
    """Features of each sequence, in order, on the target's device.

    Args:
        target: in evaluation mode.
        sequences: tokens on any device.
        max_tokens: of a forward, padding included; a longer sequence is one of its own.
        layers: whose inputs the drafter reads besides.
        dtype: of the hidden states; None: as the target gives them.
    """
    hidden_TD: dict[int, Tensor] = {}
    for members in micro_batches([len(sequence) for sequence in sequences], max_tokens):
        rows = [sequences[index].tokens_T for index in members]
        tokens_BT = pad_sequence(rows, batch_first=True).to(target.device)
        with inputs_of_layers(target.base_model, layers) as inputs:
            output = target.base_model(input_ids=tokens_BT, use_cache=False)
        states = [output.last_hidden_state, *(inputs[layer] for layer in layers)]
        states_BTS = torch.cat([one.to(dtype or one.dtype) for one in states], dim=-1)
        for index, row_TD in zip(members, states_BTS, strict=True):
            hidden_TD[index] = row_TD[: len(sequences[index])].clone()
    return [
        SequenceFeatures(
            tokens_T=sequence.tokens_T.to(target.device),
            hidden_TD=hidden_TD[index],
            num_prompt_tokens=sequence.num_prompt_tokens,
            rl_step=0,
        )
        for index, sequence in enumerate(sequences)
    ]


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices by forward, the longest first, so that rows of about one length share it."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
