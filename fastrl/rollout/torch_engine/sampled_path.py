"""Samples the target along draft trees: the accepted path, and the log-probabilities of its tokens.

An accelerator samples after all nodes at once, and waits for nothing. For a CPU a distribution over
the vocabulary is work, and most nodes are not on the path: there the walk goes level by level, and
samples after the nodes that it comes to, a few rows at a time, which stay in the cache. A token is
the same function of the same logits either way (sampling.py).

Leaves out what is kept of the path (generation.py). Shape legend: fastrl/types.py; P path places; R
rows that go on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.rollout.accept import Acceptance, accept, walk
from fastrl.rollout.sampling import log_distribution, sample_inverse_cdf
from fastrl.rollout.tree import DraftTree
from fastrl.types import SamplingParams

_FEW_NUMBERS = 2**18
"""Logits of which a CPU makes distributions in one go."""


def sample_path(
    tree: DraftTree, logits_BNV: Tensor, uniforms_BN: Tensor, sampling: SamplingParams
) -> tuple[Acceptance, Tensor]:
    """The target's samples that the tree foresaw and one more; their log-probabilities [B, P],
    arbitrary after those.

    Args:
        tree: of candidates.
        logits_BNV: the target's after each node.
        uniforms_BN: float64, randomness of the token after each node.
        sampling: of the tokens.
    """
    if logits_BNV.device.type == "cpu" and logits_BNV.numel() > _FEW_NUMBERS:
        return _sample_on_the_way(tree, logits_BNV, uniforms_BN, sampling)
    sampled_BN, logprobs_BN = _sample(logits_BNV, uniforms_BN, sampling)
    accepted = accept(tree, sampled_BN)
    return accepted, logprobs_BN.gather(1, accepted.path_BP)


def _sample_on_the_way(
    tree: DraftTree, logits_BNV: Tensor, uniforms_BN: Tensor, sampling: SamplingParams
) -> tuple[Acceptance, Tensor]:
    logprobs_BN = torch.zeros_like(logits_BNV[..., 0], dtype=torch.float32)
    rows_at_once = max(_FEW_NUMBERS // logits_BNV.shape[-1], 1)

    def sample_after(rows_R: Tensor, nodes_R: Tensor) -> Tensor:
        tokens = []
        for start in range(0, len(rows_R), rows_at_once):
            some = slice(start, start + rows_at_once)
            rows, nodes = rows_R[some], nodes_R[some]
            sampled, logprobs_BN[rows, nodes] = _sample(
                logits_BNV[rows, nodes], uniforms_BN[rows, nodes], sampling
            )
            tokens.append(sampled)
        return torch.cat(tokens)

    accepted = walk(tree, sample_after)
    return accepted, logprobs_BN.gather(1, accepted.path_BP)


def _sample(logits: Tensor, uniforms: Tensor, sampling: SamplingParams) -> tuple[Tensor, Tensor]:
    """Tokens and their log-probabilities, [*], of logits [*, V]."""
    logprobs = log_distribution(logits, sampling)
    tokens = sample_inverse_cdf(logprobs, uniforms)
    return tokens, logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
