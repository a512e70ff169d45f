"""SGLang samples from the one definition of logits -> distribution (sampling.py).

Its own filters are several: flashinfer's for plain steps take top-k and top-p at once, of the
distribution that neither has changed; those of a verification take one after the other, and know
no min-p; tokens that are equally likely each treats in its own way; and log-probabilities are
reported as if there were none. Here the logits of tokens that our definition excludes become -inf
before SGLang samples, in plain steps, prefills and verifications alike, and it is told that no
filters are left. So its log-probabilities are those of the distribution that was sampled.

Filters alone: logit biases, penalties and grammars, which SGLang would apply to a verification
afterwards, are never asked for. Called in SGLang's scheduler, by FastRL's plugin, whatever the
algorithm; batches without filters go the stock way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastrl.rollout.sampling import RowSampling, exclude_tokens_
from fastrl.rollout.sglang_hooks import hook_in
from fastrl.types import SamplingParams

_LEAST_TEMPERATURE = 1e-6
_ALL = 1 << 30
"""SGLang's top_k that keeps all tokens."""


def sglang_filters(sampling: SamplingParams) -> dict[str, Any]:
    """Temperature and filters as SGLang takes them.

    It takes a top_k of 1 for greedy decoding, which drops all but one of equally likely best
    tokens; min-p says the same as top-k then. Raises ValueError for a temperature so low that it
    takes it for greedy decoding too.
    """
    if 0 < sampling.temperature < _LEAST_TEMPERATURE:
        raise ValueError(
            f"sampling temperature {sampling.temperature}: SGLang takes one so low for greedy "
            f"decoding; set temperature 0 for that, or {_LEAST_TEMPERATURE} and more"
        )
    top_k, top_p, min_p = sampling.top_k, sampling.top_p, sampling.min_p
    if sampling.top_k == 1 and sampling.temperature > 0:
        top_k, top_p, min_p = 0, 1.0, 1.0
    return {
        "temperature": sampling.temperature,
        "top_k": top_k or -1,
        "top_p": top_p,
        "min_p": min_p,
    }


class RowFilter:
    """Filters the logits of SGLang's batches; one for the scheduler's process."""

    def __init__(self) -> None:
        self._largest_top_k = 0

    def note_requests(self, info: Any, _class: type, batch: Any, *_: Any, **__: Any) -> None:
        """After SGLang reads a new batch's parameters, which later batches are made of: how wide
        filters may be is known on the host, and nothing waits for the device."""
        asked = (request.sampling_params.top_k for request in batch.reqs)
        largest = max((top_k for top_k in asked if top_k < _ALL), default=0)
        self._largest_top_k = max(self._largest_top_k, largest)

    def around_sampler(
        self,
        original: Callable[..., Any],
        sampler: Any,
        output: Any,
        info: Any,
        *rest: Any,
        **kw: Any,
    ) -> Any:
        """Of plain steps, and of the token that a prefill ends with."""
        if _has_filters(info):
            exclude_tokens_(output.next_token_logits, self._row_sampling(info))
            info = _without_filters(info)
        return original(sampler, output, info, *rest, **kw)

    def around_verification(
        self,
        original: Callable[..., Any],
        tree: Any,
        batch: Any,
        output: Any,
        *rest: Any,
        **kw: Any,
    ) -> Any:
        """Of a draft tree's nodes: each request's rows lie one after the other."""
        if batch.forward_mode.is_idle() or not _has_filters(batch.sampling_info):
            return original(tree, batch, output, *rest, **kw)
        from fastrl.rollout.sglang_versions import coins_inside_interval

        rows = self._row_sampling(batch.sampling_info).repeated(tree.draft_token_num)
        exclude_tokens_(output.next_token_logits, rows)
        batch = copy.copy(batch)
        batch.sampling_info = _without_filters(batch.sampling_info)
        with coins_inside_interval():
            return original(tree, batch, output, *rest, **kw)

    def _row_sampling(self, info: Any) -> RowSampling:
        top_k = info.top_ks.long().view(-1, 1)
        return RowSampling(
            temperature=info.temperatures,
            top_k=top_k.masked_fill(top_k >= _ALL, 0),
            top_p=info.top_ps.view(-1, 1),
            min_p=info.min_ps.view(-1, 1),
            is_greedy=top_k == 1,
            largest_top_k=self._largest_top_k if info.need_top_k_sampling else 0,
            has_top_p=info.need_top_p_sampling,
            has_min_p=info.need_min_p_sampling,
            has_greedy=info.is_any_greedy,
        )


def _has_filters(info: Any) -> bool:
    if info.is_all_greedy:
        return False
    return bool(info.need_top_k_sampling or info.need_top_p_sampling or info.need_min_p_sampling)


def _without_filters(info: Any) -> Any:
    view = copy.copy(info)
    view.need_top_k_sampling = view.need_top_p_sampling = view.need_min_p_sampling = False
    return view


def below_largest_hash(hash_RV: Tensor, *_: Any) -> Tensor:
    """After SGLang hashes seed, position and token to 32 bits, from which its Gumbel noise comes.

    Before 0.5.21 the largest hash makes infinite noise: that token is drawn whatever its
    probability is, or NaN of one that has none. (Later versions bound the noise likewise.)
    """
    return hash_RV.long().clamp_(max=2**32 - 2)


def filter_as_we_do() -> None:
    """Have it done in every scheduler that this process starts; a plugin of SGLang's calls it."""
    row_filter = RowFilter()
    hook_in(
        "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.from_schedule_batch",
        row_filter.note_requests,
        "after",
    )
    hook_in("sglang.srt.layers.sampler.murmur_hash32", below_largest_hash, "after")
    hook_in("sglang.srt.layers.sampler.Sampler.forward", row_filter.around_sampler, "around")
    hook_in(
        "sglang.srt.speculative.eagle_utils.eagle_sample", row_filter.around_verification, "around"
    )
