"""Draft trees from an EAGLE drafter with a cache of its own.

The drafter's cache holds one entry per pair (token t+1, target hidden state t). After a step it is
extended by the pairs of the tokens that the step emitted, from the target's true hidden states; the
entries of the tree itself are scratch. While speculation is off nothing is spent on the drafter:
the pairs wait in `LiveRows.hidden_BSD`, and are caught up with when it is switched on again. The
target re-computes nothing either way.

Drafting follows the sampling temperature, since nodes are ranked by how likely the *sampled* token
is; its filters are the target's business. Shape legend: fastrl/types.py.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
from torch import Tensor

from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.sampling import log_distribution
from fastrl.rollout.torch_engine.kv_cache import CacheView, KVCache
from fastrl.rollout.torch_engine.rows import LiveRows
from fastrl.rollout.torch_engine.target import TargetModel
from fastrl.rollout.tree import DraftTree, TreeBuilder
from fastrl.types import DraftStrategy, SamplingParams

_CATCH_UP_PAIRS = 64


class Drafting(Protocol):
    """Where the engine's draft trees come from; told of every row that comes, moves or goes."""

    def prefill(self, tokens_BT: Tensor, hidden_BTD: Tensor, lengths: list[int]) -> list[Tensor]:
        """Read prompts; what to hand to `admit` for each row that starts from it."""
        ...

    def admit(self, row: int, prompt_state: Tensor) -> None:
        """A row starts, from a prompt that `prefill` has read."""
        ...

    def move(self, source: int, target: int) -> None:
        """A row takes another's place."""
        ...

    def draft(self, rows: LiveRows, strategy: DraftStrategy, sampling: SamplingParams) -> DraftTree:
        """A tree for each live row."""
        ...

    def release(self) -> None:
        """Give back cache memory."""
        ...


