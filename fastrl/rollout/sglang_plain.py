"""Plain decode steps inside SGLang's speculative worker, and what the drafter misses in them.

A step without speculation is SGLang's own decode step, with its kernels, its sampler and CUDA
graphs of its own, dressed as the result of a speculative step that accepted nothing. (SGLang's
own way, the verification of a root alone, runs kernels made for many tokens a row: four times as
slow at 256 rows of a 7B model.) As it adds one token to each row whatever happens, the next
step's lengths are published before it runs, and the scheduler prepares the next step meanwhile.

The drafter does not read along. The target's hidden states are kept, and read by it all at once
when a tree is next, or all but the last, without logits, when they fill their buffer. Leaves out
which steps are plain ones.

Shape legend: B rows of a batch, G of them read together, R rows of SGLang's request pool, W unread
tokens, D width of the hidden states, of the target's that the drafter reads where it holds those, T
longest context, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardMode
from sglang.srt.model_executor.runner import DecodeCudaGraphRunner
from sglang.srt.speculative.eagle_info import EagleDraftExtendInput, EagleDraftInput
from sglang.srt.speculative.eagle_utils import get_draft_recurrent_hidden_state_spec
from sglang.srt.speculative.eagle_worker_common import prepare_for_draft_extend
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang.srt.speculative.spec_utils import fast_topk
from torch import Tensor

from fastrl.rollout.sglang_pool import StrategyPool
from fastrl.rollout.sglang_versions import move_read_done

_PREFILL_TOKENS = 8192
"""What SGLang prefills at once where it was told no limit."""


class PlainDecodeGraphs(DecodeCudaGraphRunner):  # type: ignore[misc]
    """CUDA graphs of decode steps that give the hidden states.

    Args:
        model_runner: of the target.
        attn_backend: that the graphs run on, which is theirs alone.
    """

    def __init__(self, model_runner: Any, attn_backend: Any) -> None:
        with _without_speculation(model_runner):
            super().__init__(
                model_runner,
                attn_backend=attn_backend,
                speculative_num_steps=0,
                speculative_num_draft_tokens=1,
            )

    def capture_prepare(self, *args: Any, **kwargs: Any) -> Any:
        """As SGLang's, hidden states included, which the drafter reads."""
        self.capture_hidden_mode = CaptureHiddenMode.FULL
        return super().capture_prepare(*args, **kwargs)


@contextlib.contextmanager
def _without_speculation(model_runner: Any) -> Iterator[None]:
    """SGLang captures decode graphs for a model that is not speculated for."""
    algorithm = model_runner.spec_algorithm
    model_runner.spec_algorithm = SpeculativeAlgorithm.NONE
    try:
        yield
    finally:
        model_runner.spec_algorithm = algorithm


