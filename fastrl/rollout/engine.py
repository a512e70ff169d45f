"""The contract of a rollout engine, and of the strategy selector it asks before each decode step.

Two engines keep it: the embedded one (`torch_engine`) and SGLang's (`sglang_engine`). The same
contract tests run over both. Nothing here imports Lightning.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from fastrl.rollout.weight_differences import WeightDifference
from fastrl.types import DraftStrategy, EngineStats, Prompt, Rollout, SamplingParams, StepStats


@dataclass(frozen=True, kw_only=True, slots=True)
class CostQuery:
    """A decode step whose time a strategy selector wants to know before it has to choose."""

    strategy: DraftStrategy
    batch_size: int
    context_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightEvents:
    """How often an engine's weights have been touched: equal counts, equal weights."""

    policy_loads: int = 0
    drafter_loads: int = 0
    """Publications; the checkpoint that an engine starts with is none."""
    wakes: int = 0
    """Starts included: all weights have come anew."""


@runtime_checkable
class StrategySelector(Protocol):
    """Chooses the speculation strategy of each decode step."""

    @property
    def strategies(self) -> Sequence[DraftStrategy]:
        """All that it may choose: an engine refuses, when it starts, those it cannot run."""
        ...

    def select(
        self, batch_size: int, context_tokens: int, referenced_rows: int = 0
    ) -> DraftStrategy:
        """Strategy for a step over `batch_size` live rows, the longest of `context_tokens`;
        `referenced_rows` as in `StepStats`, 0 from an engine that does not know."""
        ...

    def record(self, stats: StepStats) -> None:
        """Learn from a finished step."""
        ...

    def exclude(self, strategies: Collection[DraftStrategy]) -> None:
        """Choose none of these until told anew: their drafter is not ready, or not healthy."""
        ...

    def cost_queries(self, max_batch_size: int, max_context: int) -> Sequence[CostQuery]:
        """What it wants timed before rollouts of up to so many live rows and, prompts included, so
        many tokens; empty if it learns from rollouts alone, or was answered before."""
        ...

    def record_cost(self, query: CostQuery, seconds: float) -> None:
        """Learn what such a step took, the second smallest of five; the query may have been cut to
        a context that leaves room for the steps."""
        ...


@runtime_checkable
class RolloutEngine(Protocol):
    """Generates rollouts that follow the policy's exact sampling distribution."""

    drafter_path: str | None
    """Checkpoint folder of the drafter it speculates with; None: only n-gram strategies can."""
    strategy_selector: StrategySelector

    def start(self, model_path: str) -> None:
        """Load model, tokenizer and drafter; after process groups exist."""
        ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        *,
        num_samples: int = 1,
        seed: int = 0,
        rl_step: int = 0,
        return_hidden_states: bool = False,
    ) -> list[Rollout]:
        """`num_samples` responses a prompt, in order (prompt-major).

        The randomness of each token is a function of (seed, rl_step, prompt id, sample index,
        position) alone. Raises ValueError for a prompt that leaves no room for a response.
        """
        ...

    @property
    def policy_version(self) -> int:
        """Version of the weights it samples from; -1 before the first `load_policy`."""
        ...

    @property
    def drafter_version(self) -> int:
        """Version of the drafter it speculates with; -1 before the first `load_drafter`."""
        ...

    def load_policy(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take the policy's weights (Hugging Face names). All of them: a missing name raises.

        Of a sharded policy (DTensors) all ranks call this together, and give the same names in the
        same order.
        """
        ...

    def load_drafter(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take the drafter's trainable weights; embedding and LM head stay the policy's."""
        ...

    @property
    def weight_events(self) -> WeightEvents:
        """What has been done to its weights so far."""
        ...

    def compare_policy(self, named_tensors: Iterable[tuple[str, Tensor]]) -> list[WeightDifference]:
        """Hold the policy's weights that it serves against these (Hugging Face names, all of them):
        those that differ. Nothing is changed."""
        ...

    def compare_drafter(
        self, named_tensors: Iterable[tuple[str, Tensor]]
    ) -> list[WeightDifference]:
        """The same of the drafter's trainable weights; none differ where it runs no drafter."""
        ...

    def probe(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, *, seed: int = 0
    ) -> list[Rollout]:
        """One response a prompt, for a check: what is remembered of rollouts, `stats` among it,
        does not hold it."""
        ...

    def reject_drafter(self, reason: str) -> None:
        """Speculate without the learned drafter until the next is published: by n-grams, if the
        selector has such strategies, or not at all. Warns, and counts it in `stats`."""
        ...

    def stats(self) -> EngineStats:
        """What the last `generate` did."""
        ...

    def sleep(self) -> None:
        """Give back the memory of the cache (and, where weights are copies, of the weights)."""
        ...

    def wake(self) -> None:
        """Take it again; the caller pushes the weights afterwards."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, in plain types: versions, and what n-grams are drafted from;
        weights are pushed again."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave."""
        ...

    def close(self) -> None:
        """End processes and free memory; safe to call twice."""
        ...
