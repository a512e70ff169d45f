"""The speculative worker that FastRL's plugin puts into SGLang's scheduler.

A worker over SGLang's `EAGLEWorkerV2`: it holds what each strategy of the pool needs at run time
(sglang_states.py) and, before each decode batch, asks the session (sglang_steps.py) for a strategy
and puts that one in force. Nothing is prefilled anew for it. Three things make that possible:

- What a step hands on to the next one, the drafter's best tokens, has the width of the widest tree;
  a narrower one takes the first of them.
- A plain step is SGLang's own decode step, after which the drafter reads what it has missed only
  now and then (sglang_plain.py).
- SGLang reserves cache and context for the largest tree, whichever is in force.

Under tensor parallelism rank 0 decides, and tells the others: their choices are the same by
construction. Leaves out weights and sampling, which are SGLang's.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from sglang.srt.layers.moe.utils import (
    speculative_moe_a2a_backend_context,
    speculative_moe_backend_context,
)
from sglang.srt.runtime_context import get_parallel
from sglang.srt.speculative import spec_utils
from sglang.srt.speculative.eagle_worker_v2 import EagleDraftWorker, EAGLEWorkerV2
from torch import Tensor

from fastrl.rollout.bandit import FixedStrategy
from fastrl.rollout.engine import StrategySelector
from fastrl.rollout.sglang_plain import PlainSteps
from fastrl.rollout.sglang_pool import StrategyPool
from fastrl.rollout.sglang_states import StateBuilder, StrategyState
from fastrl.rollout.sglang_steps import (
    DecodeSession,
    DecodeStep,
    HostMark,
    Mark,
    Rehearsal,
    SessionReport,
    VerifiedTree,
)
from fastrl.rollout.sglang_versions import kept_paths
from fastrl.types import OFF, DraftStrategy


class CudaMark:
    """An event in the stream that is current where it is made."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._event.record()

    def is_past(self) -> bool:
        """Whether the device has passed it."""
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def seconds_to(self, later: CudaMark) -> float:
        """From here to a later mark; both are past."""
        return float(self._event.elapsed_time(later._event)) / 1000


class SwitchingDraftWorker(EagleDraftWorker):  # type: ignore[misc]
    """The drafter's side: what it hands on has the width of the pool's widest tree."""

    topk: int
    relay_topk: int
    _topk1_parents_prealloc: Tensor | None
    _topk1_score_indices_prealloc: Tensor | None
    chain_buffers: dict[int, tuple[Tensor | None, Tensor | None]]

    def draft(self, batch: Any, **kwargs: Any) -> Any:
        """The draft tree of the strategy in force."""
        carried = batch.spec_info
        if carried is not None and carried.topk_p is not None:
            carried.topk_p = carried.topk_p[:, : self.topk].contiguous()
            carried.topk_index = carried.topk_index[:, : self.topk].contiguous()
        return super().draft(batch, **kwargs)

    def _capture_cuda_graphs(self) -> None:
        """The states have graphs of their own (sglang_states.py)."""
        self.cuda_graph_runner = None
        self.cuda_graph_runner_for_draft_extend = None

    def _rebuild_topk1_chain_buffers(self) -> None:
        """One pair for each length of chain, since captured graphs hold on to them."""
        num_steps = self.speculative_num_steps
        if self.topk != 1 or self.speculative_num_draft_tokens != num_steps + 1:
            return  # a tree, or half of a switch is done
        if num_steps not in self.chain_buffers:
            super()._rebuild_topk1_chain_buffers()
            self.chain_buffers[num_steps] = (
                self._topk1_parents_prealloc,
                self._topk1_score_indices_prealloc,
            )
        self._topk1_parents_prealloc, self._topk1_score_indices_prealloc = self.chain_buffers[
            num_steps
        ]

    def _draft_extend_for_prefill(self, *args: Any, **kwargs: Any) -> Any:
        with self._wide():
            return super()._draft_extend_for_prefill(*args, **kwargs)

    def _draft_extend_for_decode(self, *args: Any, **kwargs: Any) -> Any:
        with self._wide():
            return super()._draft_extend_for_decode(*args, **kwargs)

    @contextlib.contextmanager
    def _wide(self) -> Iterator[None]:
        topk, self.topk = self.topk, self.relay_topk
        try:
            yield
        finally:
            self.topk = topk


