"""How much of a draft tree the target accepts: one estimate for all strategies and batch sizes.

For each depth d and sibling rank r it holds the probability that the target's token is the rank-r
child of a node at depth d of the accepted path: a mean of what was offered and accepted, which
fades as policy and drafter change, drawn towards the estimate one level up (a deep level is seldom
reached); later children share what the first ones leave of 1. From these, the expected accept
length of any tree, run before or not, is that of the best static tree of its shape. That is exact
for chains; trees are dynamic, so that their measured length exceeds it a little: a correction for
each is learnt with it. Rows of one step resemble one another, the more so where they answer the
same prompt: they tell less than as many rows of several steps.

A change of the drafter without notice (its weights replaced, say) is told by a cumulative sum of
the likelihood that first drafts are accepted with other odds (Page, 1954). Leaves out what is then
done (bucket_acceptance.py) and step times (cost_model.py). Source of the tree: EAGLE-2 (arXiv
2406.16858).
"""

from __future__ import annotations

import heapq
import itertools
import math
import operator
from collections import deque
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

from fastrl.rollout.step_state import plain_stats, restored_stats
from fastrl.types import DraftStrategy, StepStats

_FIRST_RANK_PRIOR = 0.5
_OTHER_RANKS_PRIOR = 0.1
_REST_SHARE = 0.5
"""Of what a node's earlier children leave, a child gets no more by any prior."""
_PRIOR_ROWS = 4.0
_LEVEL_ROWS = 8.0
"""Rows that the level above counts for."""
_MAX_ROWS = 4000.0
"""Older rows fade beyond these."""
_CORRECTION_ROWS = 60.0
"""Effective rows that a tree's correction of 1 counts for."""
_DEEP_SHARE = 0.25
"""Of the uncertainty of deep levels, what tells strategies apart: most they share."""
_ROW_CORRELATION = 0.1
"""Between the accept lengths of a step's rows."""
_FEWEST_ROWS_TO_CORRECT = 64.0
"""Rows behind the estimate, from which on what it misses is the strategy's."""
_MOST_RELATIVE_DEVIATION = 0.6
"""Of one row's accept length, against its mean; a tree ends where a geometric length would not."""
_CORRECTION_DEVIATION = 0.02
"""Of a strategy's correction that no step has shown."""
_ODDS_CHANGE = 4.0
"""Changes of the odds of a first draft that are looked for: to a fourth, or fourfold."""
_ALARM = 12.0
"""Cumulative log-likelihood ratio."""
_NOTICED_ALARM = 5.0
"""The same while a notice is in doubt, since a change is then likely."""
_IN_DOUBT = 0.05
"""Deviation from which on it is."""
_NGRAM_ROWS = 1.5
"""Most rows that an n-gram step counts for in it."""
_RECENT_STEPS = 8
_NOTICED_ROWS = 8.0
"""Most that older rows count for after a notice of change."""
DOUBT_DEVIATION = 0.4
"""Of the logarithm of accept lengths, after a notice and before any step: a drafter that was poor
may have become a good one, however sure its poverty was."""
_DOUBT_ROWS = 8.0
"""Rows that leave a third of that."""


@dataclass(frozen=True, slots=True)
class AcceptLength:
    """What is believed of a strategy's mean accept length."""

    mean: float
    shared_deviation: float
    """Standard deviation of its logarithm, from what all strategies of the drafter share."""
    own_deviation: float
    """From what the strategy alone shows: deep levels, later children, its correction."""


PLAIN_LENGTH = AcceptLength(1.0, 0.0, 0.0)


class _Change:
    """Cumulative evidence that a first draft's odds are `factor` times what they are held for."""

    def __init__(self, factor: float) -> None:
        self._factor, self._log_factor = factor, math.log(factor)
        self.clear()

    def clear(self) -> None:
        self.total = 0.0
        self.num_steps = 0  # since the evidence began

    def record(self, rows: float, hits: float, chance: float) -> None:
        # Of a hit, log(other / chance); of a miss, log((1 - other) / (1 - chance)).
        self.total += hits * self._log_factor - rows * math.log(1 + (self._factor - 1) * chance)
        self.num_steps += 1
        if self.total <= 0:
            self.clear()


