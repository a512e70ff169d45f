"""From our options to the arguments of SGLang's `ServerArgs`; refuses strategies it cannot run."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch

from fastrl.rollout.bandit import FixedStrategy
from fastrl.rollout.engine import StrategySelector
from fastrl.types import DraftStrategy


def fixed_strategy(selector: StrategySelector, drafter_path: str | None) -> DraftStrategy:
    """The one strategy of the selector; ValueError for what stock SGLang cannot run."""
    if not isinstance(selector, FixedStrategy):
        raise ValueError(
            f"{type(selector).__name__} cannot choose strategies of stock SGLang, which runs one "
            f"from start to end; adaptation comes with FastRL's SGLang plugin: leave out the "
            f"StrategyAdaptation callback and set engine.strategy, or use TorchEngine"
        )
    strategy = selector.strategy
    if strategy.drafter == "ngram":
        raise ValueError(
            f"strategy {strategy}: stock SGLang does not draft n-gram trees as FastRL does; set "
            f"engine.strategy to a tree of the learned drafter or 'off', or use TorchEngine"
        )
    if strategy.needs_learned_drafter and drafter_path is None:
        raise ValueError(
            f"strategy {strategy} needs a drafter, but engine.drafter_path is null; set it to a "
            f"drafter checkpoint, or use strategy 'off'"
        )
    return strategy


def speculation_arguments(strategy: DraftStrategy, drafter_path: str | None) -> dict[str, Any]:
    """A strategy in SGLang's words; nothing for plain decoding."""
    if strategy.is_off:
        return {}
    return {
        "speculative_algorithm": "EAGLE",
        "speculative_draft_model_path": drafter_path,
        "speculative_num_steps": strategy.depth,
        "speculative_eagle_topk": strategy.topk,
        "speculative_num_draft_tokens": strategy.verify_tokens,
    }


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
)


def check_not_ours(further: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise ValueError for arguments given past the options that set them."""
    if both := sorted(further.keys() & {*ours, *_SPECULATION}):
        raise ValueError(
            f"server_args must not hold {both}, which the engine's own options set; use those"
        )
