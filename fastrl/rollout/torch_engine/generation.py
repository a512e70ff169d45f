"""One `generate` call of the embedded engine: admit → step → retire, until every response has
ended.

One step is: strategy → draft tree → one target forward over all nodes → accept → keep the accepted
path's cache entries. Plain decoding is the tree of one node: switching speculation on and off
changes nothing else. What a step sampled comes to the host in one transfer, which is also where
its time ends: nothing else waits for the device.

Shape legend: fastrl/types.py; P places on an accepted path.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from fastrl.rollout.accept import Acceptance
from fastrl.rollout.engine import StrategySelector
from fastrl.rollout.sampling import position_uniforms, sample_inverse_cdf
from fastrl.rollout.step_statistics import PREFILL, StatisticsRecorder
from fastrl.rollout.torch_engine.cache_views import CausalView, TreeView
from fastrl.rollout.torch_engine.drafting import Drafting
from fastrl.rollout.torch_engine.kv_cache import KVCache
from fastrl.rollout.torch_engine.ngram_drafting import NgramDrafting
from fastrl.rollout.torch_engine.prefill import PromptState, prefill
from fastrl.rollout.torch_engine.requests import EndOfResponse
from fastrl.rollout.torch_engine.rows import LiveRows, Request
from fastrl.rollout.torch_engine.sampled_path import sample_path
from fastrl.rollout.torch_engine.target import TargetModel
from fastrl.rollout.tree import DraftTree, root_only
from fastrl.types import DraftStrategy, FinishReason, Rollout, SamplingParams, StepStats


@dataclass(kw_only=True, slots=True)
class _WaitingGroup:
    """A prompt that has been read, and how many of its samples have not started."""

    state: PromptState
    num_waiting: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Emitted:
    """What one step gave, on the host."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    num_accepted: list[int]
    ranks: list[list[int]]
    num_children: list[list[int]]


