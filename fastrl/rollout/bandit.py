"""Choosing the speculation strategy of each decode step: bandits over `off` and draft trees.

The seed algorithms are those of TLT (arXiv 2511.16665, the BEG-MAB tuner) and its released code
(mit-han-lab/fastrl, third-party/sglang/python/sglang/srt/speculative/eagle_mab.py):
- `beg` BucketedEpsilonGreedy: arms grouped by verify_tokens, each group for batches up to a limit;
- `eg` EpsilonGreedy: every arm at every batch size that 2048 tree nodes a step allow;
- `ucb1` UCB1: rate plus a confidence bonus;
- `predefined` Predefined: batch-size thresholds -> strategy, nothing learned.
Taken from there: epsilon-greedy choice within a batch-size bucket, untried arms first, the reward
(emitted tokens per second of the step) over a sliding window with a median, an accept length
steadied across batch sizes, the limit of 2048 nodes.

What differs, and why:
- `off` is an arm in every bucket, so speculation ends wherever it does not pay. The bucket is that
  of the live batch at each step, so the choice follows a rollout's shrinking batch.
- A group of trees serves its own bucket and all smaller batches: several arms a bucket.
- An arm's rate is mean accept length / median step seconds, per row. The median keeps hiccups out
  of the time; of accept lengths, which are skewed, it would misjudge small batches (mostly 1,
  sometimes 8 has median 1). Per row, because the number of rows varies within a bucket: a whole
  step's tokens per second would favour the arm tried at the larger batch. At equal batch size both
  orders are the same.
- The mean accept length of a bucket is drawn towards the arm's recent mean over all buckets with
  the weight of a few rows: few steps then suffice to judge an arm in a new bucket, and a better
  drafter shows in all of them.
- `discount` forgets acceptance, which a new policy or drafter makes stale, not step times.
- Random choices favour fast arms (EpsilonGreedy says how), so that a useless drafter costs little.
- UCB1 takes rates in units of the best arm's (next to raw tokens per second its bonus would vanish)
  and discounts its counts (Kocsis and Szepesvari, 2006), so that it notices a new best arm.
- Random choices come from a seeded generator of the bandit's own, kept in its state.

Leaves out models of step cost and of acceptance by depth, and agreement between tensor-parallel
ranks, whose step times differ: there, one rank decides.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fastrl.rollout.bandit_base import (
    DEFAULT_BATCH_THRESHOLDS,
    Bandit,
    BanditReport,
    BucketReport,
)
from fastrl.rollout.bandit_windows import WindowBandit
from fastrl.rollout.engine import CostQuery
from fastrl.rollout.place import Place
from fastrl.types import OFF, DraftStrategy, StepStats

__all__ = [
    "UCB1",
    "Bandit",
    "BanditReport",
    "BucketReport",
    "BucketedEpsilonGreedy",
    "EpsilonGreedy",
    "FixedStrategy",
    "InTurns",
    "Predefined",
]


_LEAST_COUNT = 1e-9
"""A discounted count may vanish while the batch is too large for its arm."""


class FixedStrategy:
    """Always the same strategy.

    Args:
        strategy: Draft tree as depth_topk_verifytokens ('8_4_48'), or 'off'.
    """

    def __init__(self, strategy: str = "off") -> None:
        self.strategy = DraftStrategy.parse(strategy)
        self._is_excluded = False
        self._stand_in = (
            dataclasses.replace(self.strategy, drafter="ngram")
            if self.strategy.needs_learned_drafter
            else OFF
        )

    @property
    def strategies(self) -> tuple[DraftStrategy, ...]:
        """The one."""
        return (self.strategy,)

    def select(
        self, batch_size: int, context_tokens: int, referenced_rows: int = 0
    ) -> DraftStrategy:
        """The strategy, whatever the batch, or what stands in for it while it is excluded."""
        return self._stand_in if self._is_excluded else self.strategy

    def record(self, stats: StepStats) -> None:
        """Learns nothing."""

    def exclude(self, strategies: Collection[DraftStrategy]) -> None:
        """While the strategy cannot be run: n-gram trees of its shape, or `off` for these too."""
        self._is_excluded = self.strategy in strategies

    def cost_queries(self, max_batch_size: int, max_context: int) -> Sequence[CostQuery]:
        """None: nothing depends on costs."""
        return ()

    def record_cost(self, query: CostQuery, seconds: float) -> None:
        """Learns nothing."""


class InTurns:
    """One strategy after the other, at every step another: for checks and measurements.

    Args:
        strategies: Draft trees as depth_topk_verifytokens ('8_4_48'), and 'off', in their order.
    """

    def __init__(self, strategies: Sequence[str]) -> None:
        if not strategies:
            raise ValueError("InTurns needs at least one strategy, got none")
        self._order = [DraftStrategy.parse(text) for text in strategies]
        self._excluded: Collection[DraftStrategy] = ()
        self._num_steps = 0

    @property
    def strategies(self) -> tuple[DraftStrategy, ...]:
        """Each once."""
        return tuple(dict.fromkeys(self._order))

    def select(
        self, batch_size: int, context_tokens: int, referenced_rows: int = 0
    ) -> DraftStrategy:
        """The next one; `off` in place of one that is excluded."""
        strategy = self._order[self._num_steps % len(self._order)]
        self._num_steps += 1
        return OFF if strategy in self._excluded else strategy

    def record(self, stats: StepStats) -> None:
        """Learns nothing."""

    def exclude(self, strategies: Collection[DraftStrategy]) -> None:
        """While they cannot be run."""
        self._excluded = strategies

    def cost_queries(self, max_batch_size: int, max_context: int) -> Sequence[CostQuery]:
        """None: nothing depends on costs."""
        return ()

    def record_cost(self, query: CostQuery, seconds: float) -> None:
        """Learns nothing."""


class EpsilonGreedy(WindowBandit):
    """`eg`: the best arm of the bucket, and with probability epsilon any of its arms.

    Random choices weigh arms by the square of their rates r, the best one's being 1: however slow
    an arm is, exploring stays cheap. For a token the best arm takes 1 and an arm 1 / r, so a random
    choice adds sum r (1 - r) / sum r^2, at most a quarter for each arm that is not the best.

    Args:
        strategies: Draft trees to choose among besides 'off', which is always an arm: a list of
            depth_topk_verifytokens ('8_4_48').
        batch_thresholds: Smallest live batch of each bucket, ascending from 1; every bucket learns
            its own best arm.
        epsilon: Share of decisions made at random, to notice that another arm has become the best.
        window_size: Newest steps, of each arm in each bucket, that count.
        min_tries: Steps each arm gets in a bucket before the best one is preferred.
        seed: Seed of the random choices.
    """

    def __init__(
        self,
        strategies: list[str],
        batch_thresholds: Sequence[int] = DEFAULT_BATCH_THRESHOLDS,
        epsilon: float = 0.05,
        window_size: int = 100,
        min_tries: int = 3,
        seed: int = 0,
    ) -> None:
        super().__init__(strategies, batch_thresholds, window_size, min_tries, seed)
        if not 0 <= epsilon <= 1:
            raise ValueError(
                f"bandit: epsilon is a share of decisions, in [0, 1], got {epsilon}; 0.05 is usual"
            )
        self.epsilon = epsilon

    def _choose(self, bucket: int, candidates: list[int]) -> tuple[int, bool]:
        rates = self._rates(bucket, candidates)
        if self._rng.random() < self.epsilon:
            (arm,) = self._rng.choices(candidates, [rate * rate for rate in rates])
            return arm, True
        return candidates[rates.index(max(rates))], False


class BucketedEpsilonGreedy(EpsilonGreedy):
    """`beg`: epsilon-greedy among the arms whose tree size suits the live batch.

    Args:
        strategies: Draft trees to choose among besides 'off', which is always an arm: a list of
            depth_topk_verifytokens ('8_4_48').
        batch_thresholds: Smallest live batch of each bucket, ascending from 1; every bucket learns
            its own best arm.
        max_batch_sizes: Largest live batch at which trees of so many verify_tokens are tried, as a
            map verify_tokens -> batch size; trees it does not name have TLT's: over 32 at batch 1,
            over 16 up to 4, over 9 up to 20, smaller ones while batch size * verify_tokens <= 2048.
        uses_median_rate: Rate an arm by the median of its steps' tokens per second, as published,
            instead of mean accept length over median step time.
        epsilon: Share of decisions made at random, to notice that another arm has become the best.
        window_size: Newest steps, of each arm in each bucket, that count.
        min_tries: Steps each arm gets in a bucket before the best one is preferred.
        seed: Seed of the random choices.
    """

    def __init__(
        self,
        strategies: list[str],
        batch_thresholds: Sequence[int] = DEFAULT_BATCH_THRESHOLDS,
        max_batch_sizes: dict[int, int] | None = None,
        uses_median_rate: bool = False,
        epsilon: float = 0.05,
        window_size: int = 100,
        min_tries: int = 3,
        seed: int = 0,
    ) -> None:
        super().__init__(strategies, batch_thresholds, epsilon, window_size, min_tries, seed)
        self.uses_median_rate = uses_median_rate
        for arm, strategy in enumerate(self.arms):
            if not strategy.is_off:
                self._max_batch[arm] = min(self._max_batch[arm], _published_limit(strategy))
        for verify_tokens, max_batch in (max_batch_sizes or {}).items():
            self._limit_group(verify_tokens, max_batch)

    def _rates(self, bucket: int, arms: Sequence[int]) -> list[float]:
        """Tokens per second, as published, or what EpsilonGreedy takes."""
        if not self.uses_median_rate:
            return super()._rates(bucket, arms)
        return [self._windows[bucket][arm].median_tokens_per_second for arm in arms]

    def _limit_group(self, verify_tokens: int, max_batch: int) -> None:
        group = [i for i, arm in enumerate(self.arms) if arm.verify_tokens == verify_tokens]
        if not group or group[0] == 0 or max_batch < 1:
            raise ValueError(
                "bandit: max_batch_sizes maps verify_tokens of a strategy to a batch size >= 1, "
                f"got {verify_tokens}: {max_batch} with strategies {list(map(str, self.arms[1:]))}"
            )
        for arm in group:
            self._max_batch[arm] = max_batch


def _published_limit(strategy: DraftStrategy) -> float:
    """Largest live batch of TLT's default groups, whose batches start at 1, 2, 5 and 21."""
    for verify_tokens, max_batch in ((32, 1), (16, 4), (9, 20)):
        if strategy.verify_tokens > verify_tokens:
            return max_batch
    return math.inf


