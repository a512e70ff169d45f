"""What eval_drafter.py says of a drafter: counts by strategy, task, place, depth and rank.

The place of a decode step is that of the first token it emits in its response, from 1 (the token at
0 is the prefill's); places are put together in buckets 1, 2-3, 4-7, … . A chain of drafts is at the
place of its first draft. All are plain counts, so those of the parts add up to those of the whole,
but for SGLang's acceptance by place, of which ends of responses are left out (`PlaceCounts`).
Leaves out generating (eval_drafter.py), tables and plots (acceptance_report.py), and speed
(rollout_figures.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fastrl.types import EngineStats, Rollout, StepStats

KS = (1, 2, 4, 8)
"""Of top-k accuracy."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Which steps or drafts a figure is of; all where nothing else is said."""

    task: str | None = None
    places: tuple[int, int] | None = None
    """First and last of a bucket."""

    @property
    def name(self) -> str:
        """For a table."""
        if self.places is not None:
            return "-".join(map(str, dict.fromkeys(self.places)))
        return "all" if self.task is None else self.task


@dataclass(frozen=True, kw_only=True)
class LengthFigure:
    """Accept length of a strategy."""

    strategy: str
    part: Part
    num_steps: int
    """Decode steps, summed over responses."""
    num_tokens: int
    """That they emitted."""

    @property
    def accept_length(self) -> float:
        """Tokens a step."""
        return self.num_tokens / self.num_steps


@dataclass(frozen=True, kw_only=True)
class AcceptanceFigure:
    """Drafts of a strategy that were offered for verification, and accepted."""

    strategy: str
    part: Part
    depth: int
    """From 1."""
    rank: int | None
    """From 1, the drafter's most likely child; None: whichever child."""
    num_offered: int
    """Steps of a response that accepted all depths above and, with a rank, had such a child."""
    num_accepted: int

    @property
    def rate(self) -> float:
        """Accepted of those offered; 0 if none were."""
        return self.num_accepted / self.num_offered if self.num_offered else 0.0


@dataclass(frozen=True, kw_only=True)
class TopkFigure:
    """How often a response's token is among the drafter's k most likely ones."""

    part: Part
    depth: int
    """From 1."""
    k: int
    num_tokens: int
    num_hits: int

    @property
    def accuracy(self) -> float:
        """Hits of all tokens."""
        return self.num_hits / self.num_tokens


# -- accept lengths -------------------------------------------------------------------------------


def bucket(place: int) -> tuple[int, int]:
    """First and last place of the bucket that a place, from 1, is in."""
    first = 1 << (place.bit_length() - 1)
    return first, 2 * first - 1


def steps_with_places(rollout: Rollout) -> Iterator[tuple[int, int]]:
    """The place of each decode step of a response, and the tokens it emitted."""
    place = 1
    for num_tokens in rollout.accept_lengths:
        yield place, num_tokens
        place += num_tokens


def length_figures(strategy: str, rollouts: Mapping[str, Sequence[Rollout]]) -> list[LengthFigure]:
    """Of all steps, of each task's and of each bucket's; rollouts are by task."""
    steps: Counter[Part] = Counter()
    tokens: Counter[Part] = Counter()
    for task, of_task in rollouts.items():
        for rollout in of_task:
            for place, num_tokens in steps_with_places(rollout):
                for part in _parts(task, place):
                    steps[part] += 1
                    tokens[part] += num_tokens
    return [
        LengthFigure(strategy=strategy, part=part, num_steps=steps[part], num_tokens=tokens[part])
        for part in sorted(steps, key=_order(list(rollouts)))
    ]


def _parts(task: str, place: int) -> tuple[Part, Part, Part]:
    return Part(), Part(task=task), Part(places=bucket(place))


def _order(tasks: Sequence[str]) -> Callable[[Part], tuple[int, int]]:
    """All, then tasks in their order, then buckets in theirs."""

    def key(part: Part) -> tuple[int, int]:
        if part.places is not None:
            return 2, part.places[0]
        return (0, 0) if part.task is None else (1, tasks.index(part.task))

    return key


# -- acceptance by depth and rank -----------------------------------------------------------------


