"""Hand-written drafters and selectors for the engine."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from fastrl.rollout.engine import CostQuery
from fastrl.rollout.torch_engine.rows import LiveRows
from fastrl.rollout.tree import DraftTree, ancestors
from fastrl.types import DraftStrategy, Rollout, SamplingParams, StepStats

STRATEGIES = ["1_1_2", "3_1_4", "1_4_5", "2_2_5", "3_3_10", "4_4_16", "6_2_20", "5_4_60"]


class CyclingSelector:
    """Another strategy each step, `off` among them; keeps what it was told."""

    def __init__(self, strategies: Sequence[str]) -> None:
        self.strategies = [DraftStrategy.parse(text) for text in strategies]
        self.recorded: list[StepStats] = []

    def select(
        self, batch_size: int, context_tokens: int, referenced_rows: int = 0
    ) -> DraftStrategy:
        return self.strategies[len(self.recorded) % len(self.strategies)]

    def record(self, stats: StepStats) -> None:
        self.recorded.append(stats)

    def exclude(self, strategies: Collection[DraftStrategy]) -> None: ...

    def cost_queries(self, max_batch_size: int, max_context: int) -> Sequence[CostQuery]:
        return ()

    def record_cost(self, query: CostQuery, seconds: float) -> None: ...


class ScriptedDrafting:
    """Drafts chains from known rollouts: the very tokens to come, or never one of them.

    Args:
        rollouts: of the same requests, generated without speculation.
        is_right: whether to propose the token to come, or one that is not.
    """

    def __init__(self, rollouts: Sequence[Rollout], *, is_right: bool, vocab_size: int) -> None:
        self._known = {(r.prompt.prompt_id, r.sample_index): r.tokens for r in rollouts}
        self._is_right = is_right
        self._vocab_size = vocab_size

    def prefill(self, tokens_BT: Tensor, hidden_BTD: Tensor, lengths: list[int]) -> list[Tensor]:
        return [torch.empty(0)] * len(lengths)

    def admit(self, row: int, prompt_state: Tensor) -> None: ...

    def move(self, source: int, target: int) -> None: ...

    def is_finite(self) -> bool:
        return True

    def release(self) -> None: ...

    def draft(self, rows: LiveRows, strategy: DraftStrategy, sampling: SamplingParams) -> DraftTree:
        depth = strategy.depth
        chains = []
        for request in rows.requests:
            known = self._known[request.prompt.prompt_id, request.sample_index]
            done = len(request.tokens)
            coming = [*known[done : done + depth], *[2] * depth][:depth]
            if not self._is_right:
                coming = [(token + 1) % self._vocab_size for token in coming]
            chains.append(coming)
        tokens_BN = torch.cat((rows.last_tokens().unsqueeze(1), torch.tensor(chains)), dim=1)
        nodes_BN = torch.arange(depth + 1).expand(len(chains), -1)
        parents_BN = (nodes_BN - 1).clamp(min=0)
        return DraftTree(
            tokens_BN=tokens_BN,
            parents_BN=parents_BN,
            depths_BN=nodes_BN,
            ranks_BN=torch.zeros_like(nodes_BN),
            ancestors_BNN=ancestors(parents_BN, depth),
            depth=depth,
        )
