"""The default bandit: predicts every arm from a model of acceptance and a model of cost.

Expected tokens a second of an arm are its expected accept length over its expected step time.
Accept lengths come from one estimate for all arms of a drafter and, until a bucket shows another,
all batch sizes (acceptance_model.py, bucket_acceptance.py); for n-grams, from one for each bucket
and each of three shares of rows that have a response to look things up in (ngram_acceptance.py).
Step times are profiled before the first rollout, then tracked (cost_model.py). So a few steps of
any tree tell about all trees, those of a learned drafter at all batch sizes, and `off`, whose
accept length is 1, is an arm like any other.

A decision draws every arm's rate from its posterior and takes the best (Thompson sampling, 1933):
arms are tried as often as they may be the best, and no more. If that is the arm with the best mean,
it is held for some steps. Besides, four of the first steps in each bucket of batch sizes, and then
one in two hundred at least, are of `off`: what speculation gains is measured against them; and one
in 64 is of a drafter that was found out there.

Leaves out the choice among several drafters' trees at once, and agreement between tensor-parallel
ranks, whose step times differ: there, one rank decides.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from fastrl.rollout.acceptance_model import PLAIN_LENGTH, AcceptLength
from fastrl.rollout.bandit_base import (
    DEFAULT_BATCH_THRESHOLDS,
    MOST_WAITING_STEPS,
    Bandit,
    MeasuredCost,
    check_keep,
)
from fastrl.rollout.bucket_acceptance import BucketAcceptance
from fastrl.rollout.cost_model import CostModel
from fastrl.rollout.drafter_acceptance import DrafterAcceptance
from fastrl.rollout.engine import CostQuery
from fastrl.rollout.ngram_acceptance import NgramAcceptance, reference_level
from fastrl.rollout.place import Place
from fastrl.types import DraftStrategy, StepStats

_MOST_STEPS_PER_DRAW = 12
"""Steps that a draw of the best arm serves in a bucket, unless what it rests on changed at once: a
draft's length decides where the next begins, so that arms in turns yield less than one alone."""
_STEPS_PER_EVIDENCE = 4
"""Steps of evidence, since a change, for each further step that a draw serves."""
_FIRST_STEPS = 24
"""Steps after a change that are learned one by one."""
_FEWEST_COSTS = 4
"""Steps in a bucket from which on an arm's time is known."""
_STEPS_PER_REFRESH, _MOST_STEPS_PER_REFRESH = 8, 64
"""Steps between two looks at the acceptance model; the latter once these tell little new."""
_STEP_KEEP = 0.999
"""Share of what was seen of acceptance that a decode step leaves: arms that went unused for long
are tried again."""
_SHORT_CONTEXT = 128
"""Context in which arms are profiled at all batch sizes."""
_LEAST_LONG_CONTEXT, _MOST_LONG_CONTEXT = 1024, 4096
"""Rollouts that grow longer than the former have their arms profiled in a second context: the
longest, up to the latter. What less adds to a step drowns in the noise of its time."""
_LONG_CONTEXT_ROWS = (1, 16)
"""Batch sizes there."""
_CONTROL_STEPS = 200
"""Decisions in a bucket, one of which at least is for `off`."""
_FIRST_CONTROL_STEPS = 5
"""The same until `off` has had enough steps there, so that short runs measure their gains too."""
_ENOUGH_CONTROLS = 4
_PROBE_STEPS = 64
"""Decisions in a bucket, one of which at least is for a drafter that was found out there: it may
have recovered, which nobody tells."""
_PROMISING = 0.5
"""Share of first drafts accepted, with which a drafter is tried again at once."""
_WINNING_DEVIATIONS = 3.5
"""An arm that would have to exceed its mean by so many is not drawn."""


class _Option(NamedTuple):
    """An arm at a batch size: the logarithm of its rate, and standard deviations of it."""

    arm: int
    drafter: int
    rate: float
    shared_deviation: float
    own_deviation: float


