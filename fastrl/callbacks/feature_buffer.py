"""The drafter's training data: the policy's latest sequences, kept across RL steps within bounds.

A sequence is drawn with a weight of

    (response tokens its loss counts) ** length_exponent * 0.5 ** (age / recency_half_life)

where age counts RL steps from the newest held: long responses are where speculation pays, and
hidden states of an older policy are off by what it has learnt since. When a bound is reached, the
oldest RL step's sequences leave first, within a step those that came first.

Leaves out packing (fastrl/rollout/drafters/packing.py) and sharing between ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from fastrl.rollout.drafters.packing import num_loss_pairs, num_pairs
from fastrl.types import SequenceFeatures


# No slots: jsonargparse reads the fields of a default value from its __dict__.
@dataclass(frozen=True, kw_only=True)
class BufferSettings:
    """What a drafter trains on: how much is kept, and what is drawn more often."""

    max_tokens: int = 65_536
    """Most tokens held, prompts included."""
    max_gib: float = 4.0
    """Most host memory held, in GiB; a token takes 8 bytes and its hidden state, 4 bytes × hidden
    size in float32 (four times that for EAGLE-3's). A checkpoint holds the buffer too."""
    recency_half_life: float = 2.0
    """RL steps after which a sequence is half as likely to be drawn; inf: age does not matter."""
    length_exponent: float = 1.0
    """Chance of being drawn grows as response tokens to this power; 0: length does not matter."""

    def __post_init__(self) -> None:
        checks = (
            (self.max_tokens >= 1, "max_tokens must be >= 1", self.max_tokens),
            (self.max_gib > 0, "max_gib must be > 0", self.max_gib),
            (
                self.recency_half_life > 0,
                "recency_half_life must be > 0 (inf: age does not matter)",
                self.recency_half_life,
            ),
            (
                0 <= self.length_exponent < math.inf,
                "length_exponent must be >= 0 (0: length does not matter) and finite",
                self.length_exponent,
            ),
        )
        for is_valid, expectation, given in checks:
            if not is_valid:
                raise ValueError(f"buffer: {expectation}, got {given}")

    @property
    def max_bytes(self) -> int:
        """`max_gib` in bytes, rounded down."""
        return int(self.max_gib * 2**30)


class FeatureBuffer:
    """Bounded store of `SequenceFeatures` on the CPU, drawn at random.

    Args:
        settings: bounds and sampling law.
    """

    def __init__(self, settings: BufferSettings) -> None:
        self.settings = settings
        self.num_tokens = 0
        self.num_bytes = 0
        self._sequences: list[SequenceFeatures] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def add(self, features: Iterable[SequenceFeatures]) -> int:
        """Store copies on the CPU, newest RL step last, and evict down to the bounds.

        Sequences without a token to learn from (no response) are left out.

        Returns:
            Sequences refused because they alone exceed a bound.
        """
        given = [f for f in features if num_loss_pairs(f) > 0]
        kept = [f for f in given if self._fits(len(f), _num_bytes(f))]
        self._sequences.extend(_on_cpu(f) for f in kept)
        self._sequences.sort(key=lambda f: f.rl_step)
        self.num_tokens += sum(map(len, kept))
        self.num_bytes += sum(map(_num_bytes, kept))
        num_evicted = 0
        while not self._fits(self.num_tokens, self.num_bytes):
            self.num_tokens -= len(self._sequences[num_evicted])
            self.num_bytes -= _num_bytes(self._sequences[num_evicted])
            num_evicted += 1
        del self._sequences[:num_evicted]
        return len(given) - len(kept)

    def _fits(self, num_tokens: int, num_bytes: int) -> bool:
        return num_tokens <= self.settings.max_tokens and num_bytes <= self.settings.max_bytes

    def weights(self) -> torch.Tensor:
        """[number of sequences] float64: what the chance of being drawn is proportional to."""
        lengths = torch.tensor([num_loss_pairs(f) for f in self._sequences], dtype=torch.float64)
        rl_steps = torch.tensor([f.rl_step for f in self._sequences], dtype=torch.float64)
        # Relative to the longest, so that no exponent overflows.
        by_length = (lengths / lengths.max()) ** self.settings.length_exponent
        by_age = 0.5 ** ((rl_steps.max() - rl_steps) / self.settings.recency_half_life)
        return (by_length * by_age).clamp_min(torch.finfo(torch.float64).tiny)

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
        """Take what `state_dict` gave; under smaller bounds the oldest sequences are evicted."""
        self._sequences, self.num_tokens, self.num_bytes = [], 0, 0
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


def _num_bytes(features: SequenceFeatures) -> int:
    return features.tokens_T.nbytes + features.hidden_TD.nbytes