class AcceptanceModel:
    """Of one drafter.

    Args:
        strategies: all that it drafts for.
    """

    def __init__(self, strategies: Sequence[DraftStrategy]) -> None:
        self._strategies = list(strategies)
        depth = max(strategy.depth for strategy in strategies)
        topk = max(strategy.topk for strategy in strategies)
        self._offered = [[0.0] * topk for _ in range(depth)]
        self._accepted = [[0.0] * topk for _ in range(depth)]
        self._effective_rows = 0.0
        # Of each tree's steps: effective rows, their tokens, and tokens as they were modelled.
        self._own = {strategy: [0.0, 0.0, 0.0] for strategy in strategies}
        self._modelled = dict.fromkeys(strategies, 1.0)  # accept lengths, by the last look
        self.has_news = False
        """Whether steps were recorded since the last look."""
        self._first_prior = [
            _FIRST_RANK_PRIOR,
            *(_OTHER_RANKS_PRIOR / rank for rank in range(1, topk)),
        ]
        self._recent: deque[StepStats] = deque(maxlen=_RECENT_STEPS)
        self._changes = [_Change(1 / _ODDS_CHANGE), _Change(_ODDS_CHANGE)]
        self._doubt = 0.0
        self.lengths: dict[DraftStrategy, AcceptLength] = {}
        """What is believed of each strategy, by the last look."""
        self.look()

    @property
    def num_rows(self) -> float:
        """Rows behind the estimate."""
        return self._offered[0][0]

    def record(self, stats: StepStats) -> bool:
        """Learn from a step; whether the last ones contradict the estimate.

        Raises ValueError for a step without counts by depth and rank.
        """
        chance = sum(self._first_probabilities(stats.strategy.topk))
        chance = min(max(chance, 0.02), 0.98)
        self.learn(stats)
        num_rows = effective_rows(stats.batch_size)
        if stats.strategy.drafter == "ngram":
            # Whether n-grams find anything is rather a matter of the step than of its rows.
            num_rows = min(num_rows, _NGRAM_ROWS)
        hits = num_rows * sum(stats.accepted_by_rank[0]) / stats.batch_size
        for change in self._changes:
            change.record(num_rows, hits, chance)
        return self.num_rows >= _RECENT_STEPS and any(map(self._is_alarming, self._changes))

    def learn(self, stats: StepStats) -> None:
        """The same without looking for a contradiction."""
        if len(stats.accepted_by_rank) != stats.strategy.depth:
            raise ValueError(
                f"bandit: a step of {stats.strategy} was recorded without what was offered and "
                "accepted at each depth; the engine must fill offered_by_rank and accepted_by_rank"
            )
        self._recent.append(stats)
        if stats.strategy.topk > 1 and self.num_rows >= _FEWEST_ROWS_TO_CORRECT:
            own, rows = self._own[stats.strategy], effective_rows(stats.batch_size)
            tokens = rows * stats.num_tokens / stats.batch_size
            own[:] = own[0] + rows, own[1] + tokens, own[2] + rows * self._modelled[stats.strategy]
        self._add(stats)

    def _is_alarming(self, change: _Change) -> bool:
        return change.total >= (_ALARM if self._doubt < _IN_DOUBT else _NOTICED_ALARM)

    def _first_probabilities(self, topk: int) -> list[float]:
        """Of the root's first children: the first level of `probabilities`."""
        offered, accepted = self._offered[0], self._accepted[0]
        prior = self._first_prior[:topk]
        return _drawn_towards(offered[:topk], accepted[:topk], prior, _PRIOR_ROWS)

    def _add(self, stats: StepStats) -> None:
        self.has_news = True
        self._doubt *= math.exp(-stats.batch_size / _DOUBT_ROWS)
        self._effective_rows += effective_rows(stats.batch_size)
        reached = stats.batch_size
        is_ngram = stats.strategy.drafter == "ngram"
        for depth, (offered, accepted) in enumerate(
            zip(stats.offered_by_rank, stats.accepted_by_rank, strict=True)
        ):
            for rank, num_offered in enumerate(offered):
                # Rows for which n-grams drafted nothing count as offered: that is their length.
                self._offered[depth][rank] += reached if is_ngram else num_offered
                self._accepted[depth][rank] += accepted[rank]
            if not (reached := sum(accepted)):
                break

    def begun_anew(self) -> AcceptanceModel:
        """Another estimate, from the steps that contradict this one, as far as they are at hand.

        What a strategy's trees yield beyond the model is a matter of their shape, and stays.
        """
        model = AcceptanceModel(self._strategies)
        model._own = {strategy: list(own) for strategy, own in self._own.items()}
        num_steps = max(change.num_steps for change in self._changes if self._is_alarming(change))
        for stats in list(self._recent)[-num_steps:]:
            model._recent.append(stats)
            model._add(stats)
        model.look()
        return model

    def forget_alarm(self) -> None:
        """Look for contradictions from here on."""
        for change in self._changes:
            change.clear()

    def discount(self, keep: float) -> None:
        """Let all that was seen of the drafter count for the share `keep` of what it did.

        What a strategy's trees yield beyond the model is a matter of their shape, and stays.
        """
        self._effective_rows *= keep
        for counts in (*self._offered, *self._accepted):
            counts[:] = [keep * count for count in counts]

    def take_notice(self, keep: float) -> None:
        """Policy or drafter changed: older rows count for the share `keep`, and never for many.

        However sure it was of a drafter, a new one is tried again.
        """
        self.discount(min(keep, _NOTICED_ROWS / max(self.num_rows, 1.0)))
        self._doubt = DOUBT_DEVIATION
        self.forget_alarm()

    def bound(self) -> None:
        """Let the oldest rows fade where there are more than matter."""
        if self.num_rows > _MAX_ROWS:
            self.discount(_MAX_ROWS / self.num_rows)
        for own in self._own.values():
            if own[0] > _MAX_ROWS:
                own[:] = [_MAX_ROWS / own[0] * count for count in own]

    def probabilities(self) -> list[list[float]]:
        """[depth][rank]: of the target's token being that child, given the path down to it."""
        levels = [self._first_probabilities(len(self._first_prior))]
        for offered, accepted in zip(self._offered[1:], self._accepted[1:], strict=True):
            levels.append(_drawn_towards(offered, accepted, levels[-1], _LEVEL_ROWS))
        return levels

    def look(self) -> None:
        """Bring `lengths` up to date."""
        self.lengths = self.expected_lengths()
        self.has_news = False

    def expected_lengths(self) -> dict[DraftStrategy, AcceptLength]:
        """Of each strategy."""
        levels = self.probabilities()
        # That of a geometric length is the root of its chance: a poor drafter is soon known.
        relative_deviation = min(math.sqrt(sum(levels[0])), _MOST_RELATIVE_DEVIATION)
        lengths = {}
        for strategy in self._strategies:
            modelled = static_tree_length(levels, strategy)
            self._modelled[strategy] = modelled
            rows, tokens, own_modelled = self._own[strategy]
            prior = _CORRECTION_ROWS * modelled
            own_deviation = self._deviation_of_deep_levels(levels, strategy) / modelled
            if strategy.topk > 1:
                correction = _CORRECTION_DEVIATION / math.sqrt(1 + rows / _CORRECTION_ROWS)
                siblings = self._deviation_of_siblings(levels, strategy.topk) / modelled
                own_deviation = math.hypot(own_deviation, correction, siblings)
            lengths[strategy] = AcceptLength(
                modelled * (tokens + prior) / (own_modelled + prior),
                math.hypot(relative_deviation / math.sqrt(self._effective_rows + 1), self._doubt),
                own_deviation,
            )
        return lengths

    def _deviation_of_deep_levels(
        self, levels: Sequence[Sequence[float]], strategy: DraftStrategy
    ) -> float:
        """Standard deviation of an accept length by what is not known of levels after the first,
        which only strategies that draft so deep, and get there, can show."""
        chances = [min(sum(level[: strategy.topk]), 0.99) for level in levels[: strategy.depth]]
        reached = list(itertools.accumulate(chances, operator.mul))  # chance of each level's draft
        beyond = list(itertools.accumulate(reversed(reached)))[::-1]  # tokens from each level on
        weight = self._effective_rows / max(self.num_rows, 1.0)
        variance = 0.0
        for level, chance in enumerate(chances[1:], start=1):
            rows = weight * self._offered[level][0] + _LEVEL_ROWS
            variance += (beyond[level] / chance) ** 2 * chance * (1 - chance) / rows
        return _DEEP_SHARE * math.sqrt(variance)

    def _deviation_of_siblings(self, levels: Sequence[Sequence[float]], topk: int) -> float:
        """The same of a tree, by what is not known of later children, which chains never show."""
        weight = self._effective_rows / max(self.num_rows, 1.0)
        following = 1 + sum(levels[1]) if len(levels) > 1 else 1.0
        variance = 0.0
        for rank in range(1, topk):
            chance = levels[0][rank]
            rows = weight * self._offered[0][rank] + _PRIOR_ROWS
            variance += following**2 * chance * (1 - chance) / rows
        return math.sqrt(variance)

    def state_dict(self) -> dict[str, Any]:
        """Counts, sums, and the last steps, in plain numbers, lists and strings."""
        return {
            "offered": [list(counts) for counts in self._offered],
            "accepted": [list(counts) for counts in self._accepted],
            "effective_rows": self._effective_rows,
            "own": [list(self._own[strategy]) for strategy in self._strategies],
            "modelled": [self._modelled[strategy] for strategy in self._strategies],
            "changes": [[change.total, change.num_steps] for change in self._changes],
            "doubt": self._doubt,
            "lengths": [list(astuple(self.lengths[strategy])) for strategy in self._strategies],
            "has_news": self.has_news,
            "recent": [plain_stats(stats) for stats in self._recent],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave."""
        self._offered = [list(counts) for counts in state["offered"]]
        self._accepted = [list(counts) for counts in state["accepted"]]
        self._effective_rows = state["effective_rows"]
        self._own = dict(zip(self._strategies, map(list, state["own"]), strict=True))
        self._modelled = dict(zip(self._strategies, state["modelled"], strict=True))
        for change, (total, num_steps) in zip(self._changes, state["changes"], strict=True):
            change.total, change.num_steps = total, num_steps
        self._doubt = state["doubt"]
        lengths = (AcceptLength(*length) for length in state["lengths"])
        self.lengths = dict(zip(self._strategies, lengths, strict=True))
        self.has_news = state["has_news"]
        self._recent = deque(map(restored_stats, state["recent"]), maxlen=_RECENT_STEPS)


def effective_rows(num_rows: int) -> float:
    """Independent rows that tell as much of a mean as those of one step."""
    return num_rows / (1 + _ROW_CORRELATION * (num_rows - 1))


def static_tree_length(levels: Sequence[Sequence[float]], strategy: DraftStrategy) -> float:
    """Expected accept length of the best tree of a strategy's shape whose nodes are fixed.

    The root's sample counts 1; each node adds the probability that the path down to it is accepted.
    Nodes are taken best first, at most `topk` children a node and `topk` expanded nodes a level.

    Args:
        levels: [depth][rank] probabilities.
        strategy: its shape.
    """
    length = 1.0
    num_expanded = [0] * (strategy.depth + 1)
    candidates = [(-levels[0][rank], 1) for rank in range(strategy.topk)]
    heapq.heapify(candidates)
    for _ in range(strategy.verify_tokens - 1):
        if not candidates:
            break
        negative, depth = heapq.heappop(candidates)
        length -= negative
        if depth < strategy.depth and num_expanded[depth] < strategy.topk:
            num_expanded[depth] += 1
            for rank in range(strategy.topk):
                heapq.heappush(candidates, (negative * levels[depth][rank], depth + 1))
    return length


def _drawn_towards(
    offered: Sequence[float], accepted: Sequence[float], prior: Sequence[float], weight: float
) -> list[float]:
    """Shares accepted, as if `weight` more had been offered and accepted at the prior's rate, and
    no more in all than 1.

    A dynamic tree offers later children where the first are unsure: what was accepted of them there
    may exceed what is left on the whole.
    """
    shares: list[float] = []
    rest = 1.0
    for num_accepted, num_offered, chance in zip(accepted, offered, prior, strict=True):
        prior_chance = min(chance, _REST_SHARE * rest) if shares else chance
        share = (num_accepted + weight * prior_chance) / (num_offered + weight)
        shares.append(min(share, rest))
        rest -= shares[-1]
    return shares
