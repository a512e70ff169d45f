"""FastRL's plugin for SGLang: a speculative algorithm that changes its draft tree at every step.

SGLang loads `register` by the entry point in group `sglang.srt.plugins` (setup.py), in each of its
processes. It registers the algorithms `FASTRL` and `FASTRL3`, which are SGLang's own EAGLE and
EAGLE3 in all but the worker (sglang_worker.py), and lets the trainer's side talk to that worker
over SGLang's RPC: a request whose method begins with `fastrl_` is answered by the worker, or by us,
and its answer goes back in the message. An SGLang that runs another algorithm is left as it is, but
for its filters of tokens (sglang_filters.py), hidden states (sglang_hidden_states.py) and the
drafter's embedding (sglang_shared_embedding.py).
"""

from __future__ import annotations

import base64
import pickle
import traceback
from collections.abc import Callable
from typing import Any

from fastrl.rollout.sglang_filters import filter_as_we_do
from fastrl.rollout.sglang_hidden_states import keep_all_chunks
from fastrl.rollout.sglang_hooks import hook_in, not_in_force
from fastrl.rollout.sglang_shared_embedding import (
    draft_head_difference,
    refresh_draft_head,
)
from fastrl.rollout.sglang_shared_embedding import register as share_embedding_early

ALGORITHM = "FASTRL"
ALGORITHM_3 = "FASTRL3"
RPC_PREFIX = "fastrl_"


def _seed_generators(scheduler: Any, seed: int) -> None:
    """Those that tokens are drawn with where none has a seed of its own."""
    import torch

    torch.manual_seed(seed)


_ASKED_OF_ANY_WORKER: dict[str, Callable[..., Any]] = {
    "refresh_draft_head": refresh_draft_head,
    "draft_head_difference": draft_head_difference,
    "seed_generators": _seed_generators,
    "hooks_not_in_force": lambda scheduler: not_in_force(),
}
"""By method; of SGLang's own workers too."""

_OWN_METHODS = frozenset({"register", "from_string", "create_worker", "handle_server_args"})


def register() -> None:
    """Called by SGLang before it reads its arguments."""
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    for name, stock in (
        (ALGORITHM, SpeculativeAlgorithm.EAGLE),
        (ALGORITHM_3, SpeculativeAlgorithm.EAGLE3),
    ):
        enter = SpeculativeAlgorithm.register(
            name, supports_overlap=True, spec_class=_all_but_worker(stock)
        )
        enter(_worker_class)
    share_embedding_early()
    keep_all_chunks()
    filter_as_we_do()
    answer_requests()  # the last: where it is in force, so has been asked for all else


def answer_requests() -> None:
    """Those whose methods are ours, in every scheduler that this process starts."""
    hook_in("sglang.srt.managers.scheduler.Scheduler.handle_rpc_request", _answer_rpc, "around")


def _worker_class(server_args: Any) -> type:
    """In the scheduler alone: its imports are SGLang's whole engine."""
    from fastrl.rollout.sglang_worker import SwitchingWorker

    return SwitchingWorker


def _all_but_worker(stock: Any) -> type:
    """What SGLang asks an algorithm, answered as one of its own does."""
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
    from sglang.srt.speculative.spec_registry import CustomSpecAlgo

    # Bound once: SGLang asks them hundreds of times a step.
    methods: dict[str, Any] = {
        name: staticmethod(getattr(stock, name))
        for name, value in vars(SpeculativeAlgorithm).items()
        if callable(value) and not name.startswith("_") and name not in _OWN_METHODS
    }
    methods["handle_server_args"] = _settle_arguments
    return type("FastRLAlgorithm", (CustomSpecAlgo,), methods)


def _settle_arguments(self: Any, server_args: Any) -> None:
    """What SGLang settles for EAGLE, as far as our arguments leave it open."""
    if server_args.device == "cpu":
        server_args.disable_overlap_schedule = True
    server_args.enable_mixed_chunk = False  # a step mixed with a prefill cannot speculate


def _answer_rpc(original: Callable[..., Any], scheduler: Any, request: Any) -> Any:
    """In the scheduler: a request for our worker, or one that SGLang answers."""
    if not request.method.startswith(RPC_PREFIX):
        return original(scheduler, request)
    from sglang.srt.managers.io_struct import RpcReqOutput

    method = request.method.removeprefix(RPC_PREFIX)
    try:
        arguments = unpacked(request.parameters["packed"])
        if method in _ASKED_OF_ANY_WORKER:
            answer = _ASKED_OF_ANY_WORKER[method](scheduler, **arguments)
        else:
            answer = getattr(scheduler.draft_worker, f"serve_{method}")(**arguments)
    except Exception as error:
        traceback.print_exc()  # into SGLang's log: the trainer is told in one line
        return RpcReqOutput(success=False, message=f"{type(error).__name__}: {error}")
    return RpcReqOutput(success=True, message=packed(answer))


def packed(value: Any) -> str:
    """As text: SGLang's RPC carries nothing else."""
    return base64.b64encode(pickle.dumps(value)).decode("ascii")


def unpacked(text: str) -> Any:
    """What `packed` was given, by our own processes."""
    return pickle.loads(base64.b64decode(text))
