"""From logits to a token: the one definition drafting, verification, loss and tests share.

A token is a deterministic function of the target's logits and one uniform, which is itself a
function of (seed, RL step, prompt id, sample index, position): inverse CDF. So a rollout does not
depend on how it was computed, batched or speculated, up to floating-point differences in logits
(laws 1, 2 and 4 of docs/architecture.md).

Filters apply in the order of vLLM and SGLang: temperature, top-k, top-p, min-p, each on the
renormalized outcome of the one before. Each is a lowest logit, so that tokens that are equally
likely are kept or dropped together, and none depends on an order of token ids:

- top-k keeps a token than which fewer than k are more likely,
- top-p keeps one if those more likely have less than p of the probability together,
- min-p keeps one that is at least that share as likely as the most likely.

SGLang's rows have parameters of their own (`RowSampling`); all rows of ours have the same. Shape
legend: fastrl/types.py; `*` is any number of leading dimensions, R rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrl.types import SamplingParams

_CDF_BLOCK = 1024
_ROWS_AT_ONCE = 128
"""That are sorted, of a vocabulary of 150k tokens half a GiB with what sorting takes."""
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
        dropped = _dropped_tokens(logits.detach(), RowSampling.alike(sampling, logits.device))
        if keep is not None:
            dropped = dropped.scatter(-1, keep.unsqueeze(-1), False)
        logits = logits.masked_fill(dropped, -math.inf)
    return logits.log_softmax(-1)


def is_filtered(sampling: SamplingParams) -> bool:
    """Whether top-k, top-p or min-p can drop a token."""
    return sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0


@dataclass(frozen=True, kw_only=True, slots=True)
class RowSampling:
    """How each row of a batch samples, on the device; and what of it is known on the host."""

    temperature: Tensor  # [R, 1] float32
    """Not 0 in greedy rows either, where it says nothing."""
    top_k: Tensor  # [R, 1] int64
    """0 keeps all."""
    top_p: Tensor  # [R, 1] float32
    min_p: Tensor  # [R, 1] float32
    is_greedy: Tensor  # [R, 1] bool
    largest_top_k: int
    """At least the largest of any row; 0 if none has one."""
    has_top_p: bool
    """Whether any row may have one below 1."""
    has_min_p: bool
    """Whether any row may have one."""
    has_greedy: bool
    """Whether any row may be greedy."""

    @classmethod
    def alike(cls, sampling: SamplingParams, device: torch.device) -> RowSampling:
        """The same for all rows: tensors of one number."""

        def one(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.full((), value, dtype=dtype, device=device)

        return cls(
            temperature=one(sampling.temperature or 1.0),
            top_k=one(sampling.top_k, torch.int64),
            top_p=one(sampling.top_p),
            min_p=one(sampling.min_p),
            is_greedy=one(sampling.temperature == 0, torch.bool),
            largest_top_k=sampling.top_k,
            has_top_p=sampling.top_p < 1,
            has_min_p=sampling.min_p > 0,
            has_greedy=sampling.temperature == 0,
        )

    def some(self, part: slice) -> RowSampling:
        """Some of the rows."""
        return self._changed(lambda one_R1: one_R1[part])

    def repeated(self, times: int) -> RowSampling:
        """Each row so many times, one after the other."""
        return self._changed(lambda one_R1: one_R1.repeat_interleave(times, 0))

    def _changed(self, change: Callable[[Tensor], Tensor]) -> RowSampling:
        return dataclasses.replace(
            self,
            temperature=change(self.temperature),
            top_k=change(self.top_k),
            top_p=change(self.top_p),
            min_p=change(self.min_p),
            is_greedy=change(self.is_greedy),
        )


def exclude_tokens_(logits_RV: Tensor, sampling: RowSampling) -> None:
    """Set the logits of tokens that a row's sampling excludes to -inf; others stay as they are.

    Afterwards `softmax(logits / temperature)` is what `log_distribution` says, and a greedy row has
    one token left. Rows are taken a few at a time, since sorting them takes several times their
    memory; nothing waits for the device.
    """
    for start in range(0, len(logits_RV), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        some_RV, rows = logits_RV[part], sampling.some(part)
        dropped_RV = _dropped_tokens(some_RV.float() / rows.temperature, rows)
        if rows.has_greedy:
            best_R1 = some_RV.argmax(-1, keepdim=True)
            all_others_RV = torch.ones_like(dropped_RV).scatter_(-1, best_R1, False)
            dropped_RV = torch.where(rows.is_greedy, all_others_RV, dropped_RV)
        some_RV.masked_fill_(dropped_RV, -math.inf)


def _dropped_tokens(logits: Tensor, rows: RowSampling) -> Tensor:
    """[*, V] bool: tokens that the filters exclude; the most likely token never is.

    Args:
        logits: [*, V] float32, divided by the temperature.
        rows: of each row, or of all alike.
    """
    lowest = logits.new_full((*logits.shape[:-1], 1), -math.inf)
    if rows.largest_top_k > 0:
        lowest = _lowest_of_top_k(logits, rows)
    if rows.has_top_p:
        left = logits.masked_fill(logits < lowest, -math.inf)
        lowest = torch.maximum(lowest, _lowest_of_top_p(left, rows))
    if rows.has_min_p:
        lowest = torch.maximum(lowest, logits.amax(-1, keepdim=True) + rows.min_p.log())
    return logits < lowest


def _lowest_of_top_k(logits: Tensor, rows: RowSampling) -> Tensor:
    """[*, 1]: the k-th best logit; -inf where all are kept."""
    best = logits.topk(min(rows.largest_top_k, logits.shape[-1]), dim=-1).values
    place = (rows.top_k - 1).clamp(0, best.shape[-1] - 1).expand(*best.shape[:-1], 1)
    return torch.where(rows.top_k > 0, best.gather(-1, place), -math.inf)


def _lowest_of_top_p(logits: Tensor, rows: RowSampling) -> Tensor:
    """[*, 1]: the lowest logit of the smallest set of best ones; -inf where all are kept."""
    ordered = logits.sort(dim=-1, descending=True).values
    probs = ordered.softmax(-1)
    mass_before = probs.cumsum(-1) - probs
    num_kept = (mass_before < rows.top_p).sum(-1, keepdim=True)
    last = (num_kept - 1).clamp(min=0)  # of logits that are no numbers none is kept
    return torch.where(rows.top_p < 1, ordered.gather(-1, last), -math.inf)


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
