"""Log-probabilities and entropies of response tokens, float32, from hidden states and the LM head.

The distribution is the rollout's own (`log_distribution`: temperature and filters), so that the
policy that is trained is the one that sampled. Only response tokens go through the head, and in
chunks, each recomputed in the backward: memory does not grow with tokens times vocabulary. Shape
legend: fastrl/types.py; N: response tokens of all rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastrl.rollout.sampling import log_distribution
from fastrl.types import SamplingParams

LOGITS_PER_CHUNK = 1 << 26
"""Most logits alive at a time (256 MiB in float32)."""


def response_logprobs(
    hidden_BTD: Tensor,
    tokens_BT: Tensor,
    response_mask_BT: Tensor,
    head: nn.Module,
    sampling: SamplingParams,
    *,
    vocab_size: int,
    has_entropy_gradient: bool = False,
    logits_per_chunk: int = LOGITS_PER_CHUNK,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each response token, and entropy of the distribution it was drawn from.

    Both are [B, T] float32, 0 outside the response; what stands at position t is about token t, and
    comes from the hidden state at t - 1.

    Args:
        hidden_BTD: the model's last hidden states (after its final norm).
        tokens_BT: int64.
        response_mask_BT: bool; column 0 is False, as a first token has no hidden state before it.
        head: the LM head, [*, D] -> [*, V].
        sampling: of the rollouts. The sampled token is never filtered out, so that its
            log-probability stays finite after the policy has moved.
        vocab_size: of the head.
        has_entropy_gradient: whether the entropy is differentiable.
        logits_per_chunk: most logits computed at a time.
    """
    predicted_BT = response_mask_BT[:, 1:]
    hidden_ND = hidden_BTD[:, :-1][predicted_BT]
    tokens_N = tokens_BT[:, 1:][predicted_BT]
    chunk_size = max(1, logits_per_chunk // vocab_size)
    is_recomputed = torch.is_grad_enabled() and len(tokens_N) > chunk_size
    logprobs, entropies = [], []
    for hidden, tokens in zip(
        torch.split(hidden_ND, chunk_size), torch.split(tokens_N, chunk_size), strict=True
    ):
        arguments = (hidden, tokens, head, sampling, has_entropy_gradient)
        logprobs_C, entropy_C = (
            checkpoint(_chunk, *arguments, use_reentrant=False, preserve_rng_state=False)
            if is_recomputed
            else _chunk(*arguments)
        )
        logprobs.append(logprobs_C)
        entropies.append(entropy_C)
    return _padded(torch.cat(logprobs), response_mask_BT), _padded(
        torch.cat(entropies), response_mask_BT
    )


def entropy_of(logprobs: Tensor) -> Tensor:
    """Entropy in nats, [*], of log-probabilities [*, V]; excluded tokens (`-inf`) contribute 0."""
    finite = logprobs.masked_fill(logprobs == -math.inf, 0.0)
    return -(logprobs.exp() * finite).sum(-1)


def _chunk(
    hidden_ND: Tensor,
    tokens_N: Tensor,
    head: nn.Module,
    sampling: SamplingParams,
    has_entropy_gradient: bool,
) -> tuple[Tensor, Tensor]:
    logprobs_NV = log_distribution(head(hidden_ND), sampling, keep=tokens_N)
    with torch.set_grad_enabled(has_entropy_gradient and torch.is_grad_enabled()):
        entropy_N = entropy_of(logprobs_NV)
    return logprobs_NV.gather(-1, tokens_N.unsqueeze(-1)).squeeze(-1), entropy_N


def _padded(values_N: Tensor, mask_BT: Tensor) -> Tensor:
    """Values in reading order put where the mask is True, 0 elsewhere, [B, T]."""
    return values_N.new_zeros(mask_BT.shape).masked_scatter(mask_BT, values_N)