class ModelBased(Bandit):
    """Thompson sampling over predicted tokens a second.

    Args:
        strategies: Draft trees to choose among besides 'off', which is always an arm: a list of
            depth_topk_verifytokens ('8_4_48'), or of n-gram ones ('ngram_8_1_9').
        batch_thresholds: Smallest live batch of each bucket, ascending from 1; step times are
            tracked for each.
        seed: Seed of the draws from the posterior.
    """

    def __init__(
        self,
        strategies: list[str],
        batch_thresholds: Sequence[int] = DEFAULT_BATCH_THRESHOLDS,
        seed: int = 0,
    ) -> None:
        super().__init__(strategies, batch_thresholds, seed)
        kinds: dict[str, list[DraftStrategy]] = {}
        for arm in self.arms:
            if not arm.is_off:
                kinds.setdefault(arm.drafter, []).append(arm)
        self._kinds = list(kinds)
        num_buckets = len(self.batch_thresholds)
        self._ngrams = NgramAcceptance(kinds["ngram"]) if "ngram" in kinds else None
        self._acceptance: dict[str, DrafterAcceptance] = {
            kind: self._ngrams if kind == "ngram" and self._ngrams else BucketAcceptance(arms)
            for kind, arms in kinds.items()
        }
        self._cost = CostModel(len(self.arms), num_buckets, self._two_kinds)
        # By bucket and level: the arm drawn that is believed the best; may its steps wait.
        self._held: dict[tuple[int, int], tuple[int, bool]] = {}
        self._steps_since_draw = 0
        self._steps_since_change = 0
        self._steps_since_refresh = 0
        self._refresh_steps = _STEPS_PER_REFRESH
        self._num_steps = [0] * num_buckets
        # Of these, from which on the next control, and the next probe of a drafter, is due.
        self._control_at = [_FIRST_CONTROL_STEPS] * num_buckets
        self._probe_at = [dict.fromkeys(self._kinds, _PROBE_STEPS) for _ in self._num_steps]

    # -- costs ------------------------------------------------------------------------------------

    def cost_queries(self, max_batch_size: int, max_context: int) -> Sequence[CostQuery]:
        """Every arm at 1, 4, 16, … rows, up to the most it may have, and at few rows in a long
        context, where there will be any; none twice."""
        short, long = min(_SHORT_CONTEXT, max_context), min(_MOST_LONG_CONTEXT, max_context)
        long_sizes = sorted({min(size, max_batch_size) for size in _LONG_CONTEXT_ROWS})
        queries = []
        for index, arm in enumerate(self.arms):
            most = int(min(max_batch_size, self._max_batch[index]))
            shapes = [
                (size, short)
                for size in (*(4**power for power in range(10) if 4**power < most), most)
                if not self._cost.covers_batch(index, size)
            ]
            if long >= _LEAST_LONG_CONTEXT and not self._cost.covers_context(index, long):
                shapes += [(size, long) for size in long_sizes]
            queries += [
                CostQuery(strategy=arm, batch_size=size, context_tokens=context)
                for size, context in shapes
                if index in self._candidates(size)
            ]
        return queries

    def record_cost(self, query: CostQuery, seconds: float) -> None:
        """A point of an arm's profile."""
        arm = self._arm_index[query.strategy]
        self._cost.add_profile(arm, query.batch_size, query.context_tokens, seconds)
        self._held.clear()
        if self.journal is not None:
            self.journal.append(MeasuredCost(query=query, seconds=seconds))

    def _usual_seconds(self, arm: int, place: Place) -> float | None:
        return self._cost.usual_seconds(arm, place)

    # -- choice -----------------------------------------------------------------------------------

    def _decide(self, place: Place) -> tuple[int, bool]:
        bucket = place.bucket
        if self._num_steps[bucket] >= self._control_at[bucket]:
            self._control_at[bucket] += MOST_WAITING_STEPS  # by when it will have been learned
            self._can_wait = self._may_wait(0, bucket)
            return 0, True
        held = self._held.get((bucket, place.level))
        if held is not None and place.batch_size <= self._max_batch[held[0]]:
            arm, self._can_wait = held
            is_exploring = False
        else:
            arm, is_exploring = self._choose(place)
        if arm == 0 and (probed := self._probed(place)) is not None:
            self._can_wait = False
            return probed, True
        return arm, is_exploring

    def _may_wait(self, arm: int, bucket: int) -> bool:
        """Whether a step of the arm may be learned a few steps later."""
        if arm and self._acceptance[self.arms[arm].drafter].contradicted(bucket):
            return False
        is_settled = self._steps_since_change >= _FIRST_STEPS
        return is_settled and self._cost.num_steps(arm, bucket) >= _FEWEST_COSTS

    def _probed(self, place: Place) -> int | None:
        """The cheapest strategy of a drafter that has to be tried again; None: there is none."""
        for kind, acceptance in self._acceptance.items():
            bucket = place.bucket
            is_due = self._num_steps[bucket] >= self._probe_at[bucket][kind]
            if not is_due or not acceptance.contradicted(bucket):
                continue
            arms = [
                arm
                for arm in self._candidates(place.batch_size)[1:]
                if self.arms[arm].drafter == kind and self._cost.is_known(arm, place)
            ]
            if arms:
                return min(arms, key=lambda arm: self._cost.seconds(arm, place))
        return None

    def _level(self, referenced_rows: int, batch_size: int) -> int:
        """Of n-grams; always 0 without any."""
        return reference_level(referenced_rows, batch_size) if self._ngrams else 0

    def _choose(self, place: Place) -> tuple[int, bool]:
        self.learn()
        candidates = self._candidates(place.batch_size)
        for arm in candidates:
            if not self._cost.is_known(arm, place):
                return arm, True
        options = self._options(place, candidates)
        drawn = self._draw(options)
        is_best = drawn is options[0]
        self._can_wait = self._may_wait(drawn.arm, place.bucket)
        if is_best and self._cost.num_steps(drawn.arm, place.bucket) >= _FEWEST_COSTS:
            self._held[place.bucket, place.level] = drawn.arm, self._can_wait
        return drawn.arm, not is_best

    def _options(self, place: Place, candidates: Sequence[int]) -> list[_Option]:
        """The arms that may be the best there, the likeliest first."""
        options = []
        for arm in candidates:
            believed = self._length(arm, place)
            options.append(
                _Option(
                    arm,
                    self._kinds.index(self.arms[arm].drafter) if arm else -1,
                    math.log(believed.mean / self._cost.seconds(arm, place)),
                    believed.shared_deviation,
                    math.hypot(believed.own_deviation, self._cost.deviation(arm, place.bucket)),
                )
            )
        options.sort(key=lambda option: -option.rate)
        least = options[0].rate - _reach(options[0])
        return [option for option in options if option.rate + _reach(option) >= least]

    def _draw(self, options: Sequence[_Option]) -> _Option:
        """The one with the highest rate, each drawn from what is believed of it."""
        if len(options) == 1:
            return options[0]
        gauss = self._rng.gauss
        # A drafter's trees stand or fall together with what all of them share.
        shared = [gauss(0.0, 1.0) for _ in self._kinds]
        rates = [
            rate
            + own_deviation * gauss(0.0, 1.0)
            + (shared_deviation * shared[drafter] if drafter >= 0 else 0.0)
            for _, drafter, rate, shared_deviation, own_deviation in options
        ]
        return options[rates.index(max(rates))]

    def exclude(self, strategies: Collection[DraftStrategy]) -> None:
        """Choose none of these until told anew; `off` cannot be excluded."""
        super().exclude(strategies)
        self._held.clear()

    # -- learning ---------------------------------------------------------------------------------

    def _observe(self, place: Place, arm: int, stats: StepStats) -> None:
        bucket = place.bucket
        self._cost.record(arm, place, stats.seconds)
        self._num_steps[bucket] = num_steps = self._num_steps[bucket] + 1
        if not arm:
            is_known = self._cost.num_steps(0, bucket) >= _ENOUGH_CONTROLS
            control_steps = _CONTROL_STEPS if is_known else _FIRST_CONTROL_STEPS
            self._control_at[bucket] = num_steps + control_steps
        self._steps_since_draw += 1
        self._steps_since_change += 1
        self._steps_since_refresh += 1
        started_anew = False
        if arm:
            acceptance = self._acceptance[stats.strategy.drafter]
            started_anew = acceptance.record(bucket, stats)
            num_hits = sum(stats.accepted_by_rank[0])
            is_promising = num_hits >= _PROMISING * stats.batch_size
            probe_steps = 0 if is_promising else _PROBE_STEPS
            self._probe_at[bucket][stats.strategy.drafter] = num_steps + probe_steps
            # A look costs more than a step's counts; it is worth it when they have grown.
            interval = int(acceptance.num_rows(bucket, place.level) / (8 * stats.batch_size))
            self._refresh_steps = min(max(interval, _STEPS_PER_REFRESH), _MOST_STEPS_PER_REFRESH)
        steps_per_draw = min(
            1 + self._steps_since_change // _STEPS_PER_EVIDENCE, _MOST_STEPS_PER_DRAW
        )
        if started_anew or self._steps_since_refresh >= self._refresh_steps:
            for acceptance in self._acceptance.values():
                acceptance.look(_STEP_KEEP**self._steps_since_refresh)
            self._steps_since_refresh = 0
            self._draw_anew()
            if started_anew:
                self._steps_since_change = 0
        elif self._steps_since_draw >= steps_per_draw:
            self._draw_anew()

    def _length(self, arm: int, place: Place) -> AcceptLength:
        if arm == 0:
            return PLAIN_LENGTH
        strategy = self.arms[arm]
        return self._acceptance[strategy.drafter].lengths(place.bucket, place.level)[strategy]

    def _draw_anew(self) -> None:
        self._held.clear()
        self._steps_since_draw = 0

    def discount(self, keep: float, *, drafter_changed: bool = True) -> None:
        """Forget acceptance in part, after the policy or the drafter changed; times stay."""
        check_keep(keep)
        self.learn()
        for acceptance in self._acceptance.values():
            if keep < 1:
                acceptance.take_notice(keep, drafter_changed=drafter_changed)
        self._steps_since_refresh = 0
        if drafter_changed:
            self._steps_since_change = 0
        self._draw_anew()

    # -- what it believes -------------------------------------------------------------------------

    def _believed_gains(self, place: Place) -> dict[int, float]:
        rates = {}
        for arm in self._candidates(place.batch_size):
            if self._cost.is_known(arm, place):
                rates[arm] = self._length(arm, place).mean / self._cost.seconds(arm, place)
        return {arm: rate / rates[0] for arm, rate in rates.items()} if 0 in rates else {}

    @property
    def num_alarms(self) -> int:
        """Changes of a drafter that were noticed without notice."""
        self.learn()
        return sum(acceptance.num_alarms for acceptance in self._acceptance.values())

    # -- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that further decisions depend on, in plain numbers, lists and strings."""
        return super().state_dict() | {
            "acceptance": {kind: own.state_dict() for kind, own in self._acceptance.items()},
            "cost": self._cost.state_dict(),
            "held": [[*place, *held] for place, held in self._held.items()],
            "steps": {
                "since_draw": self._steps_since_draw,
                "since_change": self._steps_since_change,
                "since_refresh": self._steps_since_refresh,
                "refresh": self._refresh_steps,
                "in_bucket": list(self._num_steps),
                "control_at": list(self._control_at),
                "probe_at": [dict(by_kind) for by_kind in self._probe_at],
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave; raises ValueError for other arms, buckets or algorithm."""
        super().load_state_dict(state)
        for kind, acceptance in self._acceptance.items():
            acceptance.load_state_dict(state["acceptance"][kind])
        self._cost.load_state_dict(state["cost"])
        self._held = {(bucket, level): (arm, waits) for bucket, level, arm, waits in state["held"]}
        if any(self.arms[arm] in self._excluded for arm, _ in self._held.values()):
            self._held.clear()
        steps = state["steps"]
        self._steps_since_draw = steps["since_draw"]
        self._steps_since_change = steps["since_change"]
        self._steps_since_refresh = steps["since_refresh"]
        self._refresh_steps = steps["refresh"]
        self._num_steps = list(steps["in_bucket"])
        self._control_at = list(steps["control_at"])
        self._probe_at = [dict(by_kind) for by_kind in steps["probe_at"]]


def _reach(option: _Option) -> float:
    return _WINNING_DEVIATIONS * (option.shared_deviation + option.own_deviation)
