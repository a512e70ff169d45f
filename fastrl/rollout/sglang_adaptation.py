"""The trainer's side of adaptation inside SGLang: its selector goes there and comes back.

The bandit that the trainer holds decides in SGLang's scheduler: each `generate` call sends it there
with its state, and takes back what it has learned (sglang_steps.py). In between nothing else holds
it, so callbacks report, discount, save and restore it as they do beside the embedded engine.

Where ranks share an engine, the first one's decides, and all ranks' take what it learned; its steps
are in the first one's journal alone, so that each is counted once when ranks exchange journals.

Its questions about step times are answered by rehearsals: decode steps of every strategy, in turn,
over rows of random tokens, in the very engine that the rollouts use. Leaves out how it decides.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from fastrl.rollout.bandit_base import Bandit
from fastrl.rollout.engine import CostQuery, StrategySelector
from fastrl.rollout.sglang_calls import ModelInfo
from fastrl.rollout.sglang_filters import sglang_filters
from fastrl.rollout.sglang_steps import Rehearsal, SessionReport
from fastrl.rollout.shared_process import SharedProcess, SharedRequests, SharedResponses
from fastrl.types import SamplingParams

_STEPS = 6
"""Of each strategy, the first of which warms up."""


@contextmanager
def without_journal(selector: StrategySelector) -> Iterator[None]:
    """A bandit's journal, which may be long, stays here while the bandit is sent away; and what it
    learns here meanwhile is not noted in it."""
    if not isinstance(selector, Bandit) or selector.journal is None:
        yield
        return
    journal, selector.journal = selector.journal, []
    try:
        yield
    finally:
        selector.journal = journal


def take_back(selector: StrategySelector, report: SessionReport) -> None:
    """Let the selector know what it, or that of the rank which leads, learned while it was away."""
    if not isinstance(selector, Bandit) or report.bandit_state is None:
        return
    selector.load_state_dict(report.bandit_state)
    if selector.journal is not None and report.journal is not None:
        selector.journal.extend(report.journal)


def generate_under(
    selector: StrategySelector | None,
    asked: SharedRequests,
    *,
    process: SharedProcess,
    model: ModelInfo,
    sampling: SamplingParams,
    max_batch_size: int,
    timeout_s: float,
) -> SharedResponses:
    """Responses whose steps the selector chooses, once it knows the step times that it asks for.

    Args:
        selector: this rank's; None for stock SGLang, which has one strategy.
        asked: by all ranks.
        process: SGLang's.
        model: that it serves.
        sampling: of the rollouts.
        max_batch_size: most rows decoded at once.
        timeout_s: seconds that the call, and any one rehearsal, may take.
    """
    if selector is None:
        return process.generate(asked, timeout_s, None)
    if asked.requests:
        _answer_cost_queries(
            process,
            timeout_s,
            selector,
            max_batch_size=max_batch_size,
            max_context=asked.longest,
            sampling=sampling,
            model=model,
        )
    with without_journal(selector):
        return process.generate(asked, timeout_s, selector)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """A rehearsal to come."""

    queries: list[CostQuery]
    """That it answers: other strategies over the same rows."""
    prompts: list[list[int]]
    sampling: dict[str, Any]


def _answer_cost_queries(
    process: SharedProcess,
    timeout_s: float,
    selector: StrategySelector,
    *,
    max_batch_size: int,
    max_context: int,
    sampling: SamplingParams,
    model: ModelInfo,
) -> None:
    """Time what the leader's selector asks for, and tell all ranks'; one that has been answered
    asks for nothing more. What has no room in the cache is not rehearsed.
    """
    ranks = process.ranks
    runs = ranks.lead(
        "runs to rehearse",
        lambda: _runs(selector.cost_queries(max_batch_size, max_context), sampling, model),
    )
    for run in runs:
        timed = _timed(process, timeout_s, run)
        with nullcontext() if ranks.is_leader else without_journal(selector):
            for query, seconds in timed.items():
                if seconds:
                    selector.record_cost(query, sorted(seconds)[:2][-1])
                    continue
                warnings.warn(
                    f"SGLang ran no steps of {query.strategy} over {query.batch_size} rows, and is "
                    f"asked for them again before each rollout, which takes time; set "
                    f"engine.max_batch_size to what it runs at once",
                    stacklevel=2,
                )


def _timed(process: SharedProcess, timeout_s: float, run: _Run) -> dict[CostQuery, Sequence[float]]:
    """Seconds of each query's steps, the first aside.

    Where the prompts of a full batch are read in parts, SGLang keeps one row waiting: then a
    rehearsal without that row answers.
    """
    strategies = [query.strategy for query in run.queries]
    timed: dict[CostQuery, Sequence[float]] = {}
    for prompts in (run.prompts, run.prompts[:-1]):
        if not prompts:
            break
        report: SessionReport = process.call(
            "rehearse",
            timeout_s,
            prompts=prompts,
            sampling=run.sampling,
            rehearsal=Rehearsal(strategies=strategies, batch_size=len(prompts), num_steps=_STEPS),
        )
        timed = {
            query: report.step_seconds.get(str(query.strategy), ())[1:] for query in run.queries
        }
        if all(timed.values()):
            break
    return timed


def _runs(queries: Sequence[CostQuery], sampling: SamplingParams, model: ModelInfo) -> list[_Run]:
    """One for all strategies asked for at the same batch size and context, which is cut to what
    there is room for."""
    groups: dict[tuple[int, int], list[CostQuery]] = {}
    for query in queries:
        groups.setdefault((query.batch_size, query.context_tokens), []).append(query)
    runs = []
    for (batch_size, context_tokens), asked in groups.items():
        strategies = [query.strategy for query in asked]
        num_tokens = 2 + sum((strategy.depth + 1) * _STEPS for strategy in strategies)
        largest = max(max(one.topk * one.depth, one.verify_tokens) for one in strategies)
        room = min(model.max_sequence, model.pool_tokens // batch_size) - num_tokens - 3 * largest
        context_tokens = min(context_tokens, room)
        if context_tokens < 1:
            continue
        runs.append(
            _Run(
                queries=[replace(query, context_tokens=context_tokens) for query in asked],
                prompts=_random_prompts(batch_size, context_tokens, model.config.vocab_size),
                sampling=_endless(sampling, num_tokens),
            )
        )
    return runs


def _random_prompts(num_prompts: int, num_tokens: int, vocab_size: int) -> list[list[int]]:
    """Each another one: what they share would be read once for all."""
    rng = random.Random(0)
    return [[rng.randrange(vocab_size) for _ in range(num_tokens)] for _ in range(num_prompts)]


def _endless(sampling: SamplingParams, num_tokens: int) -> dict[str, Any]:
    """SGLang's sampling parameters of a row that nothing ends before so many tokens."""
    return {
        **sglang_filters(sampling),
        "max_new_tokens": num_tokens,
        "ignore_eos": True,
        "sampling_seed": 0,
    }


def check_in_pool(selector: StrategySelector, prepared: Sequence[Any]) -> None:
    """Raise ValueError for a selector with strategies that the engine was not started for."""
    if missing := [str(one) for one in selector.strategies if one not in prepared]:
        raise ValueError(
            f"the engine was started for strategies {[str(one) for one in prepared]}, and cannot "
            f"run {missing}: close it, and start it anew with a selector that has them all"
        )
