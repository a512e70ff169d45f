"""Between our records and SGLang's: sampling parameters out, rollouts and statistics in.

Pure functions. How tokens are sampled is settled in SGLang's scheduler (sglang_filters.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fastrl.rollout.sglang_filters import sglang_filters
from fastrl.rollout.sglang_process import RawResponse
from fastrl.types import (
    OFF,
    DraftStrategy,
    EngineStats,
    FinishReason,
    Prompt,
    Rollout,
    SamplingParams,
)

_NO_NUMBERS = "NaN happened"
_NO_PROBABILITY = -1e30
"""SGLang reports the lowest number there is instead of -inf."""
_MARGIN = 2
"""SGLang ends a response that many tokens before the model's context, or its cache's end."""


def longest_sequence(max_context: int, strategies: Sequence[DraftStrategy]) -> int:
    """Most tokens of prompt and response together.

    With speculation SGLang keeps room for a whole draft tree within the model's context, one as
    deep, as wide and as large as any of the strategies. It reserves twice that much cache at each
    step, and notes it in rows that are 4 and a tree's tokens longer than the context: unchecked, a
    wide tree's reserve would be noted in the next request's row.
    """
    num_drafted = num_reserved(strategies)
    verify_tokens = max(one.verify_tokens for one in strategies)
    beyond_row = 2 * num_drafted - verify_tokens - 4 if num_drafted > 1 else 0
    return max_context - max(_MARGIN, num_drafted, beyond_row)


def num_reserved(strategies: Sequence[DraftStrategy]) -> int:
    """Tokens that SGLang keeps room for at a decode step of any of the strategies."""
    num_drafted = max(one.topk for one in strategies) * max(one.depth for one in strategies)
    return max(num_drafted, *(one.verify_tokens for one in strategies))


def sglang_sampling(
    sampling: SamplingParams,
    *,
    num_prompt_tokens: int,
    max_sequence: int,
    eos_token_ids: Sequence[int],
    key: int,
) -> dict[str, Any]:
    """SGLang's sampling parameters for one request; `key` seeds its randomness."""
    return {
        **sglang_filters(sampling),
        "max_new_tokens": min(sampling.max_tokens, max_sequence - num_prompt_tokens),
        "stop": list(sampling.stop) or None,
        "stop_token_ids": [*eos_token_ids, *sampling.stop_token_ids],
        "ignore_eos": sampling.ignore_eos,
        "sampling_seed": key,
        "skip_special_tokens": False,  # stop strings may hold them, as chat templates do
        "no_stop_trim": True,
    }


def check_prompt(
    prompt: Prompt,
    *,
    max_sequence: int,
    pool_tokens: int,
    max_tokens: int,
    strategies: Sequence[DraftStrategy] = (OFF,),
) -> None:
    """Raise ValueError for a prompt that leaves no room for a response, in context or cache.

    SGLang gives a request up if the cache cannot hold it and what a decode step reserves, which is
    twice what the largest of its draft trees takes.
    """
    num_tokens = len(prompt.tokens)
    if not 0 < num_tokens < max_sequence:
        raise ValueError(
            f"prompt {prompt.prompt_id} has {num_tokens} tokens; expected 1 or more, and fewer "
            f"than the {max_sequence} that SGLang takes of the model's context, so that a response "
            f"fits: filter long prompts (data.max_prompt_tokens)"
        )
    longest = min(num_tokens + max_tokens, max_sequence)
    num_drafted = 0 if all(one.is_off for one in strategies) else 2 * num_reserved(strategies)
    if longest + num_drafted > pool_tokens - _MARGIN:
        drafts = f", and draft trees {num_drafted}" if num_drafted else ""
        raise ValueError(
            f"prompt {prompt.prompt_id} and its response may take {longest} tokens{drafts}, but "
            f"SGLang's cache holds {pool_tokens}, and would give the response up; raise "
            f"engine.mem_fraction_static, or lower sampling.max_tokens"
        )


def as_rollout(
    raw: RawResponse,
    prompt: Prompt,
    sample_index: int,
    *,
    sampling: SamplingParams,
    text: str,
    policy_version: int,
) -> Rollout:
    """One response as the contract has it.

    What the last step verified beyond the response's end is taken off. Without FastRL's plugin,
    SGLang tells how many verification steps accepted how many tokens, not in which order:
    `accept_lengths` are then sorted.

    Raises:
        FloatingPointError: the policy's logits were not numbers, or a token had no probability.
        RuntimeError: SGLang gave the request up, or hidden states of some tokens are missing.
    """
    name = f"prompt {prompt.prompt_id}, sample {sample_index}"
    if raw.finish_detail == _NO_NUMBERS or np.isnan(raw.logprobs).any():
        raise FloatingPointError(
            f"{name}: the policy's logits are not numbers; its weights are broken, or the engine's "
            f"dtype is too narrow for them"
        )
    if raw.finish_type == "abort":
        raise RuntimeError(
            f"{name}: SGLang gave the request up ({raw.finish_detail}). No rollout of this call is "
            f"kept; the engine goes on"
        )
    num_rows = len(prompt.tokens) + len(raw.tokens) - 1
    if raw.hidden_TD is not None and len(raw.hidden_TD) != num_rows:
        raise RuntimeError(
            f"{name}: SGLang returned hidden states of {len(raw.hidden_TD)} tokens instead of "
            f"{num_rows}: FastRL's plugin, which keeps those of all chunks of a prefill, does not "
            f"run in it; is it left out by the variable SGLANG_PLUGINS?"
        )
    return Rollout(
        prompt=prompt,
        sample_index=sample_index,
        tokens=raw.tokens,
        logprobs=_logprobs(raw, sampling, name),
        text=text,
        finish_reason=FinishReason(raw.finish_type),
        policy_version=policy_version,
        accept_lengths=_accept_lengths(raw),
        num_verify_steps=sum(raw.steps_by_num_accepted)
        if raw.steps is None
        else raw.steps.num_verify_steps,
        hidden_states=None if raw.hidden_TD is None else torch.from_numpy(raw.hidden_TD),
    )


