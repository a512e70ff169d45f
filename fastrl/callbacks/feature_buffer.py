"""The drafter's training data: the policy's latest sequences, kept across RL steps within a bound.

A sequence is drawn with a weight of (response tokens its loss counts) × RECENCY_DECAY ** (age in RL
steps): long responses are where speculation pays, and hidden states of an older policy are off by
what it has learnt since. When the bound is reached, the oldest RL step's sequences leave first.

Leaves out packing (fastrl/rollout/drafters/packing.py) and sharing between ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from fastrl.rollout.drafters.packing import num_loss_pairs, num_pairs
from fastrl.types import SequenceFeatures

RECENCY_DECAY = 0.7


class FeatureBuffer:
    """Bounded store of `SequenceFeatures` on the CPU, drawn at random.

    Args:
        max_tokens: bound on the tokens held, prompts included, and so on memory: a token takes 8
            bytes and its hidden state (4 bytes × hidden size in float32).
    """

    def __init__(self, max_tokens: int) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens of the feature buffer must be >= 1, got {max_tokens}")
        self.max_tokens = max_tokens
        self.num_tokens = 0
        self._sequences: list[SequenceFeatures] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def add(self, features: Iterable[SequenceFeatures]) -> int:
        """Store copies on the CPU, newest RL step last, and evict down to the bound.

        Sequences without a token to learn from (no response) are left out.

        Returns:
            Sequences refused because they alone exceed the bound.
        """
        given = [f for f in features if num_loss_pairs(f) > 0]
        kept = [f for f in given if len(f) <= self.max_tokens]
        self._sequences.extend(_on_cpu(f) for f in kept)
        self._sequences.sort(key=lambda f: f.rl_step)
        self.num_tokens += sum(map(len, kept))
        num_evicted = 0
        while self.num_tokens > self.max_tokens:
            self.num_tokens -= len(self._sequences[num_evicted])
            num_evicted += 1
        del self._sequences[:num_evicted]
        return len(given) - len(kept)

    def weights(self) -> torch.Tensor:
        """[number of sequences] float64: what the chance of being drawn is proportional to."""
        lengths = torch.tensor([num_loss_pairs(f) for f in self._sequences], dtype=torch.float64)
        rl_steps = torch.tensor([f.rl_step for f in self._sequences], dtype=torch.float64)
        weights = lengths * RECENCY_DECAY ** (rl_steps.max() - rl_steps)
        return weights.clamp_min(torch.finfo(torch.float64).tiny)

    def sample(self, generator: torch.Generator, max_pairs: int) -> list[SequenceFeatures]:
        """Different sequences, drawn one by one until they fill a row of `max_pairs` pairs.

        The last one may exceed the row; `pack_sequences` leaves it out then.

        Raises:
            ValueError: the buffer is empty.
        """
        if not self._sequences:
            raise ValueError("the feature buffer is empty: add features of a training batch first")
        weights = self.weights()
        order = torch.multinomial(weights, len(weights), replacement=False, generator=generator)
        drawn: list[SequenceFeatures] = []
        num_drawn_pairs = 0
        for index in order.tolist():
            drawn.append(self._sequences[index])
            num_drawn_pairs += num_pairs(drawn[-1])
            if num_drawn_pairs >= max_pairs:
                break
        return drawn

    def state_dict(self) -> dict[str, Any]:
        """Every sequence, as three long tensors."""
        return {
            "tokens": torch.cat([f.tokens_T for f in self._sequences]) if self._sequences else None,
            "hidden": torch.cat([f.hidden_TD for f in self._sequences])
            if self._sequences
            else None,
            "num_tokens": [len(f) for f in self._sequences],
            "num_hidden": [len(f.hidden_TD) for f in self._sequences],
            "num_prompt_tokens": [f.num_prompt_tokens for f in self._sequences],
            "rl_step": [f.rl_step for f in self._sequences],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave; under a smaller bound the oldest sequences are evicted."""
        self._sequences, self.num_tokens = [], 0
        if state["tokens"] is None:
            return
        columns = zip(
            state["tokens"].split(state["num_tokens"]),
            state["hidden"].split(state["num_hidden"]),
            state["num_prompt_tokens"],
            state["rl_step"],
            strict=True,
        )
        self.add(
            SequenceFeatures(
                tokens_T=tokens_T,
                hidden_TD=hidden_TD,
                num_prompt_tokens=num_prompt_tokens,
                rl_step=rl_step,
            )
            for tokens_T, hidden_TD, num_prompt_tokens, rl_step in columns
        )


def _on_cpu(features: SequenceFeatures) -> SequenceFeatures:
    """A copy that shares no memory with the training step's tensors."""
    return SequenceFeatures(
        tokens_T=features.tokens_T.detach().to("cpu", copy=True),
        hidden_TD=features.hidden_TD.detach().to("cpu", copy=True),
        num_prompt_tokens=features.num_prompt_tokens,
        rl_step=features.rl_step,
    )