class EagleDrafting:
    """Drafts for the live rows of an engine.

    Args:
        drafter: in the target's dtype and on its device.
        target: lends embedding and LM head.
        num_rows: most live rows.
    """

    def __init__(self, drafter: EagleDrafter, target: TargetModel, num_rows: int) -> None:
        self.drafter = drafter
        self._target = target
        self._cache = self._new_cache(num_rows)
        self._lengths = [0] * num_rows  # pairs cached, by row

    def _new_cache(self, num_rows: int) -> KVCache:
        return KVCache(
            num_layers=1,
            num_kv_heads=self.drafter.num_kv_heads,
            head_dim=self.drafter.head_dim,
            num_rows=num_rows,
            dtype=self._target.dtype,
            device=self._target.device,
        )

    def prefill(self, tokens_BT: Tensor, hidden_BTD: Tensor, lengths: list[int]) -> list[Tensor]:
        """Read the pairs of prompts in scratch cache rows; the entries of each."""
        scratch = self._new_cache(len(lengths))
        num_pairs = tokens_BT.shape[1] - 1
        scratch.reserve(num_pairs, 0)
        if num_pairs:
            base_B = torch.zeros(len(lengths), dtype=torch.int64, device=tokens_BT.device)
            self._extend(scratch, 0, base_B, 0, tokens_BT[:, 1:], hidden_BTD[:, :-1])
        return [scratch.view_row(row, length - 1) for row, length in enumerate(lengths)]

    def admit(self, row: int, prompt_state: Tensor) -> None:
        """Start a row from a prompt's cached pairs."""
        self._cache.reserve(prompt_state.shape[2], row)
        self._cache.load_row(row, prompt_state)
        self._lengths[row] = prompt_state.shape[2]

    def move(self, source: int, target: int) -> None:
        """Overwrite a row that ended with another."""
        self._cache.copy_row(source, target, self._lengths[source])
        self._lengths[target] = self._lengths[source]

    def release(self) -> None:
        """Give back the cache's memory."""
        self._cache.release()

    def draft(self, rows: LiveRows, strategy: DraftStrategy, sampling: SamplingParams) -> DraftTree:
        """Catch up with what was sampled, then grow a tree level by level."""
        # Room for the tree's scratch entries, and for the padding of rows that catch up less.
        width = max(strategy.depth * strategy.topk, _CATCH_UP_PAIRS)
        self._cache.reserve(rows.longest + width, len(rows))
        hidden_BKD = self._catch_up(rows).unsqueeze(1)
        builder = TreeBuilder(rows.last_tokens(), strategy.topk)
        builder.expand(self._logprobs(hidden_BKD, sampling))
        own_BKK = torch.eye(strategy.topk, dtype=torch.bool, device=self._target.device)
        own_BKK = own_BKK.expand(len(rows), -1, -1)
        visible_BKM = own_BKK
        for level in range(1, strategy.depth):
            if level > 1:  # what its parents saw of the scratch entries, and itself
                inherited_BKM = _gather_rows(visible_BKM, builder.beam_parents_BK)
                visible_BKM = torch.cat((inherited_BKM, own_BKK), dim=2)
            hidden_BKD = _gather_rows(hidden_BKD, builder.beam_parents_BK)
            hidden_BKD = self._draft_level(rows, builder, hidden_BKD, visible_BKM, level)
            builder.expand(self._logprobs(hidden_BKD, sampling))
        return builder.build(strategy.verify_tokens)

    def _logprobs(self, hidden_BKD: Tensor, sampling: SamplingParams) -> Tensor:
        temperature = sampling.temperature or 1.0
        unfiltered = dataclasses.replace(
            sampling, temperature=temperature, top_k=0, top_p=1.0, min_p=0.0
        )
        return log_distribution(self._target.lm_head(hidden_BKD), unfiltered)

    def _catch_up(self, rows: LiveRows) -> Tensor:
        """Extend every live row to its last sampled token; predicted hidden states there, [B,
        D]."""
        goals = [request.cached_length for request in rows.requests]
        while True:
            missing = [goal - self._lengths[row] for row, goal in enumerate(goals)]
            width = min(max(1, *missing), _CATCH_UP_PAIRS)
            # A row with nothing left repeats its last pair, so that its output is at hand again.
            taken = [max(1, min(pairs, width)) for pairs in missing]
            last_BD = self._extend_live(rows, width, taken)
            if width >= max(missing):
                return last_BD

    def _extend_live(self, rows: LiveRows, width: int, taken: list[int]) -> Tensor:
        """Cache the next `taken` pairs of each row, at most `width`; outputs at each row's last."""
        count = len(rows)
        starts = [
            min(length, request.cached_length - 1)
            for length, request in zip(self._lengths, rows.requests, strict=False)
        ]
        base_B = rows.lengths_B.new_tensor(starts)
        columns_BT = base_B.unsqueeze(1) + torch.arange(width, device=base_B.device)
        rows_B1 = rows.row_numbers_B[:count, None]
        rows.reserve(max(starts) + width + 2)
        tokens_BT = rows.tokens_BS[rows_B1, columns_BT + 1]
        hidden_BTD = rows.hidden_BSD[rows_B1, columns_BT]
        output_BTD = self._extend(self._cache, 0, base_B, max(starts), tokens_BT, hidden_BTD)
        for row, pairs in enumerate(taken):
            self._lengths[row] = starts[row] + pairs
        last_B = base_B.new_tensor(taken) - 1
        return output_BTD[rows.row_numbers_B[:count], last_B]

    def _extend(
        self,
        cache: KVCache,
        first_row: int,
        base_B: Tensor,
        longest_base: int,
        tokens_BT: Tensor,
        hidden_BTD: Tensor,
    ) -> Tensor:
        """Run consecutive pairs through the drafter, each row from its base on."""
        num_rows, width = tokens_BT.shape
        steps_T = torch.arange(width, device=tokens_BT.device)
        positions_BT = base_B.unsqueeze(1) + steps_T
        causal_TT = steps_T <= steps_T.unsqueeze(1)
        view = CacheView(
            cache,
            first_row=first_row,
            base_B=base_B,
            visible_BTM=causal_TT.expand(num_rows, -1, -1),
            offset=0,
            longest_base=longest_base,
            positions_BT=positions_BT,
        )
        return self._run(tokens_BT, hidden_BTD, positions_BT, view)

    def _draft_level(
        self,
        rows: LiveRows,
        builder: TreeBuilder,
        hidden_BKD: Tensor,
        visible_BKM: Tensor,
        level: int,
    ) -> Tensor:
        """Predicted hidden states after the nodes of the beam, [B, K, D]."""
        base_B = rows.lengths_B[: len(rows)]
        positions_BK = (base_B + level - 1).unsqueeze(1).expand_as(builder.beam_tokens_BK)
        view = CacheView(
            self._cache,
            first_row=0,
            base_B=base_B,
            visible_BTM=visible_BKM,
            offset=(level - 1) * builder.beam_tokens_BK.shape[1],
            longest_base=rows.longest,
            positions_BT=positions_BK,
        )
        return self._run(builder.beam_tokens_BK, hidden_BKD, positions_BK, view)

    def _run(
        self, tokens_BT: Tensor, hidden_BTD: Tensor, positions_BT: Tensor, view: CacheView
    ) -> Tensor:
        embeddings_BTD = self._target.embedding(tokens_BT)
        hidden: Tensor = self.drafter(embeddings_BTD, hidden_BTD, positions_BT, kv_view=view)
        return hidden


def _gather_rows(values_BKD: Tensor, index_BK: Tensor) -> Tensor:
    """values[b, index[b, k]] for each b and k."""
    return values_BKD.gather(1, index_BK.unsqueeze(-1).expand(-1, -1, values_BKD.shape[2]))