class Generation:
    """The state of one `generate` call.

    Args:
        target: with weights.
        cache: of the target, for as many rows as may live at once.
        drafting: of learned strategies; None: there are none.
        ngram_drafting: of n-gram strategies; made for this call.
        selector: asked before each step, told after it.
        check_strategy: raises for a strategy that cannot run here.
        end: ends responses.
        sampling: of every request.
        policy_version: to mark rollouts with.
        return_hidden_states: give rollouts their hidden states.
    """

    def __init__(
        self,
        *,
        target: TargetModel,
        cache: KVCache,
        drafting: Drafting | None,
        ngram_drafting: NgramDrafting,
        selector: StrategySelector,
        check_strategy: Callable[[DraftStrategy], None],
        end: EndOfResponse,
        sampling: SamplingParams,
        policy_version: int,
        return_hidden_states: bool,
    ) -> None:
        self._target = target
        self._cache = cache
        self._drafting = drafting
        self._ngram_drafting = ngram_drafting
        self._selector = selector
        self._check_strategy = check_strategy
        self._end = end
        self._sampling = sampling
        self._policy_version = policy_version
        self._return_hidden_states = return_hidden_states
        keeps_hidden = return_hidden_states or drafting is not None
        self._rows = LiveRows(
            cache.num_rows,
            target.state_size if keeps_hidden else 0,
            target.dtype,
            target.device,
        )
        self._groups: dict[int, _WaitingGroup] = {}
        self._rollouts: dict[int, Rollout] = {}
        self.statistics = StatisticsRecorder()

    def run(self, requests: Sequence[Request]) -> list[Rollout]:
        """Generate all; rollouts in the order of the requests' places."""
        queue = deque(requests)
        with torch.inference_mode():
            while queue or self._rows.requests:
                self._admit(queue)
                if self._rows.requests:
                    self._retire(self._step())
        return [self._rollouts[place] for place in sorted(self._rollouts)]

    # -- admit ------------------------------------------------------------------------------------

    def _admit(self, queue: deque[Request]) -> None:
        """Start waiting requests in free rows; each prompt is read once for all its samples."""
        started = perf_counter()
        while queue and (num_free := self._rows.num_rows - len(self._rows)):
            self.statistics.enter(PREFILL)
            batch = [queue.popleft() for _ in range(min(num_free, len(queue)))]
            self._read_prompts(batch, queue)
            states = [self._groups[id(request.prompt)].state for request in batch]
            tokens_B, logprobs_B = self._first_tokens(batch, states)
            for request, state, token_B, token, logprob in zip(
                batch, states, tokens_B, tokens_B.tolist(), logprobs_B.tolist(), strict=True
            ):
                self._ngram_drafting.admit(request)
                _, reason = self._end.take(request, [token], [logprob])
                if reason is None:
                    self._start_row(request, state, token_B)
                else:
                    self._finish(request, reason, state.hidden_TD)
                self._forget_if_all_started(request)
            self.statistics.prefill_seconds += perf_counter() - started
            started = perf_counter()

    def _read_prompts(self, batch: list[Request], queue: deque[Request]) -> None:
        new = {
            id(request.prompt): request.prompt
            for request in batch
            if id(request.prompt) not in self._groups
        }
        states = prefill(self._target, self._drafting, list(new.values()), self._sampling)
        for key, state in zip(new, states, strict=True):
            self._groups[key] = _WaitingGroup(state=state, num_waiting=0)
            self.statistics.num_prompt_tokens += len(state.hidden_TD)
        for request in (*batch, *queue):
            if id(request.prompt) in new:
                self._groups[id(request.prompt)].num_waiting += 1

    def _forget_if_all_started(self, request: Request) -> None:
        group = self._groups[id(request.prompt)]
        group.num_waiting -= 1
        if group.num_waiting == 0:
            del self._groups[id(request.prompt)]

    def _first_tokens(
        self, batch: list[Request], states: list[PromptState]
    ) -> tuple[Tensor, Tensor]:
        """Tokens [B] at position 0 of the responses and their log-probabilities."""
        logprobs_BV = torch.stack([state.first_logprobs_V for state in states])
        keys_B = torch.tensor([request.key for request in batch], device=self._target.device)
        uniforms_B = position_uniforms(keys_B, torch.zeros_like(keys_B))
        tokens_B = sample_inverse_cdf(logprobs_BV, uniforms_B)
        return tokens_B, logprobs_BV.gather(1, tokens_B.unsqueeze(1)).squeeze(1)

    def _start_row(self, request: Request, state: PromptState, first_token: Tensor) -> None:
        num_prompt_tokens = len(request.prompt.tokens)
        self._cache.reserve(num_prompt_tokens + 1, len(self._rows))
        self._rows.reserve(num_prompt_tokens + 1)
        row = self._rows.admit(request, state.hidden_TD, first_token)
        self._cache.load_row(row, state.cache_entries)
        if self._drafting is not None and state.draft_state is not None:
            self._drafting.admit(row, state.draft_state)

    # -- step -------------------------------------------------------------------------------------

    def _step(self) -> list[FinishReason | None]:
        """One decode step of all live rows; why each ended, if it did."""
        rows = self._rows
        context_tokens = rows.longest + 1
        referenced_rows = self._ngram_drafting.num_referenced(rows)
        strategy = self._selector.select(len(rows), context_tokens, referenced_rows)
        self._check_strategy(strategy)
        places = tuple(len(request.tokens) for request in rows.requests)
        self.statistics.enter(str(strategy))
        started = perf_counter()
        tree = self._draft(strategy)
        emitted = self._verify(tree)
        reasons, num_taken = self._take(emitted, strategy)
        self.statistics.add_step(strategy, num_taken, emitted.num_accepted)
        ranks, num_children = _paths(emitted, strategy)
        offered, accepted = _acceptance_by_rank(ranks, num_children, strategy)
        self._selector.record(
            StepStats(
                strategy=strategy,
                batch_size=len(rows),
                context_tokens=context_tokens,
                accept_lengths=tuple(num_taken),
                seconds=perf_counter() - started,
                offered_by_rank=offered,
                accepted_by_rank=accepted,
                places=places,
                ranks_by_row=ranks,
                num_children_by_row=num_children,
                referenced_rows=referenced_rows,
            )
        )
        return reasons

    def _draft(self, strategy: DraftStrategy) -> DraftTree:
        if strategy.is_off:
            return root_only(self._rows.last_tokens())
        started = perf_counter()
        if strategy.drafter == "ngram":
            tree = self._ngram_drafting.draft(self._rows, strategy)
        else:
            assert self._drafting is not None, "check_strategy refuses what cannot be drafted"
            tree = self._drafting.draft(self._rows, strategy, self._sampling)
        self.statistics.draft_seconds += perf_counter() - started
        return tree

    def _verify(self, tree: DraftTree) -> _Emitted:
        """Sample the target after the nodes, keep the confirmed path, append what it emits."""
        rows, count, longest = self._rows, len(self._rows), self._rows.longest
        self._cache.reserve(longest + tree.num_nodes, count)
        rows.reserve(longest + tree.depth + 2)
        base_B = rows.lengths_B[:count]
        positions_BN = base_B.unsqueeze(1) + tree.depths_BN
        view = self._view(tree, base_B, longest, positions_BN)
        hidden_BND = self._target.forward(tree.tokens_BN, positions_BN, view)
        logits_BNV = self._target.logits(hidden_BND)
        # What a node samples stands in the column after its own.
        uniforms_BN = rows.uniforms_BS[:count].gather(1, positions_BN + 1)
        accepted, logprobs_BP = sample_path(tree, logits_BNV, uniforms_BN, self._sampling)
        if not tree.is_chain:  # a chain's entries stand together already
            self._cache.keep_path(view.places_BT[:, 0], accepted.path_BP)
            path_BPD = accepted.path_BP.unsqueeze(-1).expand(-1, -1, hidden_BND.shape[-1])
            hidden_BND = hidden_BND.gather(1, path_BPD)
        rows.append(accepted.emitted_BP, accepted.num_accepted_B + 1, hidden_BND)
        return _to_host(accepted, logprobs_BP)

    def _view(
        self, tree: DraftTree, base_B: Tensor, longest_base: int, positions_BN: Tensor
    ) -> CausalView | TreeView:
        if tree.is_chain:
            return CausalView(
                self._cache, base_B=base_B, longest_base=longest_base, num_tokens=tree.num_nodes
            )
        return TreeView(
            self._cache,
            base_B=base_B,
            longest_base=longest_base,
            ancestors_BNN=tree.ancestors_BNN,
            positions_BN=positions_BN,
        )

    def _take(
        self, emitted: _Emitted, strategy: DraftStrategy
    ) -> tuple[list[FinishReason | None], list[int]]:
        """Append to each request up to its end."""
        reasons: list[FinishReason | None] = []
        num_taken: list[int] = []
        for request, tokens, logprobs, accepted in zip(
            self._rows.requests,
            emitted.tokens,
            emitted.logprobs,
            emitted.num_accepted,
            strict=True,
        ):
            taken, reason = self._end.take(
                request, tokens[: accepted + 1], logprobs[: accepted + 1]
            )
            request.accept_lengths.append(taken)
            request.num_verify_steps += not strategy.is_off
            reasons.append(reason)
            num_taken.append(taken)
        return reasons, num_taken

    # -- retire -----------------------------------------------------------------------------------

    def _retire(self, reasons: list[FinishReason | None]) -> None:
        """Rows that ended leave; the last live row takes the place of each."""
        for row in reversed(range(len(reasons))):
            if (reason := reasons[row]) is None:
                continue
            request = self._rows.requests[row]
            self._finish(request, reason, self._rows.hidden_BSD[row])
            last = len(self._rows) - 1
            if row != last:
                length = self._rows.requests[last].cached_length
                self._cache.copy_row(last, row, length)
                if self._drafting is not None:
                    self._drafting.move(last, row)
                self._rows.move(last, row)
            self._rows.requests.pop()

    def _finish(self, request: Request, reason: FinishReason, hidden_SD: Tensor) -> None:
        hidden_states = None
        if self._return_hidden_states:
            with torch.inference_mode(False):  # an ordinary tensor, which training may use
                size = self._target.config.hidden_size  # without what a drafter reads besides
                hidden_states = hidden_SD[: request.cached_length, :size].clone()
        self.statistics.add_rollout(len(request.tokens))
        self._ngram_drafting.finish(request)
        self._rollouts[request.place] = Rollout(
            prompt=request.prompt,
            sample_index=request.sample_index,
            tokens=tuple(request.tokens),
            logprobs=tuple(request.logprobs),
            text=self._end.decode(request.tokens),
            finish_reason=reason,
            policy_version=self._policy_version,
            accept_lengths=tuple(request.accept_lengths),
            num_verify_steps=request.num_verify_steps,
            hidden_states=hidden_states,
        )


