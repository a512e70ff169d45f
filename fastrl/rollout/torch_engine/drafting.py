"""Draft trees from an EAGLE drafter, or an EAGLE-3 one, with a cache of its own.

The drafter's cache holds one entry per pair (token t+1, target hidden state t). After a step it is
extended by the pairs of the tokens that the step emitted, from the target's true hidden states; the
entries of the tree itself are scratch. While speculation is off nothing is spent on the drafter:
the pairs wait in `LiveRows.hidden_BSD`, and are caught up with when it is switched on again. The
target re-computes nothing either way.

Drafting follows the sampling temperature, since nodes are ranked by how likely the *sampled* token
is; its filters are the target's business. Shape legend: fastrl/types.py.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.sampling import log_distribution
from fastrl.rollout.torch_engine.cache_views import CausalView, DraftWindow
from fastrl.rollout.torch_engine.draft_head import DraftHead
from fastrl.rollout.torch_engine.eagle3_forward import Eagle3Forward
from fastrl.rollout.torch_engine.eagle_forward import EagleForward
from fastrl.rollout.torch_engine.kv_cache import KVCache
from fastrl.rollout.torch_engine.rows import LiveRows
from fastrl.rollout.torch_engine.target import TargetModel
from fastrl.rollout.tree import DraftTree, TreeBuilder, chain
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

    def is_finite(self) -> bool:
        """Whether the last draft was made of numbers; waits for the device."""
        ...

    def release(self) -> None:
        """Give back cache memory."""
        ...


class EagleDrafting:
    """Drafts for the live rows of an engine.

    Args:
        drafter: in the target's dtype and on its device.
        target: lends embedding and, for most drafters, LM head.
        num_rows: most live rows.
    """

    def __init__(self, drafter: EagleDrafter, target: TargetModel, num_rows: int) -> None:
        self.drafter = drafter
        self._target = target
        forward = EagleForward if drafter.PREDICTS_HIDDEN else Eagle3Forward
        self._forward = forward(drafter, target.embedding)
        self._head = DraftHead(drafter, target.lm_head)
        self._cache = self._new_cache(num_rows)
        self._lengths = [0] * num_rows  # pairs cached, by row
        self._last_hidden_BD = torch.zeros(0)  # after the last sampled tokens, of the last draft

    def with_rows(self, num_rows: int) -> EagleDrafting:
        """Another one of the same weights, for so many live rows of its own."""
        other = copy.copy(self)
        other._cache = self._new_cache(num_rows)
        other._lengths = [0] * num_rows
        return other

    def _new_cache(self, num_rows: int) -> KVCache:
        return KVCache(
            num_layers=1,
            num_kv_heads=self.drafter.num_kv_heads,
            head_dim=self.drafter.head_dim,
            num_rows=num_rows,
            dtype=self._target.dtype,
            device=self._target.device,
        )

    def refresh_head(self) -> None:
        """Draft by the target's LM head as it now is."""
        self._head.refresh()

    def refresh(self) -> None:
        """Serve the drafter's weights as they now are."""
        self._forward.refresh()
        self._head.refresh()
        self._last_hidden_BD = torch.zeros(0)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The drafter's weights as they are served."""
        for name, tensor in self._forward.named_weights():
            yield name, self._head.served(tensor)

    def prefill(self, tokens_BT: Tensor, hidden_BTD: Tensor, lengths: list[int]) -> list[Tensor]:
        """Read the pairs of prompts in scratch cache rows; the entries of each."""
        scratch = self._new_cache(len(lengths))
        num_pairs = tokens_BT.shape[1] - 1
        scratch.reserve(num_pairs, 0)
        if num_pairs:
            base_B = torch.zeros(len(lengths), dtype=torch.int64, device=tokens_BT.device)
            self._extend(scratch, base_B, 0, tokens_BT[:, 1:], hidden_BTD[:, :-1])
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

    def is_finite(self) -> bool:
        """Whether the last draft was made of numbers; waits for the device."""
        return bool(self._last_hidden_BD.isfinite().all())

    def drop_non_numbers(self) -> None:
        """Forget what a drafter that had none has left in the cache."""
        self._cache.drop_non_numbers()

    def release(self) -> None:
        """Give back the cache's memory."""
        self._cache.release()

    def draft(self, rows: LiveRows, strategy: DraftStrategy, sampling: SamplingParams) -> DraftTree:
        """Catch up with what was sampled, then grow a tree level by level."""
        # Room for the tree's scratch entries, and for the padding of rows that catch up less.
        width = max(strategy.depth * strategy.topk, _CATCH_UP_PAIRS)
        self._cache.reserve(rows.longest + width, len(rows))
        self._last_hidden_BD = self._catch_up(rows)
        hidden_BKD = self._last_hidden_BD.unsqueeze(1)
        window = DraftWindow(
            self._cache,
            base_B=rows.lengths_B[: len(rows)],
            longest_base=rows.longest,
            num_levels=strategy.depth - 1,
            beam=strategy.topk,
        )
        if strategy.topk == 1:
            return self._draft_chain(rows, strategy.depth, hidden_BKD, window)
        return self._draft_tree(rows, strategy, sampling, hidden_BKD, window)

    def _draft_chain(
        self, rows: LiveRows, depth: int, hidden_B1D: Tensor, window: DraftWindow
    ) -> DraftTree:
        """The most likely token each time; how likely it is matters to nobody."""
        tokens = [rows.last_tokens().unsqueeze(1)]
        for level in range(depth):
            if level:
                window.add_level(None)
                hidden_B1D = self._draft_level(rows, tokens[-1], hidden_B1D, window, level)
            # For bfloat16 on a CPU `argmax` takes five times as long.
            best_B1 = self._head.logits(hidden_B1D).max(-1).indices
            tokens.append(self._head.tokens(best_B1))
        return chain(torch.cat(tokens, dim=1))

    def _draft_tree(
        self,
        rows: LiveRows,
        strategy: DraftStrategy,
        sampling: SamplingParams,
        hidden_BKD: Tensor,
        window: DraftWindow,
    ) -> DraftTree:
        unfiltered = SamplingParams(temperature=sampling.temperature or 1.0)
        builder = TreeBuilder(rows.last_tokens(), strategy.topk)
        for level in range(strategy.depth):
            if level:
                parents_BK = builder.beam_parents_BK
                window.add_level(parents_BK)
                index_BKD = parents_BK.unsqueeze(-1).expand(-1, -1, hidden_BKD.shape[2])
                hidden_BKD = hidden_BKD.gather(1, index_BKD)
                hidden_BKD = self._draft_level(
                    rows, builder.beam_tokens_BK, hidden_BKD, window, level
                )
            logprobs_BKF = log_distribution(self._head.logits(hidden_BKD), unfiltered)
            builder.expand(logprobs_BKF, self._head.tokens)
        return builder.build(strategy.verify_tokens)

    def _draft_level(
        self, rows: LiveRows, tokens_BK: Tensor, hidden_BKD: Tensor, window: DraftWindow, level: int
    ) -> Tensor:
        """Predicted hidden states after the nodes of a level, [B, K, D]."""
        positions_B1 = rows.lengths_B[: len(rows), None] + (level - 1)
        longest = rows.longest + level - 1
        return self._forward(tokens_BK, hidden_BKD, positions_B1, window, longest)

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
        rows.reserve(max(starts) + width + 2)
        starts_B, last_B = rows.lengths_B.new_tensor([starts, [pairs - 1 for pairs in taken]])
        columns_BT = starts_B.unsqueeze(1) + self._cache.columns(width)
        rows_B1 = rows.row_numbers_B[:count, None]
        output_BTD = self._extend(
            self._cache,
            starts_B,
            max(starts),
            rows.tokens_BS[rows_B1, columns_BT + 1],
            rows.hidden_BSD[rows_B1, columns_BT],
        )
        for row, pairs in enumerate(taken):
            self._lengths[row] = starts[row] + pairs
        return output_BTD[rows.row_numbers_B[:count], last_B]

    def _extend(
        self,
        cache: KVCache,
        base_B: Tensor,
        longest_base: int,
        tokens_BT: Tensor,
        states_BTS: Tensor,
    ) -> Tensor:
        """Run consecutive pairs through the drafter, each row from its base on."""
        width = tokens_BT.shape[1]
        view = CausalView(cache, base_B=base_B, longest_base=longest_base, num_tokens=width)
        positions_BT = base_B.unsqueeze(1) + cache.columns(width)
        hidden_BTD = self.drafter.start(states_BTS)
        return self._forward(tokens_BT, hidden_BTD, positions_BT, view, longest_base + width - 1)