class UCB1(WindowBandit):
    """`ucb1`: the highest rate plus confidence bonus, with discounted counts.

    Rates count in units of the best arm's; the bonus is exploration * sqrt(2 ln N / n), n the arm's
    discounted count in the bucket, N the sum of all arms'.

    Args:
        strategies: Draft trees to choose among besides 'off', which is always an arm: a list of
            depth_topk_verifytokens ('8_4_48').
        batch_thresholds: Smallest live batch of each bucket, ascending from 1; every bucket learns
            its own best arm.
        exploration: Weight of the confidence bonus, in units of the best arm's rate.
        horizon: Steps of a bucket after which a try counts for 1/e of itself; a shorter one notices
            changes sooner and explores more.
        window_size: Newest steps, of each arm in each bucket, that count.
        min_tries: Steps each arm gets in a bucket before the bound decides.
    """

    def __init__(
        self,
        strategies: list[str],
        batch_thresholds: Sequence[int] = DEFAULT_BATCH_THRESHOLDS,
        exploration: float = 0.1,
        horizon: int = 500,
        window_size: int = 100,
        min_tries: int = 3,
    ) -> None:
        super().__init__(strategies, batch_thresholds, window_size, min_tries, seed=0)
        if exploration < 0 or horizon < 1:
            raise ValueError(
                "bandit: need exploration >= 0 and horizon >= 1, got "
                f"exploration {exploration}, horizon {horizon}"
            )
        self.exploration = exploration
        self.horizon = horizon
        self._counts = [[0.0] * len(self.arms) for _ in self.batch_thresholds]

    def _observe(self, place: Place, arm: int, stats: StepStats) -> None:
        super()._observe(place, arm, stats)
        fading = math.exp(-1 / self.horizon)
        counts = [count * fading for count in self._counts[place.bucket]]
        counts[arm] += 1
        self._counts[place.bucket] = counts

    def discount(self, keep: float, *, drafter_changed: bool = True) -> None:
        """Forget acceptance of older steps, and trust every arm's rate the less for it."""
        super().discount(keep, drafter_changed=drafter_changed)
        self._counts = [[count * keep for count in counts] for counts in self._counts]

    def _choose(self, bucket: int, candidates: list[int]) -> tuple[int, bool]:
        rates, counts = self._rates(bucket, candidates), self._counts[bucket]
        highest, scale = max(rates), 2 * math.log(max(sum(counts), 1.0))
        bounds = [
            rate / highest + self.exploration * math.sqrt(scale / max(counts[arm], _LEAST_COUNT))
            for arm, rate in zip(candidates, rates, strict=True)
        ]
        chosen = bounds.index(max(bounds))
        return candidates[chosen], chosen != rates.index(highest)

    def state_dict(self) -> dict[str, Any]:
        """All that further decisions depend on."""
        return super().state_dict() | {"counts": [list(counts) for counts in self._counts]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave."""
        super().load_state_dict(state)
        self._counts = [list(counts) for counts in state["counts"]]


class Predefined(WindowBandit):
    """`predefined`: the strategy a schedule names for the live batch; steps only serve reports.

    While that one is excluded, plain decoding stands in.

    Args:
        schedule: Smallest live batch -> strategy, from batch 1 on, such as {1: '8_4_48', 5:
            '8_4_16', 33: 'off'}; each holds up to the next one's batch.
        window_size: Newest steps, of each arm in each bucket, that reports look at.
    """

    def __init__(self, schedule: dict[int, str], window_size: int = 100) -> None:
        thresholds = sorted(schedule)
        named = [DraftStrategy.parse(schedule[threshold]) for threshold in thresholds]
        speculative = dict.fromkeys(str(strategy) for strategy in named if not strategy.is_off)
        super().__init__(list(speculative), thresholds, window_size, min_tries=0, seed=0)
        self._arm_of_bucket = [self._arm_index[strategy] for strategy in named]

    def _decide(self, place: Place) -> tuple[int, bool]:
        arm = self._arm_of_bucket[place.bucket]
        return 0 if self.arms[arm] in self._excluded else arm, False

    def _choose(self, bucket: int, candidates: list[int]) -> tuple[int, bool]:
        return self._arm_of_bucket[bucket], False
