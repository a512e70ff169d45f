"""In which order warm-up takes its sequences, which of them are a rank's, what fills a row. Pure.

Leaves out what a shard holds (features.py).
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from fastrl.rollout.drafters.packing import num_pairs
from fastrl.types import SequenceFeatures


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardOrder:
    """The endless order in which a rank's sequences are trained on; a function of the seed alone.

    Position n of pass p is p * (sequences of a pass) + n.
    """

    sizes: tuple[int, ...]
    """Sequences of each shard."""
    seed: int

    def at(self, position: int) -> tuple[int, list[int], int]:
        """The shard at a position, its sequences that are still to come, in order, and the
        position after them."""
        pass_index, offset = divmod(position, sum(self.sizes))
        shards = _shuffled(len(self.sizes), f"shards/{self.seed}/{pass_index}")
        for shard in shards:
            if offset < self.sizes[shard]:
                break
            offset -= self.sizes[shard]
        members = _shuffled(self.sizes[shard], f"sequences/{self.seed}/{pass_index}/{shard}")
        return shard, list(members[offset:]), position + self.sizes[shard] - offset


def rank_share(num_items: int, seed: int, rank: int, world_size: int) -> list[int]:
    """Indices of a rank's items, in a seeded order; shares are disjoint and cover all items.

    Raises ValueError if there are fewer items than ranks.
    """
    if num_items < world_size:
        raise ValueError(
            f"{num_items} prompts are too few for {world_size} ranks; give more prompts, or lower "
            f"trainer.devices"
        )
    return list(_shuffled(num_items, f"prompts/{seed}")[rank::world_size])


def row_length(features: Sequence[SequenceFeatures], max_pairs: int) -> int:
    """How many of the sequences, from the first on, fill a row of `max_pairs` pairs; at least 1."""
    total = 0
    for index, sequence in enumerate(features):
        total += num_pairs(sequence)
        if total > max_pairs and index > 0:
            return index
    return len(features)


@functools.lru_cache(maxsize=8)  # asked for again with every row of a shard
def _shuffled(count: int, seed: str) -> tuple[int, ...]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return tuple(order)
