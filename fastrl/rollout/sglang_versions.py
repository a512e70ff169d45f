"""What SGLang's versions from 0.5.17 to 0.5.21 do differently, inside its scheduler process.

What they do differently towards the trainer is settled in sglang_host.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from sglang.srt.runtime_context import get_context, get_exec
from sglang.srt.speculative import eagle_utils, eagle_worker_common
from torch import Tensor

_LEAST_COIN, _LARGEST_COIN = torch.finfo(torch.float32).tiny, 1 - 2.0**-18
"""Beyond what sums over a vocabulary round by."""
_READ_DONE = ("war_fastpath_read_done_event", "shared_read_done_event")
"""Where a model's runner keeps the event after which its forward reads no shared buffer any more:
in 0.5.17, and in later versions."""


def set_speculation(worker: Any, fields: dict[str, int]) -> None:
    """Set what backends and graphs size themselves by: in the process's context, and in older
    versions in the arguments that it came from. Later ones keep these from changing."""
    get_context().override("fastrl", **fields)
    for arguments in _all_arguments(worker):
        if dataclasses.is_dataclass(arguments):
            for name, value in fields.items():
                object.__setattr__(arguments, name, value)


def graph_configs(worker: Any) -> list[Any]:
    """All copies of the settings of CUDA graphs, each once."""
    copies = [get_exec().graph.cuda_graph_config]
    copies += [arguments.cuda_graph_config for arguments in _all_arguments(worker)]
    return list({id(one): one for one in copies if one is not None}.values())


def _all_arguments(worker: Any) -> list[Any]:
    runners = worker._target_worker.model_runner, worker._draft_worker.draft_runner
    copies = [worker.server_args, *(runner.server_args for runner in runners)]
    return list({id(one): one for one in copies}.values())


def move_read_done(runner: Any, to: Any | None = None) -> None:
    """Take a runner's event after its last read of a shared buffer away, and give it to another.

    SGLang writes the next step's inputs after the event of one of its runners, or after the whole
    step where that has none.
    """
    for name in _READ_DONE:
        if (event := getattr(runner, name, None)) is not None:
            setattr(runner, name, None)
            if to is not None:
                setattr(to, name, event)


@contextlib.contextmanager
def kept_paths() -> Iterator[list[Tensor]]:
    """The accepted paths [B, D] that SGLang's sampling finds meanwhile, which its results leave out
    before 0.5.21."""
    sample = eagle_worker_common.eagle_sample
    paths: list[Tensor] = []

    def sample_and_keep(*args: Any, **kwargs: Any) -> Any:
        predict, accept_lens, accept_index = sample(*args, **kwargs)
        paths.append(accept_index)
        return predict, accept_lens, accept_index

    eagle_worker_common.eagle_sample = sample_and_keep
    try:
        yield paths
    finally:
        eagle_worker_common.eagle_sample = sample


@contextlib.contextmanager
def coins_inside_interval() -> Iterator[None]:
    """The uniforms that SGLang verifies with meanwhile stay off the ends of [0, 1).

    At 0 its kernel accepts a token without any probability; and so close to 1 that sums round to
    less, it rejects all that have some, or finds none, and emits the last of the vocabulary.
    """
    draw = eagle_utils._verify_coins

    def draw_inside(**kwargs: Any) -> tuple[Tensor, Tensor]:
        coins_BN, last_coin_B = draw(**kwargs)
        return (
            coins_BN.clamp(_LEAST_COIN, _LARGEST_COIN),
            last_coin_B.clamp(_LEAST_COIN, _LARGEST_COIN),
        )

    eagle_utils._verify_coins = draw_inside
    try:
        yield
    finally:
        eagle_utils._verify_coins = draw
