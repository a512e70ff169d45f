"""What every bandit over draft strategies shares: arms, buckets, exclusion, journal, report, state.

Leaves out what is learnt and how an arm is chosen: `bandit_windows.py` and `bandit.py` (sliding
windows, which also say what comes from where), `model_bandit.py` (a model of acceptance and cost).
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fastrl.rollout.engine import CostQuery
from fastrl.rollout.gain_meter import GainMeter
from fastrl.rollout.place import Place
from fastrl.rollout.step_state import plain_stats, restored_stats
from fastrl.types import OFF, DraftStrategy, StepStats

DEFAULT_BATCH_THRESHOLDS = (1, 2, 5, 9, 17, 33, 65)
"""Buckets 1, 2-4, 5-8, 9-16, 17-32, 33-64, 65 upwards: a step's cost varies little within one."""

MOST_WAITING_STEPS = 4
"""Steps that wait to be learned together, at most: between decode steps Python runs cold, and four
at once take less than one by one (docs/log.md)."""

MAX_TREE_NODES = 2048
"""Tree nodes a step may verify over all rows: its logits must fit memory (eagle_mab.py:438-446)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredCost:
    """A cost query and its answer, as journals keep them."""

    query: CostQuery
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketReport:
    """One bucket of live batch sizes: a period's steps in it, and what is believed of it now.

    Gains are tokens a second over those of `off` at the same batch sizes.
    """

    arm_shares: Mapping[str, float]
    """Share of the bucket's decisions by strategy, every arm named."""
    best: DraftStrategy | None
    """The arm believed to be the fastest; None where nothing is known of `off`."""
    tokens_per_second: float
    """Of the whole batch together."""
    gain: float | None
    """Measured, over all steps, those of `off` included; None where most were not."""
    predicted_gain: float | None
    """Of the arms that were run, as believed before the period; None where nothing was known."""
    arm_gains: Mapping[str, float]
    """Measured, by strategy that was run, next to `off` at least a few times."""
    believed_gains: Mapping[str, float]
    """Of every strategy that may run and whose step time is known, at the period's mean batch, a
    mean over the period's levels of references."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BanditReport:
    """What a bandit decided since `start_period`, what that gained, and what it believes now."""

    num_decisions: int
    explore_share: float
    """Share of decisions made to learn: first tries, control steps and random ones; 0 without."""
    arm_shares: Mapping[str, float]
    """Share of decisions by strategy, every arm named; 0 with no decision."""
    gain: float | None
    """Measured over all steps: seconds that `off` would have needed over seconds taken."""
    regret_share: float
    """Share of the period's decode time lost against each bucket's best arm that may run now, as
    now believed."""
    regret_s: float
    """Seconds lost so since the start."""
    buckets: Mapping[str, BucketReport]
    """By bucket of live batch sizes (`1`, `2-4`, `65_up`); those without any step are left out."""


class Bandit(ABC):
    """A strategy selector that learns: subclasses say what, and choose.

    Implements `engine.StrategySelector`.
    """

    def __init__(self, strategies: Sequence[str], batch_thresholds: Sequence[int], seed: int):
        self.arms = _parse_arms(strategies)
        self.batch_thresholds = _checked_thresholds(batch_thresholds)
        self.seed = seed
        self.journal: list[StepStats | MeasuredCost] | None = None
        """What was recorded since its owner last took it; None keeps no journal."""
        self._max_batch: list[float] = [_node_limited_batch(arm) for arm in self.arms]
        self._arm_index = {arm: index for index, arm in enumerate(self.arms)}
        self._excluded: set[DraftStrategy] = set()
        self._rng = random.Random(seed)
        self._two_kinds = [i for i, arm in enumerate(self.arms) if arm.drafter == "ngram"]
        """Arms whose steps take the time of a plain one wherever they find nothing to draft."""
        self._meter = GainMeter(len(self.batch_thresholds), len(self.arms), self._two_kinds)
        self._past_regret_s = 0.0
        self._waiting: list[StepStats] = []  # to be learned
        # Whether the step last decided on may be learned a few steps later.
        self._can_wait = False
        self._clear_period()

    @abstractmethod
    def _decide(self, place: Place) -> tuple[int, bool]:
        """The arm of a step, and whether it is taken to learn; may set `_can_wait`."""

    @abstractmethod
    def _observe(self, place: Place, arm: int, stats: StepStats) -> None:
        """Learn from a step that has been checked."""

    @abstractmethod
    def discount(self, keep: float, *, drafter_changed: bool = True) -> None:
        """Forget acceptance in part, down to a share `keep`: the policy changed, or the learned
        drafter was replaced as well."""

    @abstractmethod
    def _usual_seconds(self, arm: int, place: Place) -> float | None:
        """Median seconds of a step; None while unknown."""

    @abstractmethod
    def _believed_gains(self, place: Place) -> dict[int, float]:
        """Tokens a second over those of `off`, by arm known and allowed; empty without `off`."""

    @property
    def strategies(self) -> tuple[DraftStrategy, ...]:
        """All arms, `off` first."""
        return self.arms

    def select(
        self, batch_size: int, context_tokens: int, referenced_rows: int = 0
    ) -> DraftStrategy:
        """Strategy for a step; see `engine.StrategySelector.select`."""
        place = self._place(batch_size, context_tokens, referenced_rows)
        arm, is_exploring = self._decide(place)
        self._period_choices[place.bucket][arm] += 1
        self._period_explored += is_exploring
        return self.arms[arm]

    def exclude(self, strategies: Collection[DraftStrategy]) -> None:
        """Choose none of these until told anew; `off` cannot be excluded."""
        self._excluded = {arm for arm in self.arms if arm in strategies and not arm.is_off}

    def largest_batch(self, strategy: DraftStrategy) -> int | None:
        """The most live rows that the arm may be chosen for; None for any number."""
        limit = self._max_batch[self._arm_index[strategy]]
        return None if limit == math.inf else int(limit)

    def cost_queries(self, max_batch_size: int, max_context: int) -> Sequence[CostQuery]:
        """None: step times are learnt from rollouts."""
        return ()

    def record_cost(self, query: CostQuery, seconds: float) -> None:
        """Raises ValueError: costs were not asked for."""
        raise ValueError(f"bandit: {type(self).__name__} asked for no costs, got that of {query}")

    def record(self, stats: StepStats) -> None:
        """Learn from a finished step; raises ValueError for a strategy that is no arm."""
        if stats.strategy not in self._arm_index:
            raise ValueError(
                f"bandit: a step was recorded for {stats.strategy}, which is none of its arms "
                f"{[str(a) for a in self.arms]}; run the strategy that select() returned"
            )
        if stats.seconds <= 0 or stats.batch_size < 1:
            raise ValueError(f"bandit: a step needs seconds > 0 and rows >= 1, got {stats}")
        self._waiting.append(stats)
        if self.journal is not None:
            self.journal.append(stats)
        if not self._can_wait or len(self._waiting) >= MOST_WAITING_STEPS:
            self.learn()
        self._can_wait = False

    def learn(self) -> None:
        """Learn from the steps that wait, if there are any."""
        for stats in self._waiting:
            place, arm = self._place_of(stats), self._arm_index[stats.strategy]
            self._measure(place, arm, stats)
            self._observe(place, arm, stats)
        self._waiting.clear()

    def _measure(self, place: Place, arm: int, stats: StepStats) -> None:
        """Count a step's gain, by what was known before it."""
        if (place.bucket, place.level) not in self._forecasts:
            self._forecasts[place.bucket, place.level] = self._believed_gains(place)
        usual_seconds = self._usual_seconds(arm, place)
        self._meter.add(place, arm, stats.num_tokens, stats.seconds, usual_seconds)

    def replay(self, entry: StepStats | MeasuredCost) -> None:
        """Learn from an entry of a journal, another rank's or one's own, without measuring gains:
        steps of several ranks in turns have no neighbours."""
        self.learn()
        if isinstance(entry, StepStats):
            self._observe(self._place_of(entry), self._arm_index[entry.strategy], entry)
        else:
            self.record_cost(entry.query, entry.seconds)

    def _candidates(self, batch_size: int) -> list[int]:
        """Arms that may run a step over so many rows; `off`, 0, always."""
        return [
            index
            for index, limit in enumerate(self._max_batch)
            if batch_size <= limit and self.arms[index] not in self._excluded
        ]

    def _level(self, referenced_rows: int, batch_size: int) -> int:
        """What tells steps of a bucket apart, besides their size: nothing, unless overridden."""
        return 0

    def _place(self, batch_size: int, context_tokens: int, referenced_rows: int) -> Place:
        bucket = bisect_right(self.batch_thresholds, batch_size) - 1
        return Place(bucket, self._level(referenced_rows, batch_size), batch_size, context_tokens)

    def _place_of(self, stats: StepStats) -> Place:
        return self._place(stats.batch_size, stats.context_tokens, stats.referenced_rows)

    def reseed(self, step: int) -> None:
        """Draw further random choices from (seed, step), so that ranks draw alike."""
        self._rng = random.Random(f"{self.seed}/{step}")

    def start_period(self) -> None:
        """Count decisions and gains from here on; the regret so far is settled by what is believed
        now."""
        self.learn()
        self._past_regret_s += self._lost_seconds(self._believed_by_place())
        self._meter.start_period()
        self._clear_period()

    def _clear_period(self) -> None:
        self._period_choices = [[0] * len(self.arms) for _ in self.batch_thresholds]
        self._period_explored = 0
        # By bucket and level, from before the first step there.
        self._forecasts: dict[tuple[int, int], dict[int, float]] = {}

    def _believed_by_place(self) -> dict[tuple[int, int], dict[int, float]]:
        """By bucket and level with steps this period, at the bucket's mean batch and context."""
        return {
            (bucket, level): self._believed_gains(self._meter.mean_place(bucket, level))
            for bucket in self._meter.buckets
            for level in self._meter.level_shares(bucket)
        }

    def _lost_seconds(self, believed: Mapping[tuple[int, int], Mapping[int, float]]) -> float:
        """Of this period, against the best arms that may run now."""
        barred = {b: self._barred_gains(b, gains) for (b, _), gains in believed.items()}
        return self._meter.lost_seconds(believed, barred)

    def _barred_gains(self, bucket: int, allowed: Collection[int]) -> dict[int, float]:
        """Of arms that ran this period and were excluded since: by the tokens that they yielded,
        since what is believed of them may be from before they failed, and their usual times."""
        place = self._meter.mean_place(bucket)
        off_seconds = self._usual_seconds(0, place)
        gains = {}
        for arm, length in self._meter.accept_lengths(bucket).items():
            seconds = self._usual_seconds(arm, place)
            if arm not in allowed and off_seconds and seconds:
                gains[arm] = length * off_seconds / seconds
        return gains

    def report(self) -> BanditReport:
        """This period's decisions and gains, and the present beliefs, for logging."""
        self.learn()
        by_arm = [sum(counts) for counts in zip(*self._period_choices, strict=True)]
        believed = self._believed_by_place()
        lost_seconds = self._lost_seconds(believed)
        return BanditReport(
            num_decisions=sum(by_arm),
            explore_share=self._period_explored / max(sum(by_arm), 1),
            arm_shares=self._shares(by_arm),
            gain=self._meter.gain(self._meter.buckets),
            regret_share=lost_seconds / (self._meter.total_seconds or 1.0),
            regret_s=self._past_regret_s + lost_seconds,
            buckets={
                self._bucket_name(bucket): self._bucket_report(bucket, believed)
                for bucket in self._meter.buckets
            },
        )

    def _bucket_report(
        self, bucket: int, believed: Mapping[tuple[int, int], Mapping[int, float]]
    ) -> BucketReport:
        meter = self._meter
        shares = meter.level_shares(bucket)
        by_level = {level: believed[bucket, level] for level in shares}
        known = set.intersection(*(set(gains) for gains in by_level.values()))
        believed_gains = {
            arm: sum(share * by_level[level][arm] for level, share in shares.items())
            for arm in sorted(known)
        }
        forecasts = {level: self._forecasts[bucket, level] for level in shares}
        return BucketReport(
            arm_shares=self._shares(self._period_choices[bucket]),
            best=self.arms[max(believed_gains, key=believed_gains.__getitem__)]
            if believed_gains
            else None,
            tokens_per_second=meter.tokens_per_second(bucket),
            gain=meter.gain([bucket]),
            predicted_gain=meter.expected_gain(bucket, forecasts),
            arm_gains=self._by_name(meter.arm_gains(bucket)),
            believed_gains=self._by_name(believed_gains),
        )

    def _by_name(self, by_arm: Mapping[int, float]) -> dict[str, float]:
        return {str(self.arms[arm]): value for arm, value in by_arm.items()}

    def _shares(self, counts: Sequence[int]) -> dict[str, float]:
        num_decisions = max(sum(counts), 1)
        shares = (count / num_decisions for count in counts)
        return dict(zip(map(str, self.arms), shares, strict=True))

    def _bucket_name(self, bucket: int) -> str:
        first = self.batch_thresholds[bucket]
        if bucket + 1 == len(self.batch_thresholds):
            return f"{first}_up"
        last = self.batch_thresholds[bucket + 1] - 1
        return str(first) if first == last else f"{first}-{last}"

    def state_dict(self) -> dict[str, Any]:
        """All that further decisions depend on, in plain numbers, lists and strings."""
        return {
            "algorithm": type(self).__name__,
            "arms": [str(arm) for arm in self.arms],
            "batch_thresholds": list(self.batch_thresholds),
            "period": {
                "choices": [list(counts) for counts in self._period_choices],
                "explored": self._period_explored,
                "forecasts": [
                    [*place, list(gains.items())] for place, gains in self._forecasts.items()
                ],
                "gains": self._meter.state_dict(),
                "past_regret_s": self._past_regret_s,
            },
            "rng": self._rng.getstate(),
            "waiting": [plain_stats(stats) for stats in self._waiting],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave; raises ValueError for other arms, buckets or algorithm."""
        mine = Bandit.state_dict(self)
        for key in ("algorithm", "arms", "batch_thresholds"):
            if state[key] != mine[key]:
                raise ValueError(
                    f"bandit: the saved state has {key} {state[key]}, this run has {mine[key]}; "
                    "resume with the saved run's bandit settings"
                )
        self._period_choices = [list(counts) for counts in state["period"]["choices"]]
        self._period_explored = state["period"]["explored"]
        self._forecasts = {
            (bucket, level): dict(gains) for bucket, level, gains in state["period"]["forecasts"]
        }
        self._meter.load_state_dict(state["period"]["gains"])
        self._past_regret_s = state["period"]["past_regret_s"]
        self._waiting = [restored_stats(stats) for stats in state["waiting"]]
        version, words, gauss_next = state["rng"]
        self._rng.setstate((version, tuple(words), gauss_next))


def check_keep(keep: float) -> None:
    """Raises ValueError unless `keep` is a share."""
    if not 0 <= keep <= 1:
        raise ValueError(f"bandit: keep must be in [0, 1] (1 forgets nothing), got {keep}")


def _parse_arms(strategies: Sequence[str]) -> tuple[DraftStrategy, ...]:
    arms = tuple(DraftStrategy.parse(text) for text in strategies)
    if not arms:
        raise ValueError(
            "bandit: strategies is empty; name at least one draft tree such as '8_4_48', or use "
            "FixedStrategy for plain decoding"
        )
    for index, arm in enumerate(arms):
        if arm.is_off:
            raise ValueError("bandit: 'off' is always an arm; leave it out of strategies")
        if arm in arms[:index]:
            raise ValueError(f"bandit: strategy '{arm}' is listed twice; list each once")
    return (OFF, *arms)


def _checked_thresholds(thresholds: Sequence[int]) -> tuple[int, ...]:
    is_ascending = all(lower < upper for lower, upper in pairwise(thresholds))
    if not thresholds or thresholds[0] != 1 or not is_ascending:
        raise ValueError(
            "bandit: batch thresholds must ascend strictly from 1, so that each batch size has one "
            f"bucket, as in {list(DEFAULT_BATCH_THRESHOLDS)}; got {list(thresholds)}"
        )
    return tuple(thresholds)


def _node_limited_batch(arm: DraftStrategy) -> float:
    return math.inf if arm.is_off else max(MAX_TREE_NODES // arm.verify_tokens, 1)
