"""What a bandit asks of the acceptance of one drafter's strategies, wherever a step stands.

A step stands in a bucket of batch sizes and at a level of references (`StepStats.referenced_rows`);
which of the two tell estimates apart is up to the drafter: bucket_acceptance.py for learned ones,
ngram_acceptance.py for n-grams.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

from fastrl.rollout.acceptance_model import AcceptanceModel, AcceptLength
from fastrl.types import DraftStrategy, StepStats


class DrafterAcceptance(ABC):
    """Of one drafter."""

    num_alarms: int = 0
    """Contradictions so far: changes of the drafter, or of what it is asked."""

    @abstractmethod
    def _models(self) -> Iterator[AcceptanceModel]:
        """All estimates."""

    @abstractmethod
    def record(self, bucket: int, stats: StepStats) -> bool:
        """Learn from a step; whether its bucket's estimate became another one."""

    @abstractmethod
    def contradicted(self, bucket: int) -> bool:
        """Whether the bucket has an estimate of its own because its steps contradicted another."""

    @abstractmethod
    def num_rows(self, bucket: int, level: int) -> float:
        """Rows behind an estimate."""

    @abstractmethod
    def lengths(self, bucket: int, level: int) -> Mapping[DraftStrategy, AcceptLength]:
        """What is believed of each strategy, by the last look."""

    def look(self, keep: float) -> None:
        """Bring beliefs up to date; older steps count for the share `keep`, none for too much."""
        for model in self._models():
            model.discount(keep)
            model.bound()
            if model.has_news:
                model.look()

    @abstractmethod
    def take_notice(self, keep: float, *, drafter_changed: bool) -> None:
        """The policy changed, or the drafter's weights, if it has any, did: older rows count for
        the share `keep` at most."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All estimates, in plain numbers, lists and strings."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave."""
