"""When a response ends: end-of-sequence and stop tokens, stop strings, length.

Host-side, token by token, in the order of emission: a step may emit tokens past the end, which are
dropped here. Leaves out everything on the device (rows.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from fastrl.rollout.torch_engine.rows import Request
from fastrl.types import FinishReason, SamplingParams

# A character may be split over that many byte-level tokens at the edges of a stop string.
_EDGE_TOKENS = 8


class EndOfResponse:
    """Appends sampled tokens to requests, and tells when one has ended.

    Args:
        tokenizer: decodes, for stop strings.
        eos_token_ids: the model's end-of-sequence tokens.
        sampling: stop tokens, stop strings, max_tokens, ignore_eos.
        max_context: longest prompt and response together, in tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: Sequence[int],
        sampling: SamplingParams,
        max_context: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._stop_ids = frozenset(eos_token_ids) | frozenset(sampling.stop_token_ids)
        if sampling.ignore_eos:
            self._stop_ids = frozenset()
        self._stop_strings = sampling.stop
        self._tail = max((len(text) for text in sampling.stop), default=0) + _EDGE_TOKENS
        self._max_tokens = sampling.max_tokens
        self._max_context = max_context

    def take(
        self, request: Request, tokens: Sequence[int], logprobs: Sequence[float]
    ) -> tuple[int, FinishReason | None]:
        """Append tokens up to the end; how many were taken, and why it ended, if it did.

        Raises FloatingPointError for a token whose distribution was not a number.
        """
        limit = min(self._max_tokens, self._max_context - len(request.prompt.tokens))
        for taken, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True), start=1):
            if math.isnan(logprob):
                raise FloatingPointError(
                    f"prompt {request.prompt.prompt_id}, sample {request.sample_index}, response "
                    f"token {len(request.tokens)}: the policy's logits are not numbers; its "
                    f"weights are broken, or the engine's dtype is too narrow for them"
                )
            request.tokens.append(token)
            request.logprobs.append(logprob)
            if token in self._stop_ids or self._ends_with_stop_string(request.tokens):
                return taken, FinishReason.STOP
            if len(request.tokens) >= limit:
                return taken, FinishReason.LENGTH
        return len(tokens), None

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of a response, special tokens left out."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def _ends_with_stop_string(self, tokens: list[int]) -> bool:
        """Whether the last token completed a stop string: an earlier one would have ended it."""
        if not self._stop_strings:
            return False
        # Special tokens included: chat templates end turns with them.
        text = str(self._tokenizer.decode(tokens[-self._tail :], skip_special_tokens=False))
        return any(stop in text for stop in self._stop_strings)
