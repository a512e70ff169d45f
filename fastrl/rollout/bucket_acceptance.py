"""Acceptance of a drafter by bucket of batch sizes: one estimate, until a bucket shows another.

All buckets share one `AcceptanceModel`. Where a bucket's steps contradict it (an alarm), that
bucket gets one of its own, begun with those steps, and keeps it until its steps contradict that
too. So the few rows that a rollout ends with, often the hardest, change no belief about the next
rollout's full batch; and a drafter gone bad is told in each bucket by its own steps.

Leaves out the estimate itself (acceptance_model.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastrl.rollout.acceptance_model import AcceptanceModel, AcceptLength
from fastrl.rollout.drafter_acceptance import DrafterAcceptance
from fastrl.types import DraftStrategy, StepStats


class BucketAcceptance(DrafterAcceptance):
    """Of one drafter.

    Args:
        strategies: all that it drafts for.
    """

    def __init__(self, strategies: Sequence[DraftStrategy]) -> None:
        self._strategies = list(strategies)
        self._shared = AcceptanceModel(strategies)
        self._own: dict[int, AcceptanceModel] = {}  # by bucket
        self.num_alarms = 0

    def _models(self) -> Iterator[AcceptanceModel]:
        yield self._shared
        yield from self._own.values()

    def _model(self, bucket: int) -> AcceptanceModel:
        return self._own.get(bucket, self._shared)

    def record(self, bucket: int, stats: StepStats) -> bool:
        model = self._model(bucket)
        if not model.record(stats):
            return False
        self.num_alarms += 1
        if self._own.pop(bucket, None) is None:
            self._own[bucket] = model.begun_anew()
        model.forget_alarm()
        return True

    def contradicted(self, bucket: int) -> bool:
        return bucket in self._own

    def num_rows(self, bucket: int, level: int = 0) -> float:
        return self._model(bucket).num_rows

    def lengths(self, bucket: int, level: int = 0) -> Mapping[DraftStrategy, AcceptLength]:
        return self._model(bucket).lengths

    def take_notice(self, keep: float, *, drafter_changed: bool = True) -> None:
        for model in self._models():
            if drafter_changed:
                model.take_notice(keep)
            else:
                model.discount(keep)
            model.look()

    def state_dict(self) -> dict[str, Any]:
        return {
            "shared": self._shared.state_dict(),
            "own": {bucket: model.state_dict() for bucket, model in self._own.items()},
            "num_alarms": self.num_alarms,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._shared.load_state_dict(state["shared"])
        self._own = {bucket: AcceptanceModel(self._strategies) for bucket in state["own"]}
        for bucket, model in self._own.items():
            model.load_state_dict(state["own"][bucket])
        self.num_alarms = state["num_alarms"]
