"""The default bandit: predicts every arm from a model of acceptance and a model of cost.

Expected tokens a second of an arm are its expected accept length (acceptance_model.py: one estimate
for all arms of a drafter and all batch sizes) over its expected step time (cost_model.py:
profiled before the first rollout, then tracked). So a few steps of any tree tell about all trees,
at all batch sizes, and `off`, whose accept length is 1, is an arm like any other. Each decision
draws every arm's rate from its posterior and takes the best (Thompson sampling, 1933): arms are
tried as often as they may be the best, and no more.

Leaves out the choice among several drafters' trees at once, and agreement between tensor-parallel
ranks, whose step times differ: there, one rank decides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any

from fastrl.rollout.acceptance_model import PLAIN_LENGTH, AcceptanceModel, AcceptLength
from fastrl.rollout.bandit_base import DEFAULT_BATCH_THRESHOLDS, Bandit
from fastrl.rollout.cost_model import CostModel
from fastrl.rollout.engine import CostQuery
from fastrl.types import DraftStrategy, StepStats

_REFRESH_STEPS = 8
"""Steps between two looks at the acceptance model; at once when it started anew."""
_STEP_KEEP = 0.999
"""Share of what was seen of acceptance that a decode step leaves: arms that went unused for long
are tried again."""
_PROFILED_CONTEXT = 128


class ModelBased(Bandit):
    """Thompson sampling over predicted tokens a second.

    Args:
        strategies: Draft trees to choose among besides 'off', which is always an arm: a list of
            depth_topk_verifytokens ('8_4_48'), or of n-gram ones ('ngram_8_1_9').
        batch_thresholds: Smallest live batch of each bucket, ascending from 1; step times are
            tracked for each.
        window_size: Newest steps, of each arm in each bucket, that reports are of.
        seed: Seed of the draws from the posterior.
    """

    def __init__(
        self,
        strategies: list[str],
        batch_thresholds: Sequence[int] = DEFAULT_BATCH_THRESHOLDS,
        window_size: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__(strategies, batch_thresholds, window_size, 1, seed)
        kinds: dict[str, list[DraftStrategy]] = {}
        for arm in self.arms:
            if not arm.is_off:
                kinds.setdefault(arm.drafter, []).append(arm)
        self._acceptance = {kind: AcceptanceModel(arms) for kind, arms in kinds.items()}
        self._costs = [CostModel(len(self.batch_thresholds)) for _ in self.arms]
        self._lengths = [PLAIN_LENGTH] * len(self.arms)
        self._steps_since_refresh = 0
        self._refresh()

    # -- costs ------------------------------------------------------------------------------------

    def cost_queries(self, max_batch_size: int) -> Sequence[CostQuery]:
        """Every arm at 1, 4, 16, … rows, up to the most there may be; none twice."""
        sizes = [4**power for power in range(10) if 4**power < max_batch_size]
        sizes.append(max_batch_size)
        return [
            CostQuery(strategy=arm, batch_size=size, context_tokens=_PROFILED_CONTEXT)
            for arm, limit, cost in zip(self.arms, self._max_batch, self._costs, strict=True)
            for size in sizes
            if size <= limit and arm not in self._excluded and not cost.covers(size)
        ]

    def record_cost(self, query: CostQuery, seconds: float) -> None:
        """A point of an arm's cost curve."""
        self._costs[self._arm_index[query.strategy]].add_profile(query.batch_size, seconds)

    # -- choice -----------------------------------------------------------------------------------

    def _decide(self, bucket: int, batch_size: int) -> tuple[int, bool]:
        candidates = self._candidates(batch_size)
        if len(candidates) == 1:
            return candidates[0], False
        unknown = [a for a in candidates if not self._costs[a].is_known(bucket, batch_size)]
        if unknown:
            num_selected = self._num_selected[bucket]
            return min(unknown, key=lambda arm: (num_selected[arm], arm)), True
        expected, drawn = [], []
        # A drafter's trees stand or fall together with what all of them share.
        shared = {kind: self._rng.gauss(0.0, 1.0) for kind in self._acceptance}
        for arm in candidates:
            believed, cost = self._lengths[arm], self._costs[arm]
            rate = math.log(believed.mean / cost.seconds(bucket, batch_size))
            own_deviation = math.hypot(believed.own_deviation, cost.deviation(bucket))
            draw = rate + own_deviation * self._rng.gauss(0.0, 1.0)
            if arm:
                draw += believed.shared_deviation * shared[self.arms[arm].drafter]
            expected.append(rate)
            drawn.append(draw)
        chosen = drawn.index(max(drawn))
        return candidates[chosen], expected[chosen] < max(expected)

    def _choose(self, bucket: int, candidates: list[int]) -> tuple[int, bool]:
        raise AssertionError("ModelBased decides by itself")

    # -- learning ---------------------------------------------------------------------------------

    def record(self, stats: StepStats) -> None:
        """Learn from a finished step; raises ValueError for a strategy that is no arm."""
        super().record(stats)
        arm = self._arm_index[stats.strategy]
        bucket = self._bucket(stats.batch_size)
        self._costs[arm].record(bucket, stats.batch_size, stats.seconds)
        started_anew = False
        if not stats.strategy.is_off:
            model = self._acceptance[stats.strategy.drafter]
            started_anew = model.record(stats)
        self._steps_since_refresh += 1
        if started_anew or self._steps_since_refresh >= _REFRESH_STEPS:
            for model in self._acceptance.values():
                model.discount(_STEP_KEEP**self._steps_since_refresh)
                model.bound()
            self._refresh()

    def _refresh(self) -> None:
        for model in self._acceptance.values():
            for strategy, length in model.expected_lengths().items():
                self._lengths[self._arm_index[strategy]] = length
        self._steps_since_refresh = 0

    def discount(self, keep: float) -> None:
        """Forget acceptance in part, after the policy or the drafter changed; times stay."""
        super().discount(keep)
        for model in self._acceptance.values():
            if keep < 1:
                model.take_notice(keep)
        self._refresh()

    # -- what it believes -------------------------------------------------------------------------

    def predicted_gains(self) -> dict[str, dict[str, float]]:
        """Predicted tokens a second relative to `off`, by bucket and strategy, at the bucket's
        smallest batch; buckets and arms whose times are unknown are left out."""
        gains: dict[str, dict[str, float]] = {}
        for bucket, batch_size in enumerate(self.batch_thresholds):
            known = [
                arm
                for arm in self._candidates(batch_size)
                if self._costs[arm].is_known(bucket, batch_size)
            ]
            if 0 not in known:
                continue
            off_seconds = self._costs[0].seconds(bucket, batch_size)
            gains[self._bucket_name(bucket)] = {
                str(self.arms[arm]): self._lengths[arm].mean
                * off_seconds
                / self._costs[arm].seconds(bucket, batch_size)
                for arm in known
            }
        return gains

    @property
    def num_alarms(self) -> int:
        """Changes of a drafter that were noticed without notice."""
        return sum(model.num_alarms for model in self._acceptance.values())

    # -- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that further decisions depend on, in plain numbers, lists and strings."""
        return super().state_dict() | {
            "acceptance": {kind: model.state_dict() for kind, model in self._acceptance.items()},
            "costs": [cost.state_dict() for cost in self._costs],
            "lengths": [list(astuple(length)) for length in self._lengths],
            "steps_since_refresh": self._steps_since_refresh,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave; raises ValueError for other arms, buckets or algorithm."""
        super().load_state_dict(state)
        for kind, model in self._acceptance.items():
            model.load_state_dict(state["acceptance"][kind])
        for cost, saved in zip(self._costs, state["costs"], strict=True):
            cost.load_state_dict(saved)
        self._lengths = [AcceptLength(*length) for length in state["lengths"]]
        self._steps_since_refresh = state["steps_since_refresh"]