def counted_statistics(
    counted: EngineStats, raws: Sequence[RawResponse], *, num_prompt_tokens: int, seconds: float
) -> EngineStats:
    """What a call did, its steps as FastRL's plugin counted them.

    Args:
        counted: all steps, those of other ranks' responses included; its counts by strategy and by
            depth are kept.
        raws: this rank's responses.
        num_prompt_tokens: of the prompts, cached ones included.
        seconds: of the call.
    """
    steps = [raw.steps for raw in raws if raw.steps is not None]
    num_plain_steps = sum(len(one.accept_lengths) - one.num_verify_steps for one in steps)
    return dataclasses.replace(
        counted,
        num_rollouts=len(raws),
        num_tokens=sum(len(raw.tokens) for raw in raws),
        num_prompt_tokens=num_prompt_tokens - sum(raw.num_cached_tokens for raw in raws),
        seconds=seconds,
        row_steps=sum(one.num_verify_steps for one in steps),
        accepted_tokens=sum(sum(one.accept_lengths) for one in steps) - num_plain_steps,
    )


def statistics(
    raws: Sequence[RawResponse],
    steps_by_num_accepted: Mapping[int, int],
    strategy: DraftStrategy,
    *,
    num_prompt_tokens: int,
    seconds: float,
) -> EngineStats:
    """What a call did, as far as SGLang tells.

    It does not tell how many steps it took for the whole batch: `num_steps` are those of the
    rollout that took most, which is exact while all run side by side. Prefill and draft seconds
    stay 0.

    Args:
        raws: this rank's responses.
        steps_by_num_accepted: of all ranks' responses, from which counts by depth come.
        strategy: of every step.
        num_prompt_tokens: of the prompts, cached ones included.
        seconds: of the call.
    """
    num_steps = max((len(_accept_lengths(raw)) for raw in raws), default=0)
    num_tokens = sum(len(raw.tokens) for raw in raws)
    return EngineStats(
        num_rollouts=len(raws),
        num_tokens=num_tokens,
        num_prompt_tokens=num_prompt_tokens - sum(raw.num_cached_tokens for raw in raws),
        num_steps=num_steps,
        seconds=seconds,
        steps_by_strategy={str(strategy): num_steps} if num_steps else {},
        row_steps=sum(sum(raw.steps_by_num_accepted) for raw in raws),
        accepted_tokens=0 if strategy.is_off else num_tokens - len(raws),
        offered_by_depth=_at_least(steps_by_num_accepted, range(strategy.depth)),
        accepted_by_depth=_at_least(steps_by_num_accepted, range(1, strategy.depth + 1)),
    )


def _at_least(counts: Mapping[int, int], thresholds: range) -> tuple[int, ...]:
    return tuple(
        sum(count for value, count in counts.items() if value >= threshold)
        for threshold in thresholds
    )


def _accept_lengths_in_order(lengths: Sequence[int], num_decoded: int) -> tuple[int, ...]:
    """Those of the tokens that were kept. A response that SGLang set aside for want of cache comes
    back by a prefill, whose token counts as one of a step of its own."""
    kept: list[int] = []
    rest = num_decoded
    for length in lengths:
        if not rest:
            break
        kept.append(min(length, rest))
        rest -= kept[-1]
    return (*kept, *(1 for _ in range(rest)))


def _logprobs(raw: RawResponse, sampling: SamplingParams, name: str) -> tuple[float, ...]:
    """Under the distribution that was sampled from, its filters included."""
    if sampling.temperature == 0:
        return (0.0,) * len(raw.tokens)  # it has all its mass on one token
    if min(raw.logprobs, default=0.0) < _NO_PROBABILITY:
        raise FloatingPointError(
            f"{name}: SGLang sampled a token that temperature, top_k, top_p and min_p leave no "
            f"probability; no rollout of this call is kept"
        )
    return raw.logprobs


def _accept_lengths(raw: RawResponse) -> tuple[int, ...]:
    """Tokens of each decode step; the first token comes from the prefill."""
    num_decoded = len(raw.tokens) - 1
    if raw.steps is not None:
        return _accept_lengths_in_order(raw.steps.accept_lengths, num_decoded)
    if not raw.steps_by_num_accepted:
        return (1,) * num_decoded
    lengths = [
        num_accepted + 1
        for num_accepted, num_steps in enumerate(raw.steps_by_num_accepted)
        for _ in range(num_steps)
    ]
    for _ in range(sum(lengths) - num_decoded):
        lengths[lengths.index(max(lengths))] -= 1
    return tuple(sorted(lengths))
