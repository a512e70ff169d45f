"""Simulated engines for the model-based bandit: true acceptance and true costs, dynamic trees."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterable

from fastrl.rollout.engine import StrategySelector
from fastrl.rollout.place import Place
from fastrl.types import OFF, DraftStrategy, StepStats

Levels = list[list[float]]


def at(bucket: int, batch_size: int, context_tokens: int = 100) -> Place:
    """A place at level 0."""
    return Place(bucket, 0, batch_size, context_tokens)


class World:
    """Rows whose drafts are sometimes easy and sometimes hard, and steps that cost what they cost.

    Args:
        first: probability that the target's token is the first child of a node, at any depth.
        second: of the second child; later ones have half of it.
        noise: standard deviation of the logarithm of step times; one step in 50 takes tenfold.
    """

    def __init__(
        self, first: float, second: float = 0.1, *, noise: float = 0.1, seed: int = 0
    ) -> None:
        self.first, self.second, self.noise = first, second, noise
        self.rng = random.Random(seed)
        self.num_hiccups = 0

    def levels(self, ease: float, topk: int, depth: int) -> Levels:
        first = min(self.first * ease, 0.97)
        others = [min(self.second, (1 - first) / 2) / 2**rank for rank in range(topk - 1)]
        return [[first, *others]] * depth

    def cost(self, strategy: DraftStrategy, batch_size: int) -> float:
        """True seconds: a fixed part, a part for each token verified, a part for each draft."""
        verify = 3e-3 + 0.1e-3 * batch_size * strategy.verify_tokens
        draft = strategy.depth * (0.2e-3 + 0.01e-3 * batch_size * max(strategy.topk, 1))
        return verify + draft

    def step(self, strategy: DraftStrategy, batch_size: int) -> StepStats:
        offered = [[0] * strategy.topk for _ in range(strategy.depth)]
        accepted = [[0] * strategy.topk for _ in range(strategy.depth)]
        lengths = []
        for _ in range(batch_size):
            ease = self.rng.choice((0.7, 1.0, 1.3))
            lengths.append(1 + self._walk(strategy, ease, offered, accepted))
        seconds = self.cost(strategy, batch_size) * math.exp(self.rng.gauss(0, self.noise))
        if self.noise and self.rng.random() < 0.02:
            seconds *= 10
        return StepStats(
            strategy=strategy,
            batch_size=batch_size,
            context_tokens=100,
            accept_lengths=tuple(lengths),
            seconds=seconds,
            offered_by_rank=tuple(map(tuple, offered)),
            accepted_by_rank=tuple(map(tuple, accepted)),
        )

    def _walk(
        self,
        strategy: DraftStrategy,
        ease: float,
        offered: list[list[int]],
        accepted: list[list[int]],
    ) -> int:
        """Draft tokens accepted of a tree that this row's own probabilities chose."""
        if strategy.is_off:
            return 0
        levels = self.levels(ease, strategy.topk, strategy.depth)
        nodes = chosen_paths(levels, strategy)
        path: tuple[int, ...] = ()
        for depth in range(strategy.depth):
            children = [rank for rank in range(strategy.topk) if (*path, rank) in nodes]
            for rank in children:
                offered[depth][rank] += 1
            draw = self.rng.random()
            hit = None
            for rank in range(strategy.topk):
                draw -= levels[depth][rank]
                if draw < 0:
                    hit = rank
                    break
            if hit is None or hit not in children:
                return depth
            accepted[depth][hit] += 1
            path = (*path, hit)
        return strategy.depth

    def expected_length(self, strategy: DraftStrategy) -> float:
        """Exact mean accept length."""
        if strategy.is_off:
            return 1.0
        total = 0.0
        for ease in (0.7, 1.0, 1.3):
            levels = self.levels(ease, strategy.topk, strategy.depth)
            for path in chosen_paths(levels, strategy):
                total += math.prod(levels[depth][rank] for depth, rank in enumerate(path)) / 3
        return 1.0 + total

    def rate(self, strategy: DraftStrategy, batch_size: int) -> float:
        """True tokens a second, hiccups aside."""
        tokens = batch_size * self.expected_length(strategy)
        return tokens / self.cost(strategy, batch_size)


def chosen_paths(levels: Levels, strategy: DraftStrategy) -> set[tuple[int, ...]]:
    """The best nodes of a tree as paths of ranks, topk expanded a level, by exhaustive growth."""
    beam: list[tuple[float, tuple[int, ...]]] = [(1.0, ())]
    candidates: list[tuple[float, tuple[int, ...]]] = []
    for depth in range(strategy.depth):
        grown = [
            (chance * levels[depth][rank], (*path, rank))
            for chance, path in beam
            for rank in range(strategy.topk)
        ]
        candidates += grown
        beam = heapq.nlargest(strategy.topk, grown, key=lambda node: node[0])
    best = sorted(candidates, key=lambda node: (-node[0], len(node[1]), node[1]))
    return {path for _, path in best[: strategy.verify_tokens - 1]}


def play(
    bandit: StrategySelector, world: World, batches: Iterable[int]
) -> tuple[list[DraftStrategy], float]:
    """Strategies chosen, and the true rate relative to plain decoding's over all steps."""
    chosen = []
    ours = off = 0.0
    for batch_size in batches:
        strategy = bandit.select(batch_size, 100)
        bandit.record(world.step(strategy, batch_size))
        chosen.append(strategy)
        tokens = batch_size * world.expected_length(strategy)
        ours += world.cost(strategy, batch_size)
        off += tokens * world.cost(OFF, batch_size) / batch_size
    return chosen, off / ours
