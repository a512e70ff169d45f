"""Canary prompts: does an engine compute what the policy computes?

A few short prompts are answered by the engine, and the policy reads the same tokens: the
log-probabilities that the engine reports must be the policy's, up to rounding. That needs no
knowledge of names or layouts, and goes the way that rollouts go: prefill, decode, verification of
drafts where SGLang can choose them, graphs captured over weights that have moved since. What it
cannot see is what rounding hides, an update at a small learning rate say.

Leaves out how large a gap is a failure. Shape legend: fastrl/types.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrl.rollout.engine import RolloutEngine
from fastrl.rollout.sampling import log_distribution
from fastrl.types import Prompt, Rollout, SamplingParams

_SAMPLING = SamplingParams(max_tokens=8, ignore_eos=True)
"""At temperature 1: greedy log-probabilities are 0, whatever the weights are."""
_PROMPT_TOKENS = 8
_FIRST_PROMPT_ID = 2**62
"""Beyond those of any data set."""


def canary_prompts(num_prompts: int, vocab_size: int) -> list[Prompt]:
    """The same random tokens for the same arguments."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (num_prompts, _PROMPT_TOKENS), generator=generator)
    return [
        Prompt(prompt_id=_FIRST_PROMPT_ID + number, tokens=tuple(row), text="", answer="")
        for number, row in enumerate(tokens.tolist())
    ]


def canary_gap(engine: RolloutEngine, policy: PreTrainedModel, num_prompts: int) -> float:
    """Mean |engine's - policy's| log-probability of the canaries' tokens; inf if one is no number.

    Args:
        engine: with the policy's weights.
        policy: any precision; where it is sharded, all ranks call this together.
        num_prompts: canaries; each takes 8 tokens and is answered with 8.
    """
    prompts = canary_prompts(num_prompts, policy.config.vocab_size)
    rollouts = engine.probe(prompts, _SAMPLING)
    gaps = torch.cat(
        [
            (torch.tensor(rollout.logprobs) - policy_logprobs(policy, rollout, _SAMPLING)).abs()
            for rollout in rollouts
        ]
    )
    return gaps.mean().item() if gaps.isfinite().all() else float("inf")


@torch.no_grad()
def policy_logprobs(policy: PreTrainedModel, rollout: Rollout, sampling: SamplingParams) -> Tensor:
    """Of the rollout's tokens, by one forward over all of them; [T] float32 on the CPU."""
    num_prompt_tokens = len(rollout.prompt.tokens)
    tokens_1T = torch.tensor([(*rollout.prompt.tokens, *rollout.tokens)], device=policy.device)
    logits_TV = policy(input_ids=tokens_1T[:, :-1], use_cache=False).logits[0]
    logprobs_TV = log_distribution(logits_TV[num_prompt_tokens - 1 :].float(), sampling)
    return logprobs_TV.gather(1, tokens_1T[0, num_prompt_tokens:, None]).squeeze(1).cpu()
