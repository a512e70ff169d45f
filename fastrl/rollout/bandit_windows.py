"""Bandits whose evidence of an arm in a bucket is a sliding window of its newest steps.

Windows, first tries and their state. Leaves out how an arm is chosen: `bandit.py`, which also says
what comes from where.
"""

from __future__ import annotations

import statistics
from abc import abstractmethod
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from fastrl.rollout.bandit_base import Bandit, check_keep
from fastrl.rollout.place import Place
from fastrl.types import StepStats

_PRIOR_ROWS = 16
"""Rows that an arm's mean accept length over all buckets counts for in each bucket."""


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


class WindowBandit(Bandit):
    """A bandit that learns from windows; subclasses choose.

    An arm that lost after its `min_tries` is tried again only as the algorithm explores; it is
    never forced again, however old its steps.
    """

    def __init__(
        self,
        strategies: Sequence[str],
        batch_thresholds: Sequence[int],
        window_size: int,
        min_tries: int,
        seed: int,
    ) -> None:
        super().__init__(strategies, batch_thresholds, seed)
        if window_size < 1 or not 0 <= min_tries <= window_size:
            raise ValueError(
                "bandit: need window_size >= 1 and 0 <= min_tries <= window_size, so that first "
                f"tries fit the window; got window_size {window_size}, min_tries {min_tries}"
            )
        self.window_size = window_size
        self.min_tries = min_tries
        self._num_first_tries = max(min_tries, 1)
        self._windows = [[_Window(window_size) for _ in self.arms] for _ in self.batch_thresholds]
        self._mean_accept = [1.0] * len(self.arms)  # over all buckets, older steps fading
        self._mean_weight = [0.0] * len(self.arms)  # rows behind it, faded alike
        self._untried = [set(range(len(self.arms))) for _ in self.batch_thresholds]
        self._num_selected = [[0] * len(self.arms) for _ in self.batch_thresholds]

    @abstractmethod
    def _choose(self, bucket: int, candidates: list[int]) -> tuple[int, bool]:
        """One of two or more candidates, all with steps in the bucket; whether it explores."""

    def _decide(self, place: Place) -> tuple[int, bool]:
        arm, is_exploring = self._decide_among(place.bucket, self._candidates(place.batch_size))
        self._num_selected[place.bucket][arm] += 1
        return arm, is_exploring

    def _decide_among(self, bucket: int, candidates: list[int]) -> tuple[int, bool]:
        if len(candidates) == 1:
            return candidates[0], False
        if untried := self._untried[bucket].intersection(candidates):
            # In turns, so that arms meet the same batch sizes even while the batch shrinks.
            num_selected = self._num_selected[bucket]
            return min(untried, key=lambda arm: (num_selected[arm], arm)), True
        return self._choose(bucket, candidates)

    def _observe(self, place: Place, arm: int, stats: StepStats) -> None:
        bucket, tokens, rows = place.bucket, stats.num_tokens, stats.batch_size
        window = self._windows[bucket][arm]
        window.append(tokens, rows, stats.seconds)
        weight = (1 - 1 / self.window_size) * self._mean_weight[arm] + rows
        self._mean_accept[arm] += (tokens - rows * self._mean_accept[arm]) / weight
        self._mean_weight[arm] = weight
        if len(window.steps) >= self._num_first_tries:
            self._untried[bucket].discard(arm)

    def _rates(self, bucket: int, arms: Sequence[int]) -> list[float]:
        """Expected tokens per second and row, of arms with steps in the bucket."""
        windows, mean_accept = self._windows[bucket], self._mean_accept
        return [windows[arm].rate(mean_accept[arm]) for arm in arms]

    def _usual_seconds(self, arm: int, place: Place) -> float | None:
        window = self._windows[place.bucket][arm]
        return window.median_seconds if window.steps else None

    def _believed_gains(self, place: Place) -> dict[int, float]:
        windows = self._windows[place.bucket]
        known = [arm for arm in self._candidates(place.batch_size) if windows[arm].steps]
        if 0 not in known:
            return {}
        rates = self._rates(place.bucket, known)
        return {arm: rate / rates[0] for arm, rate in zip(known, rates, strict=True)}

    def discount(self, keep: float, *, drafter_changed: bool = True) -> None:
        """Forget acceptance of older steps, after the policy or the drafter changed.

        In each window the newest share `keep` goes on counting, rounded down; without any, the
        arm's mean over all buckets stands in, whose older steps lose weight alike. Step times stay,
        since they depend on shapes alone.
        """
        check_keep(keep)
        for arm_windows in self._windows:
            for window in arm_windows:
                window.keep_acceptance(int(keep * window.num_current))
        self._mean_weight = [keep * weight for weight in self._mean_weight]

    def state_dict(self) -> dict[str, Any]:
        """All that further decisions depend on."""
        return super().state_dict() | {
            "windows": [
                [{"steps": list(w.steps), "num_current": w.num_current} for w in arm_windows]
                for arm_windows in self._windows
            ],
            "mean_accept": list(self._mean_accept),
            "mean_weight": list(self._mean_weight),
            "num_selected": [list(counts) for counts in self._num_selected],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave; raises ValueError for other arms, buckets or algorithm."""
        super().load_state_dict(state)
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

    def _restored_window(self, saved: Mapping[str, Any]) -> _Window:
        window = _Window(self.window_size)
        for tokens, rows, seconds in saved["steps"]:
            window.append(tokens, rows, seconds)
        window.keep_acceptance(min(saved["num_current"], len(window.steps)))
        return window
