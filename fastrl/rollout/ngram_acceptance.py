"""Acceptance of n-gram drafts, by how many rows have a whole response to look things up in.

Where a response to the same prompt is finished, most of what follows may stand in it; where all
samples of a prompt are still under way, little does. That changes within a rollout, from the start
of a group to its last rows, much faster than any estimate can follow, but is known before each
step: so there is an estimate for each of a few shares of such rows. In each bucket of batch sizes
that becomes another one, of what is believed over all buckets at first and then of the bucket's own
steps: rows that go on where their siblings, begun with them, have ended are those that went another
way; rows begun later are not.

Leaves out the estimate itself (acceptance_model.py). N-grams have no weights that could go bad, so
nothing here looks for contradictions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastrl.rollout.acceptance_model import AcceptanceModel, AcceptLength
from fastrl.rollout.drafter_acceptance import DrafterAcceptance
from fastrl.types import DraftStrategy, StepStats

NUM_LEVELS = 3
"""Few, some and most of the rows: in thirds."""
_MIX_KEEP = 0.98
"""Share of what a bucket's mix of levels was that a step leaves."""


def reference_level(referenced_rows: int, batch_size: int) -> int:
    """The level of a step, from 0: in which third the share of its rows is that have a reference;
    all of them are in the last."""
    return min(NUM_LEVELS * referenced_rows // batch_size, NUM_LEVELS - 1)


class NgramAcceptance(DrafterAcceptance):
    """Of n-gram drafts.

    Args:
        strategies: all of them.
        num_buckets: of batch sizes.
    """

    def __init__(self, strategies: Sequence[DraftStrategy], num_buckets: int) -> None:
        self._strategies = list(strategies)
        self._shared = [AcceptanceModel(strategies) for _ in range(NUM_LEVELS)]
        self._own: dict[tuple[int, int], AcceptanceModel] = {}  # by bucket and level
        self._mixes = [[0.0] * NUM_LEVELS for _ in range(num_buckets)]

    def _models(self) -> Iterator[AcceptanceModel]:
        yield from self._shared
        yield from self._own.values()

    def _model(self, bucket: int, level: int) -> AcceptanceModel:
        """The bucket's own, which begins as a doubtful copy of the one of all buckets."""
        model = self._own.get((bucket, level))
        if model is None:
            model = AcceptanceModel(self._strategies)
            model.load_state_dict(self._shared[level].state_dict())
            model.take_notice(1.0)
            model.look()
            self._own[bucket, level] = model
        return model

    def see(self, bucket: int, level: int) -> None:
        """A step of any strategy was run in a bucket at a level."""
        mix = self._mixes[bucket]
        mix[:] = [_MIX_KEEP * weight for weight in mix]
        mix[level] += 1.0

    def record(self, bucket: int, stats: StepStats) -> bool:
        level = reference_level(stats.referenced_rows, stats.batch_size)
        model = self._model(bucket, level)
        self._shared[level].record(stats)
        return model.record(stats)

    def contradicted(self, bucket: int) -> bool:
        return False

    def num_rows(self, bucket: int, level: int) -> float:
        return self._model(bucket, level).num_rows

    def lengths(self, bucket: int, level: int) -> Mapping[DraftStrategy, AcceptLength]:
        return self._model(bucket, level).lengths

    def mean_lengths(self, bucket: int) -> Mapping[DraftStrategy, float]:
        """Over the levels of these."""
        mix = self._mixes[bucket] if any(self._mixes[bucket]) else [1.0]
        models = [self._own.get((bucket, level), self._shared[level]) for level in range(len(mix))]
        return {
            strategy: sum(
                weight * model.lengths[strategy].mean
                for weight, model in zip(mix, models, strict=True)
            )
            / sum(mix)
            for strategy in self._strategies
        }

    def take_notice(self, keep: float) -> None:
        """No doubt comes with it: n-grams have no weights that could have been replaced."""
        for model in self._models():
            model.discount(keep)
            model.look()

    def state_dict(self) -> dict[str, Any]:
        return {
            "shared": [model.state_dict() for model in self._shared],
            "own": [[*place, model.state_dict()] for place, model in self._own.items()],
            "mixes": [list(mix) for mix in self._mixes],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for model, saved in zip(self._shared, state["shared"], strict=True):
            model.load_state_dict(saved)
        self._own = {}
        for bucket, level, saved in state["own"]:
            self._own[bucket, level] = AcceptanceModel(self._strategies)
            self._own[bucket, level].load_state_dict(saved)
        self._mixes = [list(mix) for mix in state["mixes"]]
