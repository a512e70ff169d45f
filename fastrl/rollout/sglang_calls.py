"""One call of `SGLangEngine.generate`: from prompts to requests, and from responses to rollouts.

Pure but for the clock; what single records become is told in sglang_rollouts.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from fastrl.rollout.sampling import request_key
from fastrl.rollout.sglang_rollouts import (
    as_rollout,
    check_prompt,
    counted_statistics,
    longest_sequence,
    sglang_sampling,
    statistics,
)
from fastrl.rollout.shared_process import GenerateRequest, SharedResponses
from fastrl.types import DraftStrategy, EngineStats, Prompt, Rollout, SamplingParams

_WHOLE_CALL = -1
"""Stands for a prompt's id."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """What calls need to know of the policy's model, and of how SGLang serves it."""

    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: tuple[int, ...]
    strategies: tuple[DraftStrategy, ...]
    """That SGLang can run; the only one without FastRL's plugin."""
    pool_tokens: int
    """That its cache holds."""
    context_length: int | None = None
    """That SGLang was told to serve; None: the model's own."""

    @property
    def max_sequence(self) -> int:
        """Most tokens of prompt and response together."""
        context = int(self.config.max_position_embeddings)
        if self.context_length is not None:
            context = min(context, self.context_length)
        return longest_sequence(context, self.strategies)


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateCall:
    """What this rank asks for, as `RolloutEngine.generate` has it."""

    prompts: Sequence[Prompt]
    sampling: SamplingParams
    num_samples: int = 1
    seed: int = 0
    rl_step: int = 0
    return_hidden_states: bool = False
    _started: float = field(default_factory=perf_counter, init=False)

    @property
    def samples(self) -> list[tuple[Prompt, int]]:
        """Prompt and sample index of each response, prompt-major."""
        return [(prompt, index) for prompt in self.prompts for index in range(self.num_samples)]

    def options(self, *, seeds_tokens: bool) -> dict[str, Any]:
        """Of the whole call, in the engine's process; where SGLang seeds no token by its request,
        its generators get a seed for the call."""
        seed = None if seeds_tokens else request_key(self.seed, self.rl_step, _WHOLE_CALL, 0)
        return {"return_hidden_states": self.return_hidden_states, "generator_seed": seed}

    def requests(self, model: ModelInfo) -> list[GenerateRequest]:
        """One for each response.

        Raises ValueError for what SGLang has no room for.
        """
        for prompt in self.prompts:
            check_prompt(
                prompt,
                max_sequence=model.max_sequence,
                pool_tokens=model.pool_tokens,
                max_tokens=self.sampling.max_tokens,
                strategies=model.strategies,
            )
        return [
            GenerateRequest(
                prompt=prompt.tokens,
                sampling=sglang_sampling(
                    self.sampling,
                    num_prompt_tokens=len(prompt.tokens),
                    max_sequence=model.max_sequence,
                    eos_token_ids=model.eos_token_ids,
                    key=request_key(self.seed, self.rl_step, prompt.prompt_id, sample),
                ),
            )
            for prompt, sample in self.samples
        ]

    def rollouts(
        self, responses: SharedResponses, model: ModelInfo, policy_version: int
    ) -> list[Rollout]:
        """The responses in the contract's terms; see `as_rollout` for what is raised."""
        return [
            as_rollout(
                raw,
                prompt,
                sample,
                sampling=self.sampling,
                text=str(model.tokenizer.decode(list(raw.tokens), skip_special_tokens=True)),
                policy_version=policy_version,
            )
            for raw, (prompt, sample) in zip(responses.raws, self.samples, strict=True)
        ]

    def statistics(self, responses: SharedResponses, model: ModelInfo) -> EngineStats:
        """What the call did, which has taken until now."""
        num_prompt_tokens = self.num_samples * sum(len(prompt.tokens) for prompt in self.prompts)
        seconds = perf_counter() - self._started
        if responses.report is not None:
            return counted_statistics(
                responses.report.stats,
                responses.raws,
                num_prompt_tokens=num_prompt_tokens,
                seconds=seconds,
            )
        return statistics(
            responses.raws,
            responses.steps_by_num_accepted,
            model.strategies[0],
            num_prompt_tokens=num_prompt_tokens,
            seconds=seconds,
        )