class SwitchingWorker(EAGLEWorkerV2):  # type: ignore[misc]
    """Changes the strategy before any decode batch; see the module's text."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if getattr(self.server_args, "enable_dp_attention", False):
            raise ValueError("FastRL's plugin does not know data-parallel attention: leave it off")
        self._pool = StrategyPool.from_environment()
        drafter = self._draft_worker
        drafter.__class__ = SwitchingDraftWorker  # SGLang makes it by its own name
        drafter.relay_topk = self._pool.topk
        drafter.chain_buffers = {}
        drafter._rebuild_topk1_chain_buffers()
        group = get_parallel().tp_group
        self.rank_group = group if group.world_size > 1 else None
        self._states: dict[DraftStrategy, StrategyState] = {}
        self._active: DraftStrategy | None = None
        self._session: DecodeSession | None = None
        self._in_flight: deque[DecodeSession | None] = deque()  # whose steps have no result yet
        self._is_cuda = str(self.device).startswith("cuda")
        self._ran_prefill = True
        self._builder = StateBuilder(self, self._pool)

    # -- preparation ------------------------------------------------------------------------------

    def init_attention_backends(self) -> None:
        """Before anything is captured: what SGLang captures next serves the largest tree."""
        super().init_attention_backends()
        self._builder.begin()

    def init_cuda_graphs(self) -> None:
        """Build a state for each strategy, with its graphs."""
        super().init_cuda_graphs()
        with self.drafting():
            self._states = self._builder.build()
        self._activate(OFF)
        self._plain = PlainSteps(self, self._pool)

    @contextlib.contextmanager
    def drafting(self) -> Iterator[None]:
        """SGLang's settings for the drafter's forwards."""
        drafter = self._draft_worker
        with (
            drafter.draft_tp_context(drafter.draft_runner.tp_group),
            speculative_moe_backend_context(),
            speculative_moe_a2a_backend_context(),
        ):
            yield

    # -- a batch ----------------------------------------------------------------------------------

    def forward_batch_generation(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """A prefill as SGLang does it, or a decode step of the strategy chosen for it."""
        if batch.forward_mode.is_extend() or batch.is_extend_in_batch:
            self._ran_prefill = True
            if self._session is not None:
                self._session.prefilled()
            self._plain.forget(batch)
            return super().forward_batch_generation(batch, *args, **kwargs)
        strategy, context_tokens = self._choose(batch.reqs)
        start = self._mark()
        self._activate(strategy)
        self._verified: tuple[Any, Tensor] | None = None
        if strategy.is_off:
            result = self._plain.step(batch, kwargs.get("on_publish"))
        else:
            # A part of the step's time: trees in turns with plain steps pay for it each time.
            self._plain.read(batch)
            result = super().forward_batch_generation(batch, *args, **kwargs)
        if self._session is not None:
            step = DecodeStep(
                strategy=strategy,
                context_tokens=context_tokens,
                requests=list(batch.reqs),
                start=start,
                end=self._mark(),
                tree=self._verified_tree(strategy),
            )
            self._session.begin(step, follows=not self._ran_prefill)
        self._in_flight.append(self._session)
        self._ran_prefill = False
        return result

    def _choose(self, requests: Sequence[Any]) -> tuple[DraftStrategy, int]:
        """The strategy and the longest context; with several ranks, those of rank 0's session."""
        if self.rank_group is None:
            if self._session is None:
                return OFF, 0
            strategy, context_tokens = self._session.choose(requests)
            is_over = self._session.is_over
        else:
            choice = torch.zeros(3, dtype=torch.int64)
            if self._session is not None:
                strategy, context_tokens = self._session.choose(requests)
                choice[0], choice[1] = self._pool.strategies.index(strategy), context_tokens
                choice[2] = self._session.is_over
            dist.broadcast(choice, src=self.rank_group.ranks[0], group=self.rank_group.cpu_group)
            strategy, context_tokens = self._pool.strategies[int(choice[0])], int(choice[1])
            is_over = bool(choice[2])
        if is_over:
            for request in requests:  # they end by their length, on all ranks
                request.sampling_params.max_new_tokens = 1
        return strategy, context_tokens

    def _mark(self) -> Mark:
        return CudaMark() if self._is_cuda else HostMark()

    def _activate(self, strategy: DraftStrategy) -> None:
        """Put all that belongs to the strategy in force."""
        if strategy != self._active:
            self._states[strategy].apply(self)
            self._active = strategy

    def activate_step_by_batch(self, batch_size: int) -> None:
        """SGLang's own adaptation: not ours."""

    def on_verify_complete_cpu(
        self, num_correct_drafts_per_req: list[int], batch_size: int = 0
    ) -> None:
        """SGLang has a step's result on the host."""
        if (session := self._in_flight.popleft()) is not None:
            session.accept(num_correct_drafts_per_req)

    def verify(self, batch: Any, **kwargs: Any) -> Any:
        """The target's forward over the tree, and what it accepts, which is kept."""
        verify_input = batch.spec_info
        with kept_paths() as paths:
            result = super().verify(batch, **kwargs)
        self._verified = verify_input, paths[0]
        if batch.return_hidden_states and self.topk == 1:
            # A graph's output, which the next step may overwrite while this one is fetched; those
            # of wider trees have been put in another order, and so elsewhere.
            output = result.logits_output
            output.hidden_states = output.hidden_states.clone()
        return result

    def _verified_tree(self, strategy: DraftStrategy) -> VerifiedTree | None:
        """On its way to the host; SGLang's copies of the same stream come later."""
        if strategy.topk <= 1 or self._verified is None or spec_utils.SIMULATE_ACC_LEN > 0:
            return None  # simulated paths are no paths of the tree
        verify_input, path_BD = self._verified

        def fetched(tensor: Tensor) -> Any:
            return tensor.to("cpu", non_blocking=True).numpy()

        return VerifiedTree(
            next_token_BN=fetched(verify_input.retrieve_next_token),
            next_sibling_BN=fetched(verify_input.retrieve_next_sibling),
            accepted_BD=fetched(path_BD),
        )

    # -- requests of the trainer ------------------------------------------------------------------

    def serve_begin(self, selector: StrategySelector | None, rehearsal: Rehearsal | None) -> None:
        """A `generate` call is next, whose steps the selector chooses, or a rehearsal."""
        self._plain.begin()
        if self.rank_group is None or self.rank_group.rank_in_group == 0:
            self._session = DecodeSession(selector or FixedStrategy("off"), rehearsal)

    def serve_finish(self) -> SessionReport:
        """The call is over: what it did. Later steps are plain ones."""
        if self._session is None:
            session = DecodeSession(FixedStrategy("off"))
        else:
            session, self._session = self._session, None
        return session.finish()

    def serve_graph_memory(self) -> dict[str, float]:
        """GiB of the device's memory; see `StateBuilder.gib_by_strategy`."""
        return dict(self._builder.gib_by_strategy)
