"""What every bandit over draft strategies shares: windows of steps, first tries, state, reports.

Evidence of an arm in a bucket of live batch sizes is a sliding window of its newest steps. Leaves
out how an arm is chosen: `bandit.py`, which also says what comes from where.
"""

from __future__ import annotations

import math
import random
import statistics
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

from fastrl.rollout.engine import CostQuery
from fastrl.types import OFF, DraftStrategy, StepStats

DEFAULT_BATCH_THRESHOLDS = (1, 2, 5, 9, 17, 33, 65)
"""Buckets 1, 2-4, 5-8, 9-16, 17-32, 33-64, 65 upwards: a step's cost varies little within one."""

MAX_TREE_NODES = 2048
"""Tree nodes a step may verify over all rows: its logits must fit memory (eagle_mab.py:438-446)."""

_PRIOR_ROWS = 16
"""Rows that an arm's mean accept length over all buckets counts for in each bucket."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BestArm:
    """The arm a bucket holds for best, and what it yielded."""

    strategy: DraftStrategy
    tokens_per_second: float
    """Median over the window's steps, the whole batch together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BanditReport:
    """What a bandit decided since `start_period`, and what it believes now."""

    num_decisions: int
    explore_share: float
    """Share of decisions made to learn: first tries and random ones; 0 with no decision."""
    arm_shares: Mapping[str, float]
    """Share of decisions by strategy, every arm named; 0 with no decision."""
    best_arms: Mapping[str, BestArm]
    """By bucket of live batch sizes (`1`, `2-4`, `65_up`); those without any step are left out."""


class _Window:
    """The last steps of one arm in one bucket; logarithmic time a step, constant time a look."""

    __slots__ = (
        "median_seconds",
        "num_current",
        "rows",
        "size",
        "sorted_seconds",
        "steps",
        "tokens",
    )

    def __init__(self, size: int) -> None:
        self.size = size
        self.steps: deque[tuple[int, int, float]] = deque()  # tokens, rows, seconds
        self.sorted_seconds: list[float] = []
        self.median_seconds = 0.0
        self.num_current = 0  # newest steps whose acceptance still counts
        self.tokens = 0  # sums over those
        self.rows = 0

    def append(self, tokens: int, rows: int, seconds: float) -> None:
        if len(self.steps) == self.size:
            self._drop_oldest()
        self.steps.append((tokens, rows, seconds))
        insort(self.sorted_seconds, seconds)
        middle = len(self.sorted_seconds) // 2
        self.median_seconds = (self.sorted_seconds[middle] + self.sorted_seconds[~middle]) / 2
        self.num_current += 1
        self.tokens += tokens
        self.rows += rows

    def _drop_oldest(self) -> None:
        if self.num_current == len(self.steps):
            self.num_current -= 1
            self.tokens -= self.steps[0][0]
            self.rows -= self.steps[0][1]
        *_, seconds = self.steps.popleft()
        del self.sorted_seconds[bisect_left(self.sorted_seconds, seconds)]

    def rate(self, mean_accept_length: float) -> float:
        """Expected tokens per second and row, accept lengths drawn towards the mean given."""
        tokens = self.tokens + _PRIOR_ROWS * mean_accept_length
        return tokens / ((self.rows + _PRIOR_ROWS) * self.median_seconds)

    @property
    def median_tokens_per_second(self) -> float:
        return statistics.median(tokens / seconds for tokens, _, seconds in self.steps)

    def keep_acceptance(self, num_steps: int) -> None:
        """Count the acceptance of the newest `num_steps` only."""
        self.num_current = num_steps
        current = list(islice(reversed(self.steps), num_steps))
        self.tokens = sum(tokens for tokens, _, _ in current)
        self.rows = sum(rows for _, rows, _ in current)


