"""Policy-gradient objectives by token, and the weights that turn them into one loss.

Pure functions in float32. A loss is `(weights_BT * loss_BT).sum()`: the weights carry the
denominator, which is of the optimizer's whole mini-batch, so that splitting it into micro-batches,
and over ranks, changes nothing. Log-probabilities are of the sampled tokens, at the tokens'
positions. Shape legend: fastrl/types.py.

Sources: PPO clipping (Schulman et al. 2017, arXiv 1707.06347, eq. 7), with separate bounds (DAPO,
arXiv 2503.14476, eq. 10); KL estimators (Schulman 2020, http://joschu.net/blog/kl-approx.html);
constant denominator (Dr.GRPO, arXiv 2503.20783).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]
Aggregation = Literal["token-mean", "sequence-mean", "constant"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LossInputs:
    """What an algorithm's loss is made of: [B, T] float32 each, of the tokens of one micro-batch.

    Positions outside the response hold 0 or leftovers; their weight is 0.
    """

    policy_logprobs_BT: Tensor
    """Of the policy being trained; differentiable."""
    old_logprobs_BT: Tensor
    """Of the policy before the batch's first update; with a single one, the current, detached."""
    advantages_BT: Tensor
    response_mask_BT: Tensor  # bool


def clipped_objective(
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate, negated into a loss.

    loss = -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A), ratio = exp(policy - old).

    Args:
        policy_logprobs: [*], differentiable.
        old_logprobs: [*], of the policy before the batch's first update.
        advantages: [*].

    Returns:
        The loss, [*], and [*] bool: where the clipped branch won, so that the gradient is zero.
    """
    ratio = (policy_logprobs - old_logprobs).exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return -torch.minimum(unclipped, clipped), clipped.detach() < unclipped.detach()


def kl_estimate(
    policy_logprobs: Tensor, reference_logprobs: Tensor, estimator: KLEstimator
) -> Tensor:
    """Estimate of KL(policy || reference) from tokens the policy sampled, [*], differentiable.

    With r = reference / policy probability of the sampled token:

    - `k1` = -log r: unbiased, can be negative. Its own gradient has mean zero and would regularize
      nothing, so its gradient here is k2's.
    - `k2` = (log r)^2 / 2: biased as a value; its gradient, log(1 / r) * grad log policy, is in
      expectation exactly the gradient of KL(policy || reference).
    - `k3` = r - 1 - log r: unbiased and never negative (GRPO's choice); its gradient,
      (1 - r) * grad log policy, is in expectation the gradient of KL(reference || policy), which
      has the same minimum and agrees to first order around it.

    The expectations are over tokens of the current policy: in later mini-batches and epochs of a
    rollout batch they are approximate, as the tokens are not reweighted.
    """
    log_ratio = reference_logprobs - policy_logprobs
    if estimator == "k3":
        return log_ratio.exp() - 1 - log_ratio
    half_square = log_ratio.square() / 2
    if estimator == "k2":
        return half_square
    return -log_ratio.detach() + (half_square - half_square.detach())


def token_weights(
    response_mask_BT: Tensor,
    aggregation: Aggregation,
    *,
    num_rows: int,
    num_tokens: int,
    max_tokens: int,
) -> Tensor:
    """Weight of each token in the loss of the mini-batch that these B rows are of, [B, T] float32.

    - `token-mean`: 1 / num_tokens.
    - `sequence-mean`: 1 / (num_rows * response tokens of the row): mean over a row's tokens, then
      over rows.
    - `constant`: 1 / (num_rows * max_tokens), whatever the lengths (Dr.GRPO).

    Args:
        response_mask_BT: [B, T] bool.
        aggregation: one of the above.
        num_rows: of the mini-batch, over all ranks.
        num_tokens: its response tokens, over all ranks.
        max_tokens: longest response that sampling allows, the denominator of `constant`.
    """
    mask_BT = response_mask_BT.float()
    if aggregation == "token-mean":
        return mask_BT / max(num_tokens, 1)
    if aggregation == "sequence-mean":
        return mask_BT / (num_rows * mask_BT.sum(1, keepdim=True).clamp(min=1))
    return mask_BT / (num_rows * max_tokens)
