"""An SGLang that runs: how it is started, and what exists until it ends.

Leaves out when it is started, and what is asked of it afterwards (sglang_engine.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from fastrl.rollout.drafters.checkpoints import check_sglang_reads
from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.drafters.loading import load_drafter
from fastrl.rollout.end_of_sequence import eos_token_ids
from fastrl.rollout.engine_group import EngineGroup
from fastrl.rollout.sglang_calls import ModelInfo
from fastrl.rollout.sglang_options import SGLangOptions
from fastrl.rollout.sglang_pool import StrategyPool
from fastrl.rollout.sglang_process import StartedEngine
from fastrl.rollout.sglang_served_weights import ServedWeights
from fastrl.rollout.shared_process import SharedProcess
from fastrl.types import DraftStrategy


@dataclass(frozen=True, kw_only=True, slots=True)
class StartRequest:
    """What a rank wants started."""

    model_path: str
    strategies: tuple[DraftStrategy, ...]
    """All that may be chosen; the only one without a pool."""
    pool: StrategyPool | None
    """What SGLang is to switch between; None for stock SGLang."""
    drafter_path: str | None
    """Of the drafter, where there is one to speculate with."""

    @property
    def speculates(self) -> bool:
        """Whether any of the strategies does."""
        return any(not strategy.is_off for strategy in self.strategies)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunningEngine:
    """SGLang's processes, and what they serve."""

    model_path: str
    process: SharedProcess
    weights: ServedWeights
    pool: StrategyPool | None
    model: ModelInfo
    drafter: EagleDrafter | None
    """As its checkpoint has it, which is served at first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Files:
    """What a rank reads, and what follows from it."""

    request: StartRequest
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: tuple[int, ...]
    drafter: EagleDrafter | None
    server_args: Mapping[str, Any]


def start_engine(
    request: Callable[[], StartRequest], options: SGLangOptions, group: EngineGroup
) -> RunningEngine:
    """Start SGLang, which has no policy then. All ranks of the group do this together.

    Args:
        request: makes this rank's; what it raises on one rank is raised on all.
        options: of the engine.
        group: that shares it.

    Raises:
        FileNotFoundError: no such model or drafter.
        ValueError: a drafter of another model, ranks that want different things, or weights of
            SGLang's model that a publication would not reach.
        EngineError: SGLang did not start within its time; nothing of it is left.
    """
    group.check_devices(options.device)
    files = group.agree("files to start from", lambda: _read(request(), options))
    _check_alike(group, files.request)
    pool = files.request.pool
    with ExitStack() as on_failure:
        process = SharedProcess(group, options.new_log)
        on_failure.callback(process.end)
        engine: StartedEngine = process.call(
            "start", options.start_timeout_s, server_args=files.server_args, pool=pool
        )
        process.watch(engine.processes)
        weights = ServedWeights(process, files.config, files.drafter, options)
        weights.remember_buffers()
        weights.check_names()
        if files.drafter is not None:
            weights.publish_drafter(list(files.drafter.named_weights()), version=-1)
        on_failure.pop_all()
    return RunningEngine(
        model_path=files.request.model_path,
        process=process,
        weights=weights,
        pool=pool,
        model=ModelInfo(
            config=files.config,
            tokenizer=files.tokenizer,
            eos_token_ids=files.eos_token_ids,
            strategies=files.request.strategies if pool is None else tuple(pool.strategies),
            pool_tokens=engine.pool_tokens,
            context_length=files.server_args.get("context_length"),
        ),
        drafter=files.drafter,
    )


def _read(request: StartRequest, options: SGLangOptions) -> _Files:
    path, pool = request.model_path, request.pool
    if not (Path(path) / "config.json").is_file():
        raise FileNotFoundError(
            f"model folder {path} has no config.json; expected a Hugging Face checkpoint folder "
            f"(config.json, model.safetensors, tokenizer files)"
        )
    config = AutoConfig.from_pretrained(path).get_text_config()
    tokenizer = AutoTokenizer.from_pretrained(path)
    drafter = None
    if request.drafter_path is not None and request.speculates:
        drafter = load_drafter(request.drafter_path, config)
        wide = [one for one in request.strategies if one.topk > drafter.num_drafted]
        if wide:
            raise ValueError(
                f"strategy {wide[0]}: topk {wide[0].topk} is larger than the vocabulary of the "
                f"drafter ({drafter.num_drafted}); lower it"
            )
        if options.hidden_states and drafter.feature_layers:
            raise ValueError(
                "with an EAGLE-3 drafter SGLang returns the hidden states that the drafter reads, "
                "not the last ones; set engine.hidden_states to false, or use TorchEngine"
            )
        check_sglang_reads(request.drafter_path)
        if len(drafter.feature_layers) == 1:
            raise ValueError(
                f"the EAGLE-3 drafter of {request.drafter_path} reads a single layer, "
                f"{drafter.feature_layers[0]}: SGLang takes features as wide as a hidden state for "
                f"the drafter's own output, and leaves fc out; use one of several layers, or "
                f"TorchEngine"
            )
    return _Files(
        request=request,
        config=config,
        tokenizer=tokenizer,
        eos_token_ids=eos_token_ids(path, config, tokenizer),
        drafter=drafter,
        server_args=options.server_arguments(path, request.drafter_path, request.strategies, pool),
    )


def _check_alike(group: EngineGroup, request: StartRequest) -> None:
    """Raise ValueError unless all ranks want the same strategies."""
    wanted = group.gather("strategies", lambda: (request.strategies, request.pool))
    if any(other != wanted[0] for other in wanted):
        given = [[str(strategy) for strategy in strategies] for strategies, _ in wanted]
        raise ValueError(
            f"ranks that share an engine must be given the same strategies, got {given}"
        )
