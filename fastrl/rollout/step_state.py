"""A decode step's statistics as checkpoints keep them: plain, so that they load without code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastrl.types import DraftStrategy, StepStats


def plain_stats(stats: StepStats) -> dict[str, Any]:
    """In plain numbers, lists and strings, without what is told row by row: no bandit asks."""
    return {
        "strategy": str(stats.strategy),
        "batch_size": stats.batch_size,
        "context_tokens": stats.context_tokens,
        "accept_lengths": list(stats.accept_lengths),
        "seconds": stats.seconds,
        "offered": [list(counts) for counts in stats.offered_by_rank],
        "accepted": [list(counts) for counts in stats.accepted_by_rank],
        "referenced_rows": stats.referenced_rows,
    }


def restored_stats(plain: Mapping[str, Any]) -> StepStats:
    """What `plain_stats` kept."""
    return StepStats(
        strategy=DraftStrategy.parse(plain["strategy"]),
        batch_size=plain["batch_size"],
        context_tokens=plain["context_tokens"],
        accept_lengths=tuple(plain["accept_lengths"]),
        seconds=plain["seconds"],
        offered_by_rank=tuple(map(tuple, plain["offered"])),
        accepted_by_rank=tuple(map(tuple, plain["accepted"])),
        referenced_rows=plain["referenced_rows"],
    )
