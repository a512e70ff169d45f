"""transformers' own ways of generating, as arms of bench_rollout.py.

`hf_generate` is `generate` over static batches (left-padded, until the longest response has ended),
`hf_continuous` its continuous batching (`generate_batch`), `hf_assisted` its assisted generation by
prompt lookup, at batch 1. Each samples as asked, with randomness of its own: tokens differ from the
engine's, and so do response lengths, unless sampling.ignore_eos makes them all equal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fastrl.types import Prompt, SamplingParams

TRANSFORMERS_ARMS = ("hf_generate", "hf_continuous", "hf_assisted")
_LOOKUP_TOKENS = 6
_CACHE_SHARE = 0.1
"""Of free memory, for continuous batching's cache; by default it takes nearly all."""


class TransformersArm:
    """One of `TRANSFORMERS_ARMS`.

    Args:
        name: which.
        model: in the dtype and on the device to measure.
        tokenizer: its padding and end-of-sequence tokens.
        sampling: how tokens are drawn.
        batch_size: most sequences at once.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: SamplingParams,
        batch_size: int,
    ) -> None:
        self.accept_length = 1.0
        self._name, self._model, self._batch_size = name, model, batch_size
        eos = model.config.eos_token_id
        ids = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
        self._eos = set() if sampling.ignore_eos else ids
        self._pad = tokenizer.pad_token_id or 0
        self._config = GenerationConfig(
            do_sample=sampling.temperature > 0,
            temperature=sampling.temperature or 1.0,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p or None,
            max_new_tokens=sampling.max_tokens,
            eos_token_id=sorted(self._eos) or None,
            pad_token_id=self._pad,
            prompt_lookup_num_tokens=_LOOKUP_TOKENS if name == "hf_assisted" else None,
        )
        # `generate` fills what a configuration leaves out from the model's own.
        self._model.generation_config = GenerationConfig(pad_token_id=self._pad)

    def generate(
        self, prompts: Sequence[Prompt], num_samples: int, seed: int
    ) -> list[tuple[int, ...]]:
        """Response tokens, prompt-major, each up to its end-of-sequence token."""
        torch.manual_seed(seed)
        requests = [list(prompt.tokens) for prompt in prompts for _ in range(num_samples)]
        with torch.inference_mode():
            if self._name == "hf_continuous":
                responses = self._continuous(requests)
            else:
                starts = range(0, len(requests), self._batch_size)
                batches = [requests[start : start + self._batch_size] for start in starts]
                responses = [response for batch in batches for response in self._static(batch)]
        return [self._until_end(response) for response in responses]

    def _static(self, batch: list[list[int]]) -> list[list[int]]:
        width = max(map(len, batch))
        tokens_BT = torch.tensor([[self._pad] * (width - len(row)) + row for row in batch])
        mask_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch])
        output_BT = self._model.generate(
            tokens_BT.to(self._model.device),
            attention_mask=mask_BT.to(self._model.device),
            generation_config=self._config,
        )
        responses: list[list[int]] = output_BT[:, width:].tolist()
        return responses

    def _continuous(self, requests: list[list[int]]) -> list[list[int]]:
        outputs = self._model.generate_batch(
            inputs=requests,
            generation_config=self._config,
            continuous_batching_config=ContinuousBatchingConfig(
                max_memory_percent=_CACHE_SHARE, max_requests_per_batch=self._batch_size
            ),
            progress_bar=False,
        )
        return [output.generated_tokens for output in outputs.values()]

    def _until_end(self, response: list[int]) -> tuple[int, ...]:
        ends = (place for place, token in enumerate(response) if token in self._eos)
        return tuple(response[: next(ends, len(response) - 1) + 1])
