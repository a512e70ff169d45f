"""Where a decode step stands, as far as its time and what it accepts depend on it."""

from __future__ import annotations

from typing import NamedTuple


class Place(NamedTuple):
    """Of a step, among all that a bandit tells apart."""

    bucket: int
    """Of live batch sizes: beliefs of acceptance, and how far off the profile of step times is,
    are kept by it."""
    level: int
    """Of references (`StepStats.referenced_rows`): n-grams' acceptance is kept by it."""
    batch_size: int
    """Live rows."""
    context_tokens: int
    """Longest context among them."""