class PlainSteps:
    """Runs plain steps, and lets the drafter catch up with them.

    Args:
        worker: a `SwitchingWorker`, in which `off` is in force for each plain step.
        pool: what it switches between.
    """

    def __init__(self, worker: Any, pool: StrategyPool) -> None:
        self._worker = worker
        self._drafter = worker._draft_worker
        self._target = worker._target_worker.model_runner
        self._req_to_token_RT = worker.req_to_token_pool.req_to_token
        self._device = worker.device
        width, dtype = get_draft_recurrent_hidden_state_spec(self._drafter.draft_runner)
        num_rows = len(self._req_to_token_RT)
        self._reserved = max(pool.topk * pool.depth, pool.verify_tokens)
        prefill_tokens = worker.server_args.chunked_prefill_size
        self._tokens_at_once = prefill_tokens if (prefill_tokens or 0) > 0 else _PREFILL_TOKENS
        read_width = _width_of_target_states(self._drafter.draft_runner.model) or width
        self._most_unread = pool.most_unread_tokens(num_rows, read_width * dtype.itemsize)
        shape = (num_rows, self._most_unread)
        self._hidden_RWD = torch.zeros((*shape, read_width), dtype=dtype, device=self._device)
        self._token_RW = torch.zeros(shape, dtype=torch.int64, device=self._device)
        self._num_unread_R = torch.zeros(num_rows, dtype=torch.int64, device=self._device)
        self._num_unread: dict[str, int] = {}  # by request, those of none left out
        # What a plain step hands on in place of drafts, in the shapes of a tree's step.
        self._no_topk_p_1K = torch.zeros((1, pool.topk), device=self._device)
        self._no_topk_index_1K = torch.zeros((1, pool.topk), dtype=torch.int64, device=self._device)
        self._no_hidden_1D = torch.zeros((1, width), dtype=dtype, device=self._device)
        self._ones_B = torch.ones(num_rows, dtype=torch.int32, device=self._device)

    def begin(self) -> None:
        """Another call: its requests are new."""
        self._num_unread.clear()

    def forget(self, batch: Any) -> None:
        """The batch is prefilled, which the drafter reads."""
        for request in batch.reqs:
            self._num_unread.pop(request.rid, None)
        self._num_unread_R.index_fill_(0, batch.req_pool_indices, 0)

    # -- a step -----------------------------------------------------------------------------------

    def step(self, batch: Any, on_publish: Callable[[Tensor], None] | None) -> Any:
        """One token for each row of the batch, as SGLang's result of a speculative step.

        Args:
            batch: of the step; changed by nothing here.
            on_publish: takes the rows' new lengths, for the next step to be prepared; None where
                SGLang does not prepare it meanwhile.
        """
        new_lens_B = batch.seq_lens + 1
        if on_publish is not None:
            on_publish(new_lens_B)
        rows_B = batch.req_pool_indices
        view = copy.copy(batch)
        view.forward_mode = ForwardMode.DECODE
        view.spec_info = None
        view.input_ids = batch.spec_info.bonus_tokens.to(torch.int64)
        view.out_cache_loc = self._req_to_token_RT[rows_B, batch.seq_lens].to(torch.int64)
        view.seq_lens = new_lens_B
        view.seq_lens_sum = None
        if batch.seq_lens_cpu is not None:
            view.seq_lens_cpu = batch.seq_lens_cpu + 1
        move_read_done(self._target)  # of an earlier forward, should it be there
        result = self._worker._target_worker.forward_batch_generation(
            view, capture_hidden_mode=CaptureHiddenMode.FULL
        )
        if self._worker.rank_group is not None:
            # As SGLang does after a verification: ranks must go on with the same tokens.
            self._worker.rank_group.broadcast(result.next_token_ids, src=0)
        output = result.logits_output
        if output.next_token_logprobs is not None:
            output.next_token_logprobs = output.next_token_logprobs.view(-1, 1)
        carried = EagleDraftInput(bonus_tokens=result.next_token_ids.to(torch.int32))
        result.accept_lens = self._ones_B[: len(rows_B)]
        result.speculative_num_draft_tokens = 1
        result.new_seq_lens = new_lens_B
        result.next_draft_input = carried
        result.extra_keep_alive_refs = [view]
        self._keep(batch, result)
        if batch.return_hidden_states:
            # A graph's output, which the next step may overwrite while this one is fetched.
            output.hidden_states = output.hidden_states.clone()
        return result

    def _keep(self, batch: Any, result: Any) -> None:
        """What the drafter would have read; it reads what does not fit."""
        rows_B = batch.req_pool_indices
        count_B = self._num_unread_R[rows_B]
        self._hidden_RWD[rows_B, count_B] = result.logits_output.hidden_states
        self._token_RW[rows_B, count_B] = result.next_token_ids.to(torch.int64)
        self._num_unread_R[rows_B] = count_B + 1
        most = 0
        for request in batch.reqs:
            count = self._num_unread.get(request.rid, 0) + 1
            self._num_unread[request.rid] = count
            most = max(most, count)
        num_rows = len(rows_B)
        carried = result.next_draft_input
        carried.topk_p = self._no_topk_p_1K.expand(num_rows, -1)
        carried.topk_index = self._no_topk_index_1K.expand(num_rows, -1)
        carried.hidden_states = self._no_hidden_1D.expand(num_rows, -1)
        if most < self._most_unread:
            # It waits for the drafter, which in this step reads nothing.
            move_read_done(self._target, to=self._drafter.draft_runner)
        else:
            self._read_all_but_last(batch)

    # -- what the drafter has not read ------------------------------------------------------------

    def read(self, batch: Any) -> None:
        """Before a tree: the drafter reads what it has not, and drafts from there.

        Rows that have nothing unread keep what the step before handed on.
        """
        if not any(request.rid in self._num_unread for request in batch.reqs):
            return
        counts = [self._num_unread.pop(request.rid, 0) for request in batch.reqs]
        carried = batch.spec_info
        topk_p, topk_index = carried.topk_p.clone(), carried.topk_index.clone()
        hidden_BD = carried.hidden_states.clone()
        for group in self._groups(counts):
            part, unread = self._part(batch, group), [counts[place] for place in group]
            count_G = self._num_unread_R[part.batch.req_pool_indices]
            row_G = torch.arange(len(group), device=self._device)
            last_G = row_G * max(unread) + count_G - 1
            output = self._forward(part, unread, count_G, select_index=last_G)
            probs_GV = torch.softmax(output.next_token_logits, dim=-1)
            best_p, best_index = fast_topk(probs_GV, topk_p.shape[1], dim=-1)
            topk_p[part.index] = best_p
            topk_index[part.index] = best_index  # of the draft vocabulary: SGLang maps them later
            hidden_BD[part.index] = output.hidden_states[last_G].to(hidden_BD.dtype)
        self._num_unread_R.index_fill_(0, batch.req_pool_indices, 0)
        carried.topk_p, carried.topk_index = topk_p, topk_index
        carried.hidden_states = hidden_BD

    def _read_all_but_last(self, batch: Any) -> None:
        """After a plain step: make room. What follows a row's last token is not asked for yet, so
        that one is left, and no logits are computed but a single row's, which SGLang insists on."""
        counts = [self._num_unread[request.rid] - 1 for request in batch.reqs]
        first = torch.zeros(1, dtype=torch.int64, device=self._device)
        for group in self._groups(counts):
            part, unread = self._part(batch, group), [counts[place] for place in group]
            rows_G = part.batch.req_pool_indices
            count_G = self._num_unread_R[rows_G] - 1
            self._forward(part, unread, count_G, select_index=first)
            self._hidden_RWD[rows_G, 0] = self._hidden_RWD[rows_G, count_G]
            self._token_RW[rows_G, 0] = self._token_RW[rows_G, count_G]
            self._num_unread_R.index_fill_(0, rows_G, 1)
        self._num_unread.update((request.rid, 1) for request in batch.reqs)

    def _groups(self, counts: Sequence[int]) -> Iterator[list[int]]:
        """Places of rows to be read together: no more tokens than a prefill may have, which SGLang
        keeps memory for, and no row so far behind the others that its window would reach beyond
        what is reserved for its drafts."""
        unread = [place for place, count in enumerate(counts) if count]
        unread.sort(key=lambda place: -counts[place])
        while unread:
            width = counts[unread[0]]
            near = unread[: max(1, self._tokens_at_once // width)]
            group = [place for place in near if width - counts[place] <= self._reserved]
            yield sorted(group)
            unread = unread[len(group) :]

    def _part(self, batch: Any, places: list[int]) -> _Part:
        view = copy.copy(batch)
        view.return_logprob = False
        view.seq_lens_sum = None
        if len(places) == len(batch.reqs):
            return _Part(batch=view, index=slice(None))
        index = torch.tensor(places)
        if batch.seq_lens_cpu is not None:
            view.seq_lens_cpu = batch.seq_lens_cpu[index]
        if str(self._device) != "cpu":
            index = index.pin_memory().to(self._device, non_blocking=True)
        view.reqs = [batch.reqs[place] for place in places]
        view.seq_lens = batch.seq_lens[index]
        view.req_pool_indices = batch.req_pool_indices[index]
        if batch.orig_seq_lens is not None:
            view.orig_seq_lens = batch.orig_seq_lens[index]
        if batch.multimodal_inputs is not None:
            view.multimodal_inputs = [batch.multimodal_inputs[place] for place in places]
        return _Part(batch=view, index=index)

    def _forward(
        self, part: _Part, counts: Sequence[int], count_G: Tensor, *, select_index: Tensor
    ) -> Any:
        """The drafter's output over the first unread tokens of some rows, which end before the
        rows' lengths.

        Their windows have the same width, that of the row with the most. Where a row has fewer, the
        rest of its window falls into cache that is reserved for drafts.

        Args:
            part: the rows.
            counts: tokens to read, by row.
            count_G: the same, on the device.
            select_index: windows' places, as they lie one after the other, to compute logits at.
        """
        width = max(counts)
        view, rows_G = part.batch, part.batch.req_pool_indices
        start_G = view.seq_lens - count_G
        places_GW = start_G[:, None] + torch.arange(width, device=self._device)
        slots_GW = self._req_to_token_RT[rows_G[:, None], places_GW]
        view.seq_lens = start_G
        if view.seq_lens_cpu is not None:
            view.seq_lens_cpu = view.seq_lens_cpu - torch.tensor(
                counts, dtype=view.seq_lens_cpu.dtype
            )
        view.out_cache_loc = slots_GW.reshape(-1).to(torch.int64)
        extend = EagleDraftExtendInput(
            hidden_states=self._hidden_RWD[rows_G, :width].flatten(0, 1),
            num_correct_drafts=count_G - 1,
            num_accept_tokens=count_G,
            num_tokens_per_req=width,
            num_tokens_for_logprob_per_req=width,
            select_index=select_index,
        )
        runner = self._drafter.draft_runner
        with self._worker.drafting():
            forward_batch = prepare_for_draft_extend(
                extend,
                view,
                self._token_RW[rows_G, :width].flatten(),
                width,
                runner,
                None,  # graphs are of other widths
                return_hidden_states_before_norm=False,
            )
            return runner.forward(forward_batch).logits_output


def _width_of_target_states(drafter: Any) -> int | None:
    """Of what an EAGLE-3 drafter reads of the target, which is wider than what it hands on."""
    num_layers = getattr(drafter.model, "num_aux_hidden_states", None)
    return None if num_layers is None else num_layers * int(drafter.model.hidden_size_in)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """Some rows of a batch."""

    batch: Any
    """A view, changed by whoever has it."""
    index: Tensor | slice
    """Their places in the batch."""
