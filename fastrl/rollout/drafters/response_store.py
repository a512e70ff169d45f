"""The last responses to each prompt, for the n-gram drafter: bounded, oldest prompts out first.

What a prompt was answered last time is the best guess at how it is answered now: policies change
slowly. Leaves out how it is used (ngram.py).
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

MAX_TOKENS = 1_000_000
"""4 MB of host memory, and at most about as much in a checkpoint."""


class ResponseStore:
    """The responses that each prompt got when it was last asked.

    Args:
        max_tokens: most tokens kept in all; prompts asked longest ago leave first.
    """

    def __init__(self, max_tokens: int = MAX_TOKENS) -> None:
        if max_tokens < 0:
            raise ValueError(f"max_tokens must be >= 0 (0 keeps nothing), got {max_tokens}")
        self.max_tokens = max_tokens
        self.num_tokens = 0
        self._responses: dict[int, list[array[int]]] = {}  # longest ago first

    def responses(self, prompt_id: int) -> Sequence[Sequence[int]]:
        """Of the last time the prompt was asked; empty if it has not been, or has left."""
        return self._responses.get(prompt_id, ())

    def put(self, prompt_id: int, responses: Sequence[Sequence[int]]) -> None:
        """Replace a prompt's responses; of more than fit, the first ones are kept."""
        self._drop(prompt_id)
        kept: list[array[int]] = []
        num_tokens = 0
        for response in responses:
            if num_tokens + len(response) > self.max_tokens:
                break
            kept.append(array("i", response))
            num_tokens += len(response)
        while self.num_tokens + num_tokens > self.max_tokens:
            self._drop(next(iter(self._responses)))
        if kept:
            self._responses[prompt_id] = kept
            self.num_tokens += num_tokens

    def _drop(self, prompt_id: int) -> None:
        dropped = self._responses.pop(prompt_id, [])
        self.num_tokens -= sum(map(len, dropped))

    def clear(self) -> None:
        """Forget all."""
        self._responses.clear()
        self.num_tokens = 0

    def state_dict(self) -> dict[str, Any]:
        """All responses, in plain lists; prompts asked longest ago first."""
        return {
            "prompt_ids": list(self._responses),
            "responses": [[list(one) for one in several] for several in self._responses.values()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave, as much of the newest as fits."""
        self.clear()
        for prompt_id, responses in zip(state["prompt_ids"], state["responses"], strict=True):
            self.put(prompt_id, responses)
