"""The SGLang engine's options, checked, and the arguments of SGLang's `ServerArgs` they become.

Leaves out what depends on strategies and GPUs (sglang_arguments.py); `SGLangEngine` says what each
option means.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fastrl.rollout.sglang_arguments import (
    check_not_ours,
    graph_arguments,
    place_arguments,
    speculation_arguments,
)
from fastrl.rollout.sglang_pool import StrategyPool
from fastrl.rollout.sglang_weights import MESSAGE_TIMEOUT_S
from fastrl.types import DraftStrategy

_LATENESS_S = 1800.0
"""Most seconds between ranks of a group at the same call, beside the engine's own work."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SGLangOptions:
    """Those of `SGLangEngine` that hold from its construction on.

    Raises ValueError for values without meaning, and for `server_args` that other options set.
    """

    max_batch_size: int
    dtype: Literal["float32", "bfloat16"]
    device: torch.device
    tp_size: int
    mem_fraction_static: float | None
    attention_backend: str | None
    deterministic: bool
    hidden_states: bool
    memory_saver: bool
    bucketed_graphs: bool
    unread_gib: float
    bucket_mib: int
    start_timeout_s: float
    generate_timeout_s: float
    log_dir: str | None
    server_args: Mapping[str, Any]

    def __post_init__(self) -> None:
        for name, value in (
            ("max_batch_size", self.max_batch_size),
            ("tp_size", self.tp_size),
            ("bucket_mib", self.bucket_mib),
        ):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}; set engine.{name}")
        for name, seconds in (
            ("start_timeout_s", self.start_timeout_s),
            ("generate_timeout_s", self.generate_timeout_s),
        ):
            if seconds <= 0:
                raise ValueError(f"{name} must be > 0 seconds, got {seconds}; set engine.{name}")
        if not 0 <= self.unread_gib < math.inf:
            raise ValueError(
                f"unread_gib must be >= 0 and finite, got {self.unread_gib}; set engine.unread_gib"
            )
        share = self.mem_fraction_static
        if share is not None and not 0 < share < 1:
            raise ValueError(
                f"mem_fraction_static must be in (0, 1), got {share}; set "
                f"engine.mem_fraction_static, or leave it out for SGLang's default"
            )
        check_not_ours(self.server_args, self._own_arguments())

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of weights and computations."""
        return torch.float32 if self.dtype == "float32" else torch.bfloat16

    @property
    def group_timeout_s(self) -> float:
        """Longest that a rank waits for another that shares its engine."""
        longest = max(self.start_timeout_s, self.generate_timeout_s, MESSAGE_TIMEOUT_S)
        return _LATENESS_S + longest

    def server_arguments(
        self,
        model_path: str,
        drafter_path: str | None,
        strategies: tuple[DraftStrategy, ...],
        pool: StrategyPool | None,
    ) -> dict[str, Any]:
        """All that SGLang is started with, on ports that are free now."""
        ours = (
            self._own_arguments()
            | {"model_path": model_path}
            | place_arguments(self.device)
            | speculation_arguments(strategies, pool, drafter_path)
            | graph_arguments(pool, self.device, self.max_batch_size)
        )
        if self.tp_size > 1 and "speculative_token_map" in ours:
            raise ValueError(
                f"the drafter of {drafter_path} has a vocabulary of its own, which SGLang cannot "
                f"split among {self.tp_size} GPUs: set engine.tp_size to 1, or give a drafter of "
                f"the whole vocabulary"
            )
        check_not_ours(self.server_args, ours)
        return ours | dict(self.server_args)

    def _own_arguments(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "dtype": self.dtype,
            "tp_size": self.tp_size,
            "max_running_requests": self.max_batch_size,
            "enable_deterministic_inference": self.deterministic,
            "enable_return_hidden_states": self.hidden_states,
            "enable_memory_saver": self.memory_saver,
            "log_level": "info",
        }
        if self.mem_fraction_static is not None:
            arguments["mem_fraction_static"] = self.mem_fraction_static
        if self.attention_backend is not None:
            arguments["attention_backend"] = self.attention_backend
        return arguments

    def new_log(self) -> Path:
        """An empty file for what SGLang prints."""
        if self.log_dir is not None:
            Path(self.log_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            prefix="sglang-", suffix=".log", dir=self.log_dir, delete=False
        ) as log:
            return Path(log.name)