class Bandit(ABC):
    """A strategy selector that learns: windows, first tries and state; subclasses choose.

    Implements `engine.StrategySelector`. An arm that lost after its `min_tries` is tried again only
    as the algorithm explores; it is never forced again, however old its steps.
    """

    def __init__(
        self,
        strategies: Sequence[str],
        batch_thresholds: Sequence[int],
        window_size: int,
        min_tries: int,
        seed: int,
    ) -> None:
        self.arms = _parse_arms(strategies)
        self.batch_thresholds = _checked_thresholds(batch_thresholds)
        if window_size < 1 or not 0 <= min_tries <= window_size:
            raise ValueError(
                "bandit: need window_size >= 1 and 0 <= min_tries <= window_size, so that first "
                f"tries fit the window; got window_size {window_size}, min_tries {min_tries}"
            )
        self.window_size = window_size
        self.min_tries = min_tries
        self.seed = seed
        self._num_first_tries = max(min_tries, 1)
        self.journal: list[StepStats] | None = None
        """Steps recorded since their owner last took them; None keeps no journal."""
        self._max_batch: list[float] = [_node_limited_batch(arm) for arm in self.arms]
        self._arm_index = {arm: index for index, arm in enumerate(self.arms)}
        self._excluded: set[DraftStrategy] = set()
        self._rng = random.Random(seed)
        self._windows = [[_Window(window_size) for _ in self.arms] for _ in self.batch_thresholds]
        self._mean_accept = [1.0] * len(self.arms)  # over all buckets, older steps fading
        self._mean_weight = [0.0] * len(self.arms)  # rows behind it, faded alike
        self._untried = [set(range(len(self.arms))) for _ in self.batch_thresholds]
        self._num_selected = [[0] * len(self.arms) for _ in self.batch_thresholds]
        self.start_period()

    @abstractmethod
    def _choose(self, bucket: int, candidates: list[int]) -> tuple[int, bool]:
        """One of two or more candidates, all with steps in the bucket; whether it explores."""

    @property
    def strategies(self) -> tuple[DraftStrategy, ...]:
        """All arms, `off` first."""
        return self.arms

    def select(self, batch_size: int, context_tokens: int) -> DraftStrategy:
        """Strategy for a step over `batch_size` live rows; context length is not looked at."""
        bucket = self._bucket(batch_size)
        arm, is_exploring = self._decide(bucket, batch_size)
        self._num_selected[bucket][arm] += 1
        self._period_by_arm[arm] += 1
        self._period_explored += is_exploring
        return self.arms[arm]

    def exclude(self, strategies: Collection[DraftStrategy]) -> None:
        """Choose none of these until told anew; `off` cannot be excluded."""
        self._excluded = {arm for arm in self.arms if arm in strategies and not arm.is_off}

    def cost_queries(self, max_batch_size: int) -> Sequence[CostQuery]:
        """None: step times are learnt from rollouts."""
        return ()

    def record_cost(self, query: CostQuery, seconds: float) -> None:
        """Raises ValueError: costs were not asked for."""
        raise ValueError(f"bandit: {type(self).__name__} asked for no costs, got that of {query}")

    def _candidates(self, batch_size: int) -> list[int]:
        """Arms that may run at a batch size."""
        return [
            index
            for index, limit in enumerate(self._max_batch)
            if batch_size <= limit and self.arms[index] not in self._excluded
        ]

    def _decide(self, bucket: int, batch_size: int) -> tuple[int, bool]:
        candidates = self._candidates(batch_size)
        if len(candidates) == 1:
            return candidates[0], False
        if untried := self._untried[bucket].intersection(candidates):
            # In turns, so that arms meet the same batch sizes even while the batch shrinks.
            num_selected = self._num_selected[bucket]
            return min(untried, key=lambda arm: (num_selected[arm], arm)), True
        return self._choose(bucket, candidates)

    def record(self, stats: StepStats) -> None:
        """Learn from a finished step; raises ValueError for a strategy that is no arm."""
        arm = self._arm_index.get(stats.strategy)
        if arm is None:
            raise ValueError(
                f"bandit: a step was recorded for {stats.strategy}, which is none of its arms "
                f"{[str(a) for a in self.arms]}; run the strategy that select() returned"
            )
        if stats.seconds <= 0 or stats.batch_size < 1:
            raise ValueError(f"bandit: a step needs seconds > 0 and rows >= 1, got {stats}")
        bucket = self._bucket(stats.batch_size)
        self._observe(bucket, arm, stats.num_tokens, stats.batch_size, stats.seconds)
        if self.journal is not None:
            self.journal.append(stats)

    def _observe(self, bucket: int, arm: int, tokens: int, rows: int, seconds: float) -> None:
        window = self._windows[bucket][arm]
        window.append(tokens, rows, seconds)
        weight = (1 - 1 / self.window_size) * self._mean_weight[arm] + rows
        self._mean_accept[arm] += (tokens - rows * self._mean_accept[arm]) / weight
        self._mean_weight[arm] = weight
        if len(window.steps) >= self._num_first_tries:
            self._untried[bucket].discard(arm)

    def _bucket(self, batch_size: int) -> int:
        return bisect_right(self.batch_thresholds, batch_size) - 1

    def _rates(self, bucket: int, arms: Sequence[int]) -> list[float]:
        """Expected tokens per second and row, of arms with steps in the bucket."""
        windows, mean_accept = self._windows[bucket], self._mean_accept
        return [windows[arm].rate(mean_accept[arm]) for arm in arms]

    def discount(self, keep: float) -> None:
        """Forget acceptance of older steps, after the policy or the drafter changed.

        In each window the newest share `keep` goes on counting, rounded down; without any, the
        arm's mean over all buckets stands in, whose older steps lose weight alike. Step times stay,
        since they depend on shapes alone.
        """
        if not 0 <= keep <= 1:
            raise ValueError(f"bandit: keep must be in [0, 1] (1 forgets nothing), got {keep}")
        for arm_windows in self._windows:
            for window in arm_windows:
                window.keep_acceptance(int(keep * window.num_current))
        self._mean_weight = [keep * weight for weight in self._mean_weight]

    def reseed(self, step: int) -> None:
        """Draw further random choices from (seed, step), so that ranks draw alike."""
        self._rng = random.Random(f"{self.seed}/{step}")

    def start_period(self) -> None:
        """Count decisions from here on."""
        self._period_by_arm = [0] * len(self.arms)
        self._period_explored = 0

    def arm_shares(self) -> dict[str, float]:
        """Share of this period's decisions, by strategy."""
        num_decisions = max(sum(self._period_by_arm), 1)
        shares = (count / num_decisions for count in self._period_by_arm)
        return dict(zip(map(str, self.arms), shares, strict=True))

    def report(self) -> BanditReport:
        """This period's decisions and the present beliefs, for logging."""
        num_decisions = sum(self._period_by_arm)
        best_arms = {}
        for bucket, windows in enumerate(self._windows):
            if known := [arm for arm, window in enumerate(windows) if window.steps]:
                rates = self._rates(bucket, known)
                best = known[rates.index(max(rates))]
                best_arms[self._bucket_name(bucket)] = BestArm(
                    strategy=self.arms[best],
                    tokens_per_second=windows[best].median_tokens_per_second,
                )
        return BanditReport(
            num_decisions=num_decisions,
            explore_share=self._period_explored / max(num_decisions, 1),
            arm_shares=self.arm_shares(),
            best_arms=best_arms,
        )

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
            "windows": [
                [{"steps": list(w.steps), "num_current": w.num_current} for w in arm_windows]
                for arm_windows in self._windows
            ],
            "mean_accept": list(self._mean_accept),
            "mean_weight": list(self._mean_weight),
            "num_selected": [list(counts) for counts in self._num_selected],
            "period": {"by_arm": list(self._period_by_arm), "explored": self._period_explored},
            "rng": self._rng.getstate(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave; raises ValueError for other arms, buckets or algorithm."""
        mine = self.state_dict()
        for key in ("algorithm", "arms", "batch_thresholds"):
            if state[key] != mine[key]:
                raise ValueError(
                    f"bandit: the saved state has {key} {state[key]}, this run has {mine[key]}; "
                    "resume with the saved run's bandit settings"
                )
        for windows, saved_windows in zip(self._windows, state["windows"], strict=True):
            for arm, saved in enumerate(saved_windows):
                windows[arm] = self._restored_window(saved)
        self._mean_accept = list(state["mean_accept"])
        self._mean_weight = list(state["mean_weight"])
        self._untried = [
            {arm for arm, window in enumerate(windows) if len(window.steps) < self._num_first_tries}
            for windows in self._windows
        ]
        self._num_selected = [list(counts) for counts in state["num_selected"]]
        self._period_by_arm = list(state["period"]["by_arm"])
        self._period_explored = state["period"]["explored"]
        version, words, gauss_next = state["rng"]
        self._rng.setstate((version, tuple(words), gauss_next))

    def _restored_window(self, saved: Mapping[str, Any]) -> _Window:
        window = _Window(self.window_size)
        for tokens, rows, seconds in saved["steps"]:
            window.append(tokens, rows, seconds)
        window.keep_acceptance(min(saved["num_current"], len(window.steps)))
        return window


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
