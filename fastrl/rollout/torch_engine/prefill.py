"""Reads prompts once each: cache entries, hidden states and first-token distribution of a group.

Shape legend: fastrl/types.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrl.rollout.sampling import log_distribution
from fastrl.rollout.torch_engine.cache_views import CausalView
from fastrl.rollout.torch_engine.drafting import Drafting
from fastrl.rollout.torch_engine.target import TargetModel
from fastrl.types import Prompt, SamplingParams

_MAX_PADDED_TOKENS = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptState:
    """What every sample of a prompt starts from."""

    cache_entries: Tensor  # [L, 2, T, H, d]
    hidden_TD: Tensor
    first_logprobs_V: Tensor  # sampling distribution of the first response token
    draft_state: Tensor | None  # from Drafting.prefill


def prefill(
    target: TargetModel,
    drafting: Drafting | None,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
) -> list[PromptState]:
    """States of some prompts, in order; padded batches of a bounded number of tokens."""
    states: list[PromptState] = []
    for batch in _token_bounded(prompts):
        states += _prefill_batch(target, drafting, batch, sampling)
    return states


def _token_bounded(prompts: Sequence[Prompt]) -> Iterator[list[Prompt]]:
    batch: list[Prompt] = []
    longest = 0
    for prompt in prompts:
        longest = max(longest, len(prompt.tokens))
        if batch and longest * (len(batch) + 1) > _MAX_PADDED_TOKENS:
            yield batch
            batch, longest = [], len(prompt.tokens)
        batch.append(prompt)
    if batch:
        yield batch


def _prefill_batch(
    target: TargetModel,
    drafting: Drafting | None,
    prompts: list[Prompt],
    sampling: SamplingParams,
) -> list[PromptState]:
    lengths = [len(prompt.tokens) for prompt in prompts]
    num_rows, longest = len(prompts), max(lengths)
    tokens_BT = torch.zeros(num_rows, longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : lengths[row]] = torch.tensor(prompt.tokens)
    tokens_BT = tokens_BT.to(target.device)
    positions_BT = torch.arange(longest, device=target.device).expand(num_rows, -1)
    scratch = target.new_cache(num_rows)
    scratch.reserve(longest, 0)
    view = CausalView(
        scratch,
        base_B=torch.zeros(num_rows, dtype=torch.int64, device=target.device),
        longest_base=0,
        num_tokens=longest,
    )
    hidden_BTD = target.forward(tokens_BT, positions_BT, view)
    last_B = torch.tensor(lengths, device=target.device) - 1
    last_hidden_BD = hidden_BTD[torch.arange(num_rows, device=target.device), last_B]
    first_logprobs_BV = log_distribution(target.logits(last_hidden_BD), sampling)
    draft_states: list[Tensor] | list[None] = [None] * num_rows
    if drafting is not None:
        draft_states = drafting.prefill(tokens_BT, hidden_BTD, lengths)
    return [
        PromptState(
            cache_entries=scratch.view_row(row, length),
            hidden_TD=hidden_BTD[row, :length],
            first_logprobs_V=first_logprobs_BV[row],
            draft_state=draft_states[row],
        )
        for row, length in enumerate(lengths)
    ]
