"""From logits to a token: the one definition drafting, verification, loss and tests share.

A token is a deterministic function of the target's logits and one uniform, which is itself a
function of (seed, RL step, prompt id, sample index, position): inverse CDF. So a rollout does not
depend on how it was computed, batched or speculated, up to floating-point differences in logits
(laws 1, 2 and 4 of docs/architecture.md).

Filters apply in the order of vLLM and SGLang: temperature, top-k, top-p, min-p, each on the
renormalized outcome of the one before. Shape legend: fastrl/types.py; `*` is any number of leading
dimensions.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from fastrl.types import SamplingParams

_CDF_BLOCK = 1024
# SplitMix64 (Steele, Lea, Flood 2014), its constants as signed 64-bit integers.
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def log_distribution(
    logits: Tensor, sampling: SamplingParams, keep: Tensor | None = None
) -> Tensor:
    """Log-probabilities of the sampling distribution, float32, `-inf` for tokens it excludes.

    Args:
        logits: [*, V], any float dtype.
        sampling: temperature and filters; temperature 0 puts all mass on the most likely token.
        keep: [*] int64, a token of each row that no filter may drop. The policy loss passes the
            sampled token, so that its log-probability stays finite after the policy has moved.
    """
    logits = logits.float()
    if sampling.temperature == 0:
        winner = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, -math.inf).scatter_(-1, winner, 0.0)
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    if is_filtered(sampling):
        dropped = _dropped_tokens(logits.detach(), sampling)
        if keep is not None:
            dropped = dropped.scatter(-1, keep.unsqueeze(-1), False)
        logits = logits.masked_fill(dropped, -math.inf)
    return logits.log_softmax(-1)


def is_filtered(sampling: SamplingParams) -> bool:
    """Whether top-k, top-p or min-p can drop a token."""
    return sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0


def _dropped_tokens(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """[*, V] bool: tokens that the filters exclude; the most likely token never is."""
    dropped = torch.zeros_like(logits, dtype=torch.bool)
    if 0 < sampling.top_k < logits.shape[-1]:
        kth_logit = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        dropped = logits < kth_logit
    if sampling.top_p < 1:
        probs = logits.masked_fill(dropped, -math.inf).softmax(-1)
        sorted_probs, order = probs.sort(dim=-1, descending=True, stable=True)
        mass_before = sorted_probs.cumsum(-1) - sorted_probs
        dropped = dropped | torch.zeros_like(dropped).scatter(
            -1, order, mass_before >= sampling.top_p
        )
    if sampling.min_p > 0:
        best_logit = logits.amax(-1, keepdim=True)
        dropped = dropped | (logits < best_logit + math.log(sampling.min_p))
    return dropped


def sample_inverse_cdf(logprobs: Tensor, uniforms: Tensor) -> Tensor:
    """The token at which the cumulative distribution first exceeds the uniform, [*] int64.

    Args:
        logprobs: [*, V] float32, from `log_distribution`.
        uniforms: [*] float64 in [0, 1).

    Sums run in float64, block by block, so that a vocabulary of 150k tokens loses no tail.
    """
    probs = logprobs.exp().double()
    vocab_size = probs.shape[-1]
    if vocab_size <= _CDF_BLOCK:
        return _first_exceeding(probs, uniforms * probs.sum(-1))
    padding = -vocab_size % _CDF_BLOCK
    blocks = torch.nn.functional.pad(probs, (0, padding))
    blocks = blocks.view(*probs.shape[:-1], -1, _CDF_BLOCK)
    block_mass = blocks.sum(-1)
    threshold = uniforms * block_mass.sum(-1)
    block = _first_exceeding(block_mass, threshold)
    mass_before = (block_mass.cumsum(-1) - block_mass).gather(-1, block.unsqueeze(-1)).squeeze(-1)
    chosen = blocks.gather(-2, block[..., None, None].expand(*block.shape, 1, _CDF_BLOCK)).squeeze(
        -2
    )
    return block * _CDF_BLOCK + _first_exceeding(chosen, threshold - mass_before)


def _first_exceeding(mass: Tensor, threshold: Tensor) -> Tensor:
    """First index whose cumulative mass exceeds the threshold; at most the last with any mass.

    The bound matters when rounding carries the threshold up to the total.
    """
    index = (mass.cumsum(-1) <= threshold.unsqueeze(-1)).sum(-1)
    places = torch.arange(mass.shape[-1], device=mass.device)
    last_with_mass = torch.where(mass > 0, places, 0).amax(-1)
    return torch.minimum(index, last_with_mass)


def request_key(seed: int, rl_step: int, prompt_id: int, sample_index: int) -> int:
    """The signed 64-bit key of a rollout's random stream."""
    name = f"{seed}/{rl_step}/{prompt_id}/{sample_index}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little", signed=True)


def position_uniforms(keys: Tensor, positions: Tensor) -> Tensor:
    """Uniforms in [0, 1), float64: output number `position` of the SplitMix64 stream of each key.

    Args:
        keys: [*] int64, from `request_key`.
        positions: [*] int64, of the token to draw within its response; broadcast against keys.
    """
    state = keys + (positions + 1) * _GOLDEN_GAMMA
    state = (state ^ _shift_right(state, 30)) * _MIX_1
    state = (state ^ _shift_right(state, 27)) * _MIX_2
    state = state ^ _shift_right(state, 31)
    return _shift_right(state, 11).double() * 2.0**-53


def _shift_right(values: Tensor, places: int) -> Tensor:
    """Logical (zero-filling) right shift of int64."""
    return (values >> places) & ((1 << (64 - places)) - 1)
