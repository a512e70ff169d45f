"""What SGLang needs at run time for each strategy: attention backends and CUDA graphs.

A decode step has three parts, and each has a backend and graphs that fit certain shapes: the
drafter's forwards (depth and topk, and how many of their tokens are kept), the target's
verification (tree size), and the drafter's reading of what was accepted (tree size). Strategies of
equal shapes share them, and graphs are captured for those batch sizes only in which a strategy may
be chosen (TLT, arXiv 2511.16665, "bucketed" graphs). Plain decoding has a decode step in place of
the verification (sglang_plain.py), at every batch size.

SGLang's own adaptive speculation builds such states too, but all parts for each, at all sizes, and
for chains only.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, check_cuda_graph_backend
from sglang.srt.model_executor.runner import DecodeCudaGraphRunner
from sglang.srt.speculative.eagle_draft_cuda_graph_runner import EAGLEDraftCudaGraphRunner
from sglang.srt.speculative.eagle_draft_extend_cuda_graph_runner import (
    EAGLEDraftExtendCudaGraphRunner,
)

from fastrl.rollout.sglang_plain import PlainDecodeGraphs
from fastrl.rollout.sglang_pool import StrategyPool
from fastrl.rollout.sglang_versions import graph_configs, set_speculation
from fastrl.types import DraftStrategy

_LOG = logging.getLogger(__name__)
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Part:
    """A backend and the graphs captured with it; None where there are none."""

    backend: Any
    graphs: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class StrategyState:
    """What is put in force together."""

    strategy: DraftStrategy
    draft: Part
    verify: Part
    extend: Part

    def apply(self, worker: Any) -> None:
        """Make the worker's next decode steps those of the strategy."""
        drafter = worker._draft_worker
        depth, size = self.strategy.depth, self.strategy.verify_tokens
        worker.topk = drafter.topk = max(self.strategy.topk, 1)
        worker.speculative_num_steps = drafter.speculative_num_steps = depth
        worker.speculative_num_draft_tokens = drafter.speculative_num_draft_tokens = size
        drafter.draft_attn_backend = self.draft.backend
        drafter.draft_runner.draft_attn_backend = self.draft.backend
        drafter.cuda_graph_runner = self.draft.graphs
        drafter.draft_extend_attn_backend = self.extend.backend
        if self.extend.backend is not None:
            drafter.draft_runner.attn_backend = self.extend.backend
        drafter.cuda_graph_runner_for_draft_extend = self.extend.graphs
        if depth:
            drafter._rebuild_topk1_chain_buffers()
        target = worker._target_worker.model_runner
        target.attn_backend = self.verify.backend
        target.decode_cuda_graph_runner = self.verify.graphs