class RankCounts:
    """Adds up offered and accepted children of a strategy's steps, which tell rows apart."""

    def __init__(self) -> None:
        self.task = ""
        """Of the steps that are added next."""
        self.by_place = PlaceCounts()
        self._tasks: dict[str, None] = {}  # in their order
        self._offered: Counter[tuple[Part, int, int]] = Counter()
        self._accepted: Counter[tuple[Part, int, int]] = Counter()

    def add(self, stats: StepStats) -> None:
        """A decode step."""
        self._tasks[self.task] = None
        for place, ranks, num_children in zip(
            stats.places, stats.ranks_by_row, stats.num_children_by_row, strict=True
        ):
            self.by_place.add(place, num_offered=len(num_children), num_accepted=len(ranks))
            for part in _parts(self.task, place):
                for depth, count in enumerate(num_children, start=1):
                    for rank in range(1, count + 1):
                        self._offered[part, depth, rank] += 1
                for depth, rank in enumerate(ranks, start=1):
                    self._accepted[part, depth, rank + 1] += 1

    def figures(self, strategy: str) -> list[AcceptanceFigure]:
        """By part, depth and rank; those that were never offered are left out."""
        order = _order(list(self._tasks))
        return [
            AcceptanceFigure(
                strategy=strategy,
                part=part,
                depth=depth,
                rank=rank,
                num_offered=self._offered[part, depth, rank],
                num_accepted=self._accepted[part, depth, rank],
            )
            for part, depth, rank in sorted(
                self._offered, key=lambda key: (order(key[0]), *key[1:])
            )
        ]


class PlaceCounts:
    """Adds up offered and accepted drafts by place and depth."""

    def __init__(self) -> None:
        self._offered: Counter[tuple[Part, int]] = Counter()
        self._accepted: Counter[tuple[Part, int]] = Counter()

    def add(self, place: int, *, num_offered: int, num_accepted: int) -> None:
        """A response's step: depths offered to it and accepted, each from the first on."""
        part = Part(places=bucket(place))
        for depth in range(1, num_offered + 1):
            self._offered[part, depth] += 1
        for depth in range(1, num_accepted + 1):
            self._accepted[part, depth] += 1

    @classmethod
    def of_rollouts(cls, rollouts: Iterable[Rollout], depth: int) -> PlaceCounts:
        """From the tokens that steps emitted, of an engine that tells no rows apart.

        The last token of a response is left out: nothing says whether it was a draft.
        """
        counts = cls()
        for rollout in rollouts:
            steps = list(steps_with_places(rollout))
            for number, (place, num_tokens) in enumerate(steps, start=1):
                num_known = num_tokens - (number == len(steps))
                counts.add(place, num_offered=min(num_known, depth), num_accepted=num_tokens - 1)
        return counts

    def figures(self, strategy: str) -> list[AcceptanceFigure]:
        """By place and depth; those that were never offered are left out."""
        order = _order(())
        return [
            AcceptanceFigure(
                strategy=strategy,
                part=part,
                depth=depth,
                rank=None,
                num_offered=self._offered[part, depth],
                num_accepted=self._accepted[part, depth],
            )
            for part, depth in sorted(self._offered, key=lambda key: (order(key[0]), key[1]))
        ]


def depth_figures(strategy: str, stats: Mapping[str, EngineStats]) -> list[AcceptanceFigure]:
    """By depth, over all tasks' calls and of each; depths never offered are left out."""
    offered: Counter[tuple[Part, int]] = Counter()
    accepted: Counter[tuple[Part, int]] = Counter()
    for task, one in stats.items():
        for part in (Part(), Part(task=task)):
            for counts, by_depth in (
                (offered, one.offered_by_depth),
                (accepted, one.accepted_by_depth),
            ):
                counts.update({(part, d): count for d, count in enumerate(by_depth, start=1)})
    order = _order(list(stats))
    return [
        AcceptanceFigure(
            strategy=strategy,
            part=part,
            depth=depth,
            rank=None,
            num_offered=offered[part, depth],
            num_accepted=accepted[part, depth],
        )
        for part, depth in sorted(offered, key=lambda key: (order(key[0]), key[1]))
        if offered[part, depth]
    ]


# -- top-k accuracy -------------------------------------------------------------------------------


def topk_figures(ranks: Mapping[str, Sequence[Sequence[Tensor]]]) -> list[TopkFigure]:
    """By depth and k: of all drafts, of each task's and of each bucket's.

    Args:
        ranks: by task, a response each, what `token_ranks` gives.
    """
    tokens: Counter[tuple[Part, int]] = Counter()
    hits: Counter[tuple[Part, int, int]] = Counter()
    for task, responses in ranks.items():
        for by_depth in responses:
            for depth, ranks_M in enumerate(by_depth, start=1):
                for place, rank in enumerate(ranks_M.tolist(), start=1):
                    for part in _parts(task, place):
                        tokens[part, depth] += 1
                        for k in KS:
                            hits[part, depth, k] += rank < k
    order = _order(list(ranks))
    return [
        TopkFigure(
            part=part,
            depth=depth,
            k=k,
            num_tokens=tokens[part, depth],
            num_hits=hits[part, depth, k],
        )
        for part, depth in sorted(tokens, key=lambda key: (order(key[0]), key[1]))
        for k in KS
    ]
