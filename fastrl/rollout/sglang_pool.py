"""The strategies that SGLang is prepared for, and up to which batch size each: from the trainer to
the processes that SGLang starts, which inherit it as an environment variable.

Imports nothing of SGLang.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass

from fastrl.types import OFF, DraftStrategy

_VARIABLE = "FASTRL_STRATEGIES"
FEWEST_UNREAD, MOST_UNREAD = 32, 1024
"""Tokens of a row that may wait for the drafter to read them, whatever memory they take."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StrategyPool:
    """Draft trees that can be switched between, besides `off`."""

    largest_batch: Mapping[DraftStrategy, int | None]
    """By strategy, the most live rows it may be chosen for; None for any number."""
    is_bucketed: bool = True
    """Whether strategies share CUDA graphs of equal shapes, and have them for batch sizes in which
    they may run; False gives each its own for all, to compare with."""
    unread_gib: float = 1.0
    """Device memory for what plain steps leave to the drafter to read."""

    def __post_init__(self) -> None:
        if not self.trees:
            raise ValueError("a pool of strategies needs a draft tree besides 'off', got none")
        if ngrams := [str(tree) for tree in self.trees if tree.drafter == "ngram"]:
            raise ValueError(f"a pool of strategies for SGLang cannot hold n-gram trees: {ngrams}")

    @property
    def trees(self) -> list[DraftStrategy]:
        """All but `off`."""
        return [strategy for strategy in self.largest_batch if not strategy.is_off]

    @property
    def strategies(self) -> list[DraftStrategy]:
        """`off` first."""
        return [OFF, *self.trees]

    def allowed(self, batch_size: int) -> list[DraftStrategy]:
        """Those that may be chosen for so many live rows; `off` first."""
        limits = {strategy: self.largest_batch.get(strategy) for strategy in self.strategies}
        return [one for one, limit in limits.items() if limit is None or batch_size <= limit]

    @property
    def depth(self) -> int:
        """Of the deepest tree."""
        return max(tree.depth for tree in self.trees)

    @property
    def topk(self) -> int:
        """Of the widest."""
        return max(tree.topk for tree in self.trees)

    @property
    def verify_tokens(self) -> int:
        """Of the largest."""
        return max(tree.verify_tokens for tree in self.trees)

    def most_unread_tokens(self, num_rows: int, bytes_per_token: int) -> int:
        """Of a row, that plain steps leave to the drafter to read at once.

        The more the better: what has ended before a tree comes is never read.

        Args:
            num_rows: of SGLang's request pool.
            bytes_per_token: of the hidden states that the drafter reads.
        """
        fitting = int(self.unread_gib * 2**30) // (num_rows * bytes_per_token)
        return min(max(fitting, FEWEST_UNREAD), MOST_UNREAD)

    def batch_sizes(self, strategy: DraftStrategy, captured: Sequence[int]) -> list[int]:
        """Those of the batch sizes to capture graphs for in which the strategy may run: graphs
        serve smaller batches by padding, so up to the first that holds its largest batch."""
        limit = self.largest_batch.get(strategy)
        sizes = sorted(captured)
        if limit is None or not self.is_bucketed:
            return sizes
        within = [size for size in sizes if size <= limit]
        return within + [size for size in sizes if size > limit][: limit not in within]

    def write_to(self, environment: MutableMapping[str, str]) -> None:
        """For processes that are started with the environment."""
        limits = {str(strategy): limit for strategy, limit in self.largest_batch.items()}
        environment[_VARIABLE] = json.dumps([limits, self.is_bucketed, self.unread_gib])

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> StrategyPool:
        """What `write_to` wrote; RuntimeError if it was not called."""
        if _VARIABLE not in environment:
            raise RuntimeError(
                f"{_VARIABLE} is not set: speculative algorithm FASTRL is started by FastRL's "
                f"SGLangEngine, not by hand"
            )
        limits, is_bucketed, unread_gib = json.loads(environment[_VARIABLE])
        return cls(
            largest_batch={DraftStrategy.parse(text): limit for text, limit in limits.items()},
            is_bucketed=is_bucketed,
            unread_gib=unread_gib,
        )