class StateBuilder:
    """Builds all states of a worker, while SGLang starts.

    Args:
        worker: a `SwitchingWorker`.
        pool: what it switches between.
    """

    def __init__(self, worker: Any, pool: StrategyPool) -> None:
        self._worker = worker
        self._pool = pool
        self._parts: dict[tuple[Any, ...], Part] = {}
        self._all_sizes: list[int] = []
        self._base = max(pool.trees, key=lambda tree: tree.verify_tokens)
        self._free_before = 0
        self.gib_by_strategy: dict[str, float] = {}
        """Of the device's memory that each strategy's state took when it was built, less what it
        shares with an earlier one; `all`: of all of them, and of what SGLang captured for the tree
        with the most tokens."""

    @property
    def _captures(self) -> bool:
        on_cuda = str(self._worker.device).startswith("cuda")
        return on_cuda and not check_cuda_graph_backend(Phase.DECODE, Backend.DISABLED)

    def begin(self) -> None:
        """SGLang is about to capture its verification graphs: have it do so for the tree with the
        most tokens, at that tree's batch sizes."""
        self._free_before = _free_bytes(self._captures)
        if self._captures:
            self._all_sizes = list(graph_configs(self._worker)[0].decode.bs)
            _set_sizes(self._worker, self._sizes(self._base))

    def build(self) -> dict[DraftStrategy, StrategyState]:
        """A state for each strategy of the pool; those of large trees first, whose memory graphs of
        smaller ones take over."""
        target = self._worker._target_worker.model_runner
        self._parts[self._verify_key(self._base)] = Part(
            target.attn_backend, target.decode_cuda_graph_runner
        )
        order = sorted(self._pool.strategies, key=lambda one: -one.verify_tokens)
        states = {strategy: self._build(strategy) for strategy in order}
        if self._captures:
            _set_sizes(self._worker, self._all_sizes)
        self.gib_by_strategy["all"] = (self._free_before - _free_bytes(self._captures)) / _GIB
        return states

    def _sizes(self, strategy: DraftStrategy) -> list[int]:
        """Those of the strategy and of all that share its verification."""
        size = strategy.verify_tokens
        sharing = [one for one in self._pool.strategies if one.verify_tokens == size]
        return max((self._pool.batch_sizes(one, self._all_sizes) for one in sharing), key=len)

    def _build(self, strategy: DraftStrategy) -> StrategyState:
        started, free = time.perf_counter(), _free_bytes(self._captures)
        if self._captures:
            _set_sizes(self._worker, self._sizes(strategy))
        with self._shaped_for(strategy):
            drafter = self._worker._draft_worker
            drafter.init_attention_backend()
            draft = extend = Part(None, None)
            extend = Part(drafter.draft_extend_attn_backend, None)
            if not strategy.is_off:
                draft = self._shared(self._draft_key(strategy), self._capture_draft)
                extend = self._shared(self._extend_key(strategy), self._capture_extend)
            verify = self._shared(self._verify_key(strategy), self._capture_verify)
        gib = (free - _free_bytes(self._captures)) / _GIB
        self.gib_by_strategy[str(strategy)] = gib
        _LOG.info(
            "FastRL: strategy %s is ready: %.1f s, %.2f GiB, graphs for %s",
            strategy,
            time.perf_counter() - started,
            gib,
            self._sizes(strategy) or "no batch size",
        )
        return StrategyState(strategy=strategy, draft=draft, verify=verify, extend=extend)

    def _shared(self, key: tuple[Any, ...], capture: Any) -> Part:
        if key not in self._parts:
            self._parts[key] = capture()
        return self._parts[key]

    # Equal keys: equal shapes.

    def _draft_key(self, strategy: DraftStrategy) -> tuple[Any, ...]:
        return ("draft", strategy)

    def _extend_key(self, strategy: DraftStrategy) -> tuple[Any, ...]:
        return ("extend", strategy.verify_tokens, *self._apart(strategy))

    def _verify_key(self, strategy: DraftStrategy) -> tuple[Any, ...]:
        return ("verify", strategy.verify_tokens, *self._apart(strategy))

    def _apart(self, strategy: DraftStrategy) -> tuple[Any, ...]:
        """What keeps strategies of equal shapes apart: nothing, but for comparison."""
        return () if self._pool.is_bucketed else (strategy,)

    # -- capture, while SGLang's settings are those of the strategy -------------------------------

    def _capture_draft(self) -> Part:
        drafter = self._worker._draft_worker
        backend = drafter.draft_attn_backend
        if not self._captures or drafter.speculative_num_steps <= 1:
            return Part(backend, None)  # a single step drafts from what was carried on
        return Part(backend, EAGLEDraftCudaGraphRunner(drafter))

    def _capture_extend(self) -> Part:
        drafter = self._worker._draft_worker
        backend = drafter.draft_extend_attn_backend
        if not self._captures or backend is None:
            return Part(backend, None)
        return Part(backend, EAGLEDraftExtendCudaGraphRunner(drafter))

    def _capture_verify(self) -> Part:
        target = self._worker._target_worker.model_runner
        kept = target.init_new_workspace
        try:
            backend = target._get_attention_backend(init_new_workspace=True)
        finally:
            target.init_new_workspace = kept
        if not self._captures:
            return Part(backend, None)
        if self._worker.speculative_num_steps == 0:
            return Part(backend, PlainDecodeGraphs(target, backend))
        graphs = DecodeCudaGraphRunner(
            target,
            attn_backend=backend,
            speculative_num_steps=self._worker.speculative_num_steps,
            speculative_num_draft_tokens=self._worker.speculative_num_draft_tokens,
        )
        return Part(backend, graphs)

    @contextlib.contextmanager
    def _shaped_for(self, strategy: DraftStrategy) -> Iterator[None]:
        """SGLang's settings, which backends and graphs size themselves by, are the strategy's."""
        worker, drafter = self._worker, self._worker._draft_worker
        shape = {
            "speculative_num_steps": strategy.depth,
            "speculative_eagle_topk": max(strategy.topk, 1),
            "speculative_num_draft_tokens": strategy.verify_tokens,
        }
        largest = {
            "speculative_num_steps": self._pool.depth,
            "speculative_eagle_topk": self._pool.topk,
            "speculative_num_draft_tokens": self._pool.verify_tokens,
        }
        set_speculation(worker, shape)
        worker.topk = drafter.topk = shape["speculative_eagle_topk"]
        worker.speculative_num_steps = drafter.speculative_num_steps = strategy.depth
        worker.speculative_num_draft_tokens = strategy.verify_tokens
        drafter.speculative_num_draft_tokens = strategy.verify_tokens
        if strategy.depth:
            drafter._rebuild_topk1_chain_buffers()
        try:
            yield
        finally:
            set_speculation(worker, largest)


def _set_sizes(worker: Any, sizes: Sequence[int]) -> None:
    """Batch sizes that SGLang captures decode graphs for."""
    for config in graph_configs(worker):
        config.decode.bs = list(sizes)


def _free_bytes(on_cuda: bool) -> int:
    if not on_cuda:
        return 0
    gc.collect()
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0])
