"""Hidden states of whole responses from SGLang, for the training of drafters.

SGLang keeps one entry for each token of a response: the row of a decode step, or the rows of the
prefill that gave the token. A prefill that was split into chunks keeps those of its last chunk; and
it splits whenever the prompts of a batch are together longer than a chunk, however short each is.
Inside SGLang's scheduler the rows of all chunks are kept here, by a plugin's hooks
(`keep_all_chunks`).

A response that SGLang sets aside for want of cache (a retraction) comes back by a prefill of all
its tokens, or of those that are in the cache no more: another entry of many rows. Since entries are
numbered by tokens, they tell where their rows belong: `in_order` puts them there.

True of SGLang 0.5.17 to 0.5.21 (managers/scheduler_components/batch_result_processor.py). Leaves
out PyTorch, and imports SGLang nowhere. Shape legend: fastrl/types.py.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrl.rollout.sglang_hooks import hook_in

_PROCESSOR = (
    "sglang.srt.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
)

Row = list[float]


def in_order(entries: Sequence[Row | list[Row]], num_prompt_tokens: int) -> NDArray[np.float32]:
    """Rows of the prompt's tokens and the response's but the last; those alone that SGLang gave.

    Args:
        entries: SGLang's, one for each token of the response.
        num_prompt_tokens: of the request, those found in the cache included.

    Returns:
        [T, D], where T is less than the tokens' number if rows are missing.
    """
    rows: list[Row | None] = [None] * (num_prompt_tokens + len(entries) - 1)
    for number, entry in enumerate(entries):
        end = num_prompt_tokens + number
        given: list[Any] = entry if isinstance(entry[0], list) else [entry]
        assert len(given) <= end, "SGLang gave more rows than there were tokens"
        rows[end - len(given) : end] = given
    return np.array([row for row in rows if row is not None], dtype=np.float32)


@dataclass(frozen=True, slots=True)
class _Chunks:
    """Of one request, one after the other."""

    start: int
    """Place of the first row's token."""
    rows: list[Row]

    def followed_by(self, start: int, rows: list[Row]) -> _Chunks:
        """With those of the next chunk, which may begin earlier, what was cached being evicted."""
        if not self.start <= start <= self.start + len(self.rows):
            return _Chunks(start, rows)
        return _Chunks(self.start, self.rows[: start - self.start] + rows)


_NONE = _Chunks(0, [])


class ChunkKeeper:
    """Adds the rows of all chunks to the entry that SGLang makes of the last one.

    One for the scheduler's process.
    """

    def __init__(self) -> None:
        self._starts: dict[Any, int] = {}  # by request of the batch whose result is looked at
        self._chunks: weakref.WeakKeyDictionary[Any, _Chunks] = weakref.WeakKeyDictionary()

    def of_batch(
        self, original: Callable[..., Any], processor: Any, batch: Any, result: Any
    ) -> Any:
        """Around SGLang's look at a prefill's result: which token each request's rows begin at."""
        if batch.return_hidden_states:
            self._starts = dict(zip(batch.reqs, batch.prefix_lens, strict=True))
        try:
            return original(processor, batch, result)
        finally:
            self._starts = {}

    def of_request(
        self,
        original: Callable[..., int],
        processor: Any,
        *,
        req: Any,
        logits_output: Any,
        hidden_state_offset: int,
        store: bool,
        **arguments: Any,
    ) -> int:
        """Around SGLang's look at one request's rows in it."""
        end = original(
            processor,
            req=req,
            logits_output=logits_output,
            hidden_state_offset=hidden_state_offset,
            store=store,
            **arguments,
        )
        if req.return_hidden_states is not True:
            return end
        start, before = self._starts[req], self._chunks.get(req, _NONE)
        if store:
            req.hidden_states[-1] = before.followed_by(start, req.hidden_states[-1]).rows
            self._chunks.pop(req, None)
        elif req.inflight_middle_chunks > 0:
            rows = logits_output.hidden_states[hidden_state_offset:end].tolist()
            self._chunks[req] = before.followed_by(start, rows)
        return end


def keep_all_chunks() -> None:
    """Have it done in every scheduler that this process starts; a plugin of SGLang's calls it."""
    keeper = ChunkKeeper()
    for method, hook in (
        ("process_batch_result_prefill", keeper.of_batch),
        ("_append_prefill_hidden_states", keeper.of_request),
    ):
        hook_in(f"{_PROCESSOR}.{method}", hook, "around")
