"""Acceptance of n-gram drafts, by how many rows have a whole response to look things up in.

Where a response to the same prompt is finished, most of what follows may stand in it; where all
samples of a prompt are still under way, little does. That changes within a rollout, from the start
of a group to its last rows, much faster than any estimate can follow, but is known before each
step: so there is an estimate for each of a few shares of such rows. In each bucket of batch sizes
that becomes another one with its first step there, a doubtful copy that its own steps then teach:
rows that go on where their siblings, begun with them, have ended are those that went another way;
rows begun later are not. Where steps contradict an estimate (a long response that leaves what was
seen before, say), another one is begun with these.

Leaves out the estimate itself (acceptance_model.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastrl.rollout.acceptance_model import DOUBT_DEVIATION, AcceptanceModel, AcceptLength
from fastrl.rollout.drafter_acceptance import DrafterAcceptance
from fastrl.types import DraftStrategy, StepStats

NUM_LEVELS = 3
"""Few, some and most of the rows: in thirds."""
_NOTICED_ROWS = 32.0
"""Most that older rows count for after the policy changed."""
_TEACHING_ROWS = 64.0
"""Rows behind a bucket's estimate up to which its steps teach the one of all buckets, too."""


def reference_level(referenced_rows: int, batch_size: int) -> int:
    """The level of a step, from 0: in which third the share of its rows is that have a reference;
    all of them are in the last."""
    return min(NUM_LEVELS * referenced_rows // batch_size, NUM_LEVELS - 1)


def _doubted(length: AcceptLength) -> AcceptLength:
    """As believed of another bucket."""
    deviation = math.hypot(length.shared_deviation, DOUBT_DEVIATION)
    return AcceptLength(length.mean, deviation, length.own_deviation)


class NgramAcceptance(DrafterAcceptance):
    """Of n-gram drafts.

    Args:
        strategies: all of them.
    """

    def __init__(self, strategies: Sequence[DraftStrategy]) -> None:
        self._strategies = list(strategies)
        self._shared = [AcceptanceModel(strategies) for _ in range(NUM_LEVELS)]
        self._own: dict[tuple[int, int], AcceptanceModel] = {}  # by bucket and level

    def _models(self) -> Iterator[AcceptanceModel]:
        yield from self._shared
        yield from self._own.values()

    def record(self, bucket: int, stats: StepStats) -> bool:
        level = reference_level(stats.referenced_rows, stats.batch_size)
        shared = self._shared[level]
        model = self._own.get((bucket, level))
        if model is None:
            model = self._own[bucket, level] = AcceptanceModel(self._strategies)
            model.load_state_dict(shared.state_dict())
            model.take_notice(1.0)
        if model.num_rows < _TEACHING_ROWS:
            shared.learn(stats)
        if not model.record(stats):
            return False
        self.num_alarms += 1
        self._own[bucket, level] = model.begun_anew()
        return True

    def contradicted(self, bucket: int) -> bool:
        return False

    def num_rows(self, bucket: int, level: int) -> float:
        return self._own.get((bucket, level), self._shared[level]).num_rows

    def lengths(self, bucket: int, level: int) -> Mapping[DraftStrategy, AcceptLength]:
        if (own := self._own.get((bucket, level))) is not None:
            return own.lengths
        return {strategy: _doubted(its) for strategy, its in self._shared[level].lengths.items()}

    def look(self, keep: float) -> None:
        """Bring beliefs up to date where there were steps; elsewhere nothing is forgotten: there
        are many estimates, most of them not in use."""
        for model in self._models():
            if model.has_news:
                model.discount(keep)
                model.bound()
                model.look()

    def take_notice(self, keep: float, *, drafter_changed: bool = True) -> None:
        """What n-grams find changes slowly with the policy, and no drafter of theirs is replaced:
        only for many do older rows not count."""
        for model in self._models():
            model.discount(min(1.0, _NOTICED_ROWS / max(model.num_rows, 1.0)))
            model.look()

    def state_dict(self) -> dict[str, Any]:
        return {
            "shared": [model.state_dict() for model in self._shared],
            "own": [[*place, model.state_dict()] for place, model in self._own.items()],
            "num_alarms": self.num_alarms,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for model, saved in zip(self._shared, state["shared"], strict=True):
            model.load_state_dict(saved)
        self._own = {}
        for bucket, level, saved in state["own"]:
            self._own[bucket, level] = AcceptanceModel(self._strategies)
            self._own[bucket, level].load_state_dict(saved)
        self.num_alarms = state["num_alarms"]