def _to_host(accepted: Acceptance, logprobs_BP: Tensor) -> _Emitted:
    """All a step gave in one transfer; float64 holds tokens and float32 exactly."""
    parts = (
        accepted.num_accepted_B.unsqueeze(1),
        accepted.emitted_BP,
        accepted.ranks_BP,
        accepted.num_children_BP,
        logprobs_BP,
    )
    packed = torch.cat([part.double() for part in parts], dim=1).tolist()
    num_places = logprobs_BP.shape[1]
    tokens, ranks, children, logprobs = (
        slice(1 + part * num_places, 1 + (part + 1) * num_places) for part in range(4)
    )
    return _Emitted(
        tokens=[list(map(int, row[tokens])) for row in packed],
        logprobs=[row[logprobs] for row in packed],
        num_accepted=[int(row[0]) for row in packed],
        ranks=[list(map(int, row[ranks])) for row in packed],
        num_children=[list(map(int, row[children])) for row in packed],
    )


_Counts = tuple[tuple[int, ...], ...]


def _paths(emitted: _Emitted, strategy: DraftStrategy) -> tuple[_Counts, _Counts]:
    """`StepStats.ranks_by_row` and `num_children_by_row` of a step."""
    ranks, num_children = [], []
    for num_accepted, of_path, children in zip(
        emitted.num_accepted, emitted.ranks, emitted.num_children, strict=True
    ):
        ranks.append(tuple(of_path[1 : num_accepted + 1]))
        num_children.append(tuple(children[: min(num_accepted + 1, strategy.depth)]))
    return tuple(ranks), tuple(num_children)


def _acceptance_by_rank(
    ranks: _Counts, num_children: _Counts, strategy: DraftStrategy
) -> tuple[_Counts, _Counts]:
    """`StepStats.offered_by_rank` and `accepted_by_rank` of a step, from its rows."""
    if strategy.is_off:
        return (), ()
    offered = [[0] * strategy.topk for _ in range(strategy.depth)]
    accepted = [[0] * strategy.topk for _ in range(strategy.depth)]
    for of_path, children in zip(ranks, num_children, strict=True):
        for depth, num in enumerate(children):
            for rank in range(num):
                offered[depth][rank] += 1
        for depth, rank in enumerate(of_path):
            accepted[depth][rank] += 1
    return tuple(map(tuple, offered)), tuple(map(tuple, accepted))
