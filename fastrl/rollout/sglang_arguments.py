"""Strategies and GPUs in the words of SGLang's `ServerArgs`; refuses strategies it cannot run."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from fastrl.rollout.bandit import FixedStrategy
from fastrl.rollout.bandit_base import Bandit
from fastrl.rollout.drafters.loading import is_eagle3
from fastrl.rollout.drafters.vocabulary import TOKEN_MAP_FILE
from fastrl.rollout.engine import StrategySelector
from fastrl.rollout.sglang_plugin import ALGORITHM, ALGORITHM_3
from fastrl.rollout.sglang_pool import StrategyPool
from fastrl.types import DraftStrategy


def checked_strategies(
    selector: StrategySelector, drafter_path: str | None
) -> tuple[DraftStrategy, ...]:
    """All strategies of the selector; ValueError for what SGLang cannot run."""
    for strategy in selector.strategies:
        if strategy.drafter == "ngram":
            raise ValueError(
                f"strategy {strategy}: SGLang does not draft n-gram trees as FastRL does; use "
                f"trees of the learned drafter and 'off', or TorchEngine"
            )
        if strategy.needs_learned_drafter and drafter_path is None:
            raise ValueError(
                f"strategy {strategy} needs a drafter, but engine.drafter_path is null; set it to "
                f"a drafter checkpoint, or use strategy 'off'"
            )
    return tuple(selector.strategies)


def strategy_pool(
    selector: StrategySelector,
    max_batch_size: int,
    *,
    bucketed_graphs: bool = True,
    unread_gib: float = 1.0,
) -> StrategyPool | None:
    """What to prepare SGLang for so that the selector can choose at each step; None for one that
    always runs the same, which stock SGLang does."""
    trees = [strategy for strategy in selector.strategies if not strategy.is_off]
    if isinstance(selector, FixedStrategy) or not trees:
        return None
    limits: dict[DraftStrategy, int | None] = {}
    for tree in trees:
        limit = selector.largest_batch(tree) if isinstance(selector, Bandit) else None
        limits[tree] = None if limit is None or limit >= max_batch_size else limit
    return StrategyPool(largest_batch=limits, is_bucketed=bucketed_graphs, unread_gib=unread_gib)


def speculation_arguments(
    strategies: tuple[DraftStrategy, ...], pool: StrategyPool | None, drafter_path: str | None
) -> dict[str, Any]:
    """Strategies in SGLang's words: the largest of a pool's, or the only one; nothing for plain
    decoding."""
    largest = pool if pool is not None else strategies[0]
    if largest.depth == 0:
        return {}
    vocabulary: dict[str, Any] = {}
    if drafter_path is not None and (path := Path(drafter_path) / TOKEN_MAP_FILE).is_file():
        vocabulary = {"speculative_token_map": str(path)}
    return vocabulary | {
        "speculative_algorithm": _algorithm(pool, drafter_path),
        "speculative_draft_model_path": drafter_path,
        "speculative_num_steps": largest.depth,
        "speculative_eagle_topk": largest.topk,
        "speculative_num_draft_tokens": largest.verify_tokens,
    }


def _algorithm(pool: StrategyPool | None, drafter_path: str | None) -> str:
    """Stock SGLang under its EAGLE flag would run an EAGLE-3 drafter too, and accept nothing."""
    if drafter_path is not None and is_eagle3(drafter_path):
        return "EAGLE3" if pool is None else ALGORITHM_3
    return "EAGLE" if pool is None else ALGORITHM


def graph_arguments(
    pool: StrategyPool | None, device: torch.device, max_batch_size: int
) -> dict[str, Any]:
    """Batch sizes of CUDA graphs: all that there may be, where plain decoding is one of a pool."""
    if pool is None or device.type != "cuda":
        return {}
    return {"cuda_graph_max_bs_decode": max_batch_size}


def place_arguments(device: torch.device) -> dict[str, Any]:
    """Which GPU and ports an engine takes: SGLang's defaults would be the same for every one."""
    with ExitStack() as sockets:
        taken = [sockets.enter_context(socket.socket()) for _ in range(2)]
        for one in taken:
            one.bind(("127.0.0.1", 0))
        port, nccl_port = (int(one.getsockname()[1]) for one in taken)
    arguments: dict[str, Any] = {"device": device.type, "port": port, "nccl_port": nccl_port}
    if device.type == "cuda":
        index = device.index
        arguments["base_gpu_id"] = torch.cuda.current_device() if index is None else index
    return arguments


_SPECULATION = (
    "speculative_algorithm",
    "speculative_draft_model_path",
    "speculative_num_steps",
    "speculative_eagle_topk",
    "speculative_num_draft_tokens",
    "speculative_token_map",
)


def check_not_ours(further: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise ValueError for arguments given past the options that set them."""
    if both := sorted(further.keys() & {*ours, *_SPECULATION}):
        raise ValueError(
            f"server_args must not hold {both}, which the engine's own options set; use those"
        )
