"""The rollout engine for production: stock SGLang, in processes of its own.

This file keeps the contract `RolloutEngine`: what is asked of SGLang, and when. How its processes
are kept is told in sglang_process.py, what runs in them in sglang_host.py, with which arguments in
sglang_arguments.py, how weights get there in sglang_weights.py, and how records are translated in
sglang_rollouts.py. With a selector that can choose (a bandit, set before `start`) SGLang runs
FastRL's plugin (sglang_plugin.py, sglang_worker.py), which asks it before each decode step;
sglang_adaptation.py brings it there and back. Otherwise SGLang runs as it is.

Randomness is seeded by request, and so reproducible as long as the strategies are; but with
speculation on SGLang draws other numbers than with it off: the distribution is the same, the tokens
are not.
"""

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from fastrl.rollout.bandit import FixedStrategy
from fastrl.rollout.drafter_health import DrafterHealth
from fastrl.rollout.drafters.eagle import EagleDrafter, without_shared
from fastrl.rollout.end_of_sequence import eos_token_ids
from fastrl.rollout.engine import IdleHook, IdleWindow, StrategySelector, WeightEvents
from fastrl.rollout.engine_group import EngineGroup
from fastrl.rollout.sampling import request_key
from fastrl.rollout.sglang_adaptation import (
    answer_cost_queries,
    check_in_pool,
    take_back,
    without_journal,
)
from fastrl.rollout.sglang_arguments import (
    check_not_ours,
    checked_strategies,
    graph_arguments,
    place_arguments,
    speculation_arguments,
    strategy_pool,
)
from fastrl.rollout.sglang_pool import StrategyPool
from fastrl.rollout.sglang_process import Role, StartedEngine
from fastrl.rollout.sglang_rollouts import (
    as_rollout,
    check_prompt,
    check_sampling,
    counted_statistics,
    longest_sequence,
    num_top_logprobs,
    sglang_sampling,
    statistics,
)
from fastrl.rollout.sglang_weights import (
    MESSAGE_TIMEOUT_S,
    WeightPublisher,
    check_every_weight_is_reached,
    check_ranks_agree,
    policy_skeleton,
    weight_checksums,
)
from fastrl.rollout.shared_process import GenerateRequest, SharedProcess, SharedRequests
from fastrl.rollout.weight_differences import WeightDifference
from fastrl.types import OFF, DraftStrategy, EngineStats, Prompt, Rollout, SamplingParams

_LATENESS_S = 1800.0
"""Most seconds between ranks of a group at the same call, beside the engine's own work."""


@dataclass(kw_only=True, slots=True)
class _Running:
    """What exists between `start` and `close`."""

    model_path: str
    process: SharedProcess
    engine: StartedEngine
    strategies: tuple[DraftStrategy, ...]
    """That it can run; the only one without a pool."""
    pool: StrategyPool | None
    """What it can switch between; None for stock SGLang."""
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: tuple[int, ...]
    policy: WeightPublisher
    drafter: WeightPublisher | None
    has_policy: bool = False
    has_drafter: bool = True
    """False from `sleep` on, until the drafter is published again."""


class SGLangEngine:
    """Rollouts from SGLang, on one or several GPUs.

    Args:
        drafter_path: Folder of the EAGLE drafter to speculate with; null: none.
        strategy: Draft tree of every step, as depth_topk_verifytokens ('4_2_8'), or 'off'; a bandit
            (StrategyAdaptation) takes its place.
        max_batch_size: Most rollouts decoded at once; others wait in a queue.
        dtype: Numbers to compute in, and of the published weights.
        device: Where to compute: 'cpu', 'cuda', 'cuda:1', or 'auto' for a GPU if there is one; with
            tp_size > 1 the first of as many GPUs in a row.
        tp_size: GPUs that share the model (tensor parallelism). Of a trainer of several ranks, as
            many in a row share one engine on their GPUs; a single one's engine takes them all.
        mem_fraction_static: Share of the device's memory for weights and cache; null: SGLang's
            default.
        attention_backend: SGLang's attention kernels ('triton', 'fa3', 'flashinfer'); null: its
            default.
        deterministic: Seed every token, so that rollouts repeat whatever the batch; costs speed
            (SGLang's batch-invariant kernels). Without it tokens depend on the batch and the run.
        hidden_states: Whether rollouts can be asked for hidden states; SGLang prepares for it at
            its start.
        memory_saver: Whether `sleep` can give memory back; needs the package torch-memory-saver.
        bucket_mib: Most MiB of weights published in one message.
        start_timeout_s: Seconds an engine may take to start.
        generate_timeout_s: Seconds a `generate` call may take before the engine is taken to hang.
        log_dir: Folder for SGLang's log, which is kept; null: a temporary file, kept after a
            failure alone.
        server_args: Further arguments of SGLang's ServerArgs, passed on as they are.
    """

    def __init__(
        self,
        drafter_path: str | None = None,
        strategy: str = "off",
        max_batch_size: int = 256,
        dtype: Literal["float32", "bfloat16"] = "bfloat16",
        device: str = "auto",
        tp_size: int = 1,
        mem_fraction_static: float | None = None,
        attention_backend: str | None = None,
        deterministic: bool = True,
        hidden_states: bool = False,
        memory_saver: bool = False,
        bucket_mib: int = 512,
        start_timeout_s: float = 600.0,
        generate_timeout_s: float = 3600.0,
        log_dir: str | None = None,
        server_args: Mapping[str, Any] | None = None,
    ) -> None:
        for name, value in (
            ("max_batch_size", max_batch_size),
            ("tp_size", tp_size),
            ("bucket_mib", bucket_mib),
        ):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}; set engine.{name}")
        for name, seconds in (
            ("start_timeout_s", start_timeout_s),
            ("generate_timeout_s", generate_timeout_s),
        ):
            if seconds <= 0:
                raise ValueError(f"{name} must be > 0 seconds, got {seconds}; set engine.{name}")
        if mem_fraction_static is not None and not 0 < mem_fraction_static < 1:
            raise ValueError(
                f"mem_fraction_static must be in (0, 1), got {mem_fraction_static}; set "
                f"engine.mem_fraction_static, or leave it out for SGLang's default"
            )
        self.drafter_path = drafter_path
        self.strategy_selector: StrategySelector = FixedStrategy(strategy)
        self.on_idle: IdleHook | None = None
        self.others_generate: Callable[[], bool] = _nobody
        """Whether other ranks still generate; set by whoever coordinates ranks."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._device = torch.device(device)
        self._dtype = dtype
        self._max_batch_size = max_batch_size
        self._hidden_states = hidden_states
        self._memory_saver = memory_saver
        self._tp_size = tp_size
        self._bucket_mib = bucket_mib
        self._start_timeout_s = start_timeout_s
        self._generate_timeout_s = generate_timeout_s
        self._group_timeout_s = _LATENESS_S + max(
            start_timeout_s, generate_timeout_s, MESSAGE_TIMEOUT_S
        )
        self._log_dir = log_dir
        self._server_args: dict[str, Any] = {
            "dtype": dtype,
            "tp_size": tp_size,
            "max_running_requests": max_batch_size,
            "enable_deterministic_inference": deterministic,
            "enable_return_hidden_states": hidden_states,
            "enable_memory_saver": memory_saver,
            "log_level": "info",
        }
        if mem_fraction_static is not None:
            self._server_args["mem_fraction_static"] = mem_fraction_static
        if attention_backend is not None:
            self._server_args["attention_backend"] = attention_backend
        self._further_args = dict(server_args or {})
        check_not_ours(self._further_args, self._server_args)
        self._policy_version = -1
        self._drafter_version = -1
        self._stats = EngineStats()
        self._events = WeightEvents()
        self._health = DrafterHealth()
        self._failures: list[str] = []  # since the last `generate` ended
        self._is_drafter_rejected = False
        self._running: _Running | None = None

    # -- life cycle -------------------------------------------------------------------------------

    def start(self, model_path: str) -> None:
        """Start SGLang's processes; weights come by `load_policy`.

        Ranks of the trainer that share the engine, as all that are called a group, do this and all
        else together; what is raised on one is raised on all.

        Raises:
            FileNotFoundError: no such model or drafter.
            ValueError: a strategy that stock SGLang cannot run, a drafter of another model, or
                weights of SGLang's model that a publication would not reach.
            EngineError: SGLang did not start within start_timeout_s; nothing of it is left.
        """
        strategies = self._strategies_to_run()
        pool = strategy_pool(self.strategy_selector, self._max_batch_size)
        if not (Path(model_path) / "config.json").is_file():
            raise FileNotFoundError(
                f"model folder {model_path} has no config.json; expected a Hugging Face checkpoint "
                f"folder (config.json, model.safetensors, tokenizer files)"
            )
        config = AutoConfig.from_pretrained(model_path).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        drafter = None
        if self.drafter_path is not None and any(not strategy.is_off for strategy in strategies):
            drafter = EagleDrafter.from_pretrained(self.drafter_path, config)
        server_args = self._all_server_args(model_path, strategies, pool)
        group = EngineGroup.join(self._tp_size, timeout_s=self._group_timeout_s)
        group.check_devices(self._device)
        with ExitStack() as on_failure:
            process = SharedProcess(group, self._new_log)
            on_failure.callback(process.end)
            engine = process.call(
                "start", self._start_timeout_s, server_args=server_args, pool=pool
            )
            running = _Running(
                model_path=model_path,
                process=process,
                engine=engine,
                strategies=strategies if pool is None else tuple(pool.strategies),
                pool=pool,
                config=config,
                tokenizer=tokenizer,
                eos_token_ids=eos_token_ids(model_path, config, tokenizer),
                policy=self._publisher(process, "target", policy_skeleton(config)),
                drafter=None
                if drafter is None
                else self._publisher(process, "draft", dict(drafter.named_weights())),
            )
            check_every_weight_is_reached(process, running.policy, running.drafter)
            if drafter is not None and running.drafter is not None:
                running.drafter.publish(drafter.named_weights())
                self._judge_anew(f"drafter of {self.drafter_path}", drafter.named_weights())
            on_failure.pop_all()
        self._running = running
        self._events = dataclasses.replace(self._events, wakes=self._events.wakes + 1)

    @property
    def policy_version(self) -> int:
        """Version of the weights it samples from; -1 before the first `load_policy`."""
        return self._policy_version

    @property
    def drafter_version(self) -> int:
        """Version of the drafter; -1 for the one loaded from drafter_path."""
        return self._drafter_version

    def load_policy(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Send the policy's weights, bucket by bucket; the drafter's embedding and LM head follow.

        Raises ValueError naming missing, unknown and misshapen tensors: then the engine generates
        nothing until all are sent.
        """
        running = self._started()
        running.has_policy, self._policy_version = False, -1
        running.policy.publish(self._without_tied(running, named_tensors))
        running.has_policy, self._policy_version = True, version
        events = self._events
        self._events = dataclasses.replace(events, policy_loads=events.policy_loads + 1)

    def load_drafter(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Send the drafter's trainable weights; an embedding or LM head among them is left out.

        After a drafter was rejected SGLang is started anew for it, and has no policy then.
        Raises ValueError as `load_policy` does, and where ranks that share the engine hold
        different drafters.
        """
        running = self._started()
        if self._is_drafter_rejected:
            self._is_drafter_rejected = False
            if running.pool is None:
                running = self._restarted(running.model_path)
        if running.drafter is None:
            raise ValueError(
                f"load_drafter: the engine has no drafter (engine.drafter_path "
                f"{self.drafter_path}, strategy {running.strategies[0]}); set engine.drafter_path "
                f"and a strategy that uses it, e.g. engine.strategy '4_2_8'"
            )
        weights = list(without_shared(named_tensors))
        check_ranks_agree(running.process.ranks, weights)
        running.has_drafter, self._drafter_version = False, -1
        running.drafter.publish(weights)
        running.has_drafter, self._drafter_version = True, version
        events = self._events
        self._events = dataclasses.replace(events, drafter_loads=events.drafter_loads + 1)
        self._judge_anew(f"drafter version {version}", weights)
        if running.pool is not None:
            self.strategy_selector.exclude(())

    @property
    def process(self) -> SharedProcess | None:
        """SGLang's processes; None before `start`, and after they have ended."""
        if self._running is None or self._running.process.has_ended:
            return None
        return self._running.process

    def weight_checksums(self) -> list[dict[str, str]]:
        """Checksums of SGLang's weights by its own names (`draft.` before the drafter's), for each
        tensor-parallel rank."""
        return weight_checksums(self._started().process)

    @property
    def weight_events(self) -> WeightEvents:
        """What has been done to its weights so far."""
        return self._events

    def compare_policy(self, named_tensors: Iterable[tuple[str, Tensor]]) -> list[WeightDifference]:
        """The policy's weights that differ from these; takes what a publication takes."""
        running = self._started()
        return running.policy.compare(self._without_tied(running, named_tensors))

    def compare_drafter(
        self, named_tensors: Iterable[tuple[str, Tensor]]
    ) -> list[WeightDifference]:
        """The drafter's weights that differ from these; none where speculation is off."""
        running = self._started()
        if running.drafter is None:
            return []
        return running.drafter.compare(without_shared(named_tensors))

    def reject_drafter(self, reason: str) -> None:
        """Speculate no more until the next drafter is published. Stock SGLang, which changes its
        strategy at no other time, is started anew for it: the policy must be published again."""
        running = self._started()
        if not any(strategy.needs_learned_drafter for strategy in running.strategies):
            return
        if self._health.failure is None:
            self._health.fail(reason)
            self._note_failure()
        if running.pool is not None:
            self._is_drafter_rejected = True
            return
        warnings.warn(
            f"{self._health.failure}. SGLang is started anew without speculation, until the next "
            f"drafter is published",
            stacklevel=2,
        )
        self._is_drafter_rejected = True
        self._restarted(running.model_path)

    def stats(self) -> EngineStats:
        """What the last `generate` did, as far as SGLang tells (sglang_rollouts.statistics)."""
        return self._stats

    def sleep(self) -> None:
        """Give back the memory of cache, graphs and weights: publish policy and drafter after
        `wake`."""
        running = self._started()
        if not self._memory_saver:
            raise ValueError(
                "sleep: SGLang gives memory back only where it was started for that; set "
                "engine.memory_saver: true (needs the package torch-memory-saver)"
            )
        running.has_policy, self._policy_version = False, -1
        running.has_drafter, self._drafter_version = running.drafter is None, -1
        running.process.call("sleep", MESSAGE_TIMEOUT_S)

    def wake(self) -> None:
        """Take the memory again; `generate` refuses until the weights are published."""
        self._started().process.call("wake", MESSAGE_TIMEOUT_S)
        self._events = dataclasses.replace(self._events, wakes=self._events.wakes + 1)

    def state_dict(self) -> dict[str, Any]:
        """Versions; the weights themselves are pushed again on resume."""
        return {"policy_version": self._policy_version, "drafter_version": self._drafter_version}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is loaded yet after a resume, whatever the versions were: pushes follow."""
        self._policy_version = self._drafter_version = -1

    def close(self) -> None:
        """End SGLang's processes; safe to call twice."""
        if self._running is not None:
            process = self._running.process
            self._running = None
            process.end()
            if self._log_dir is None and not process.has_failed:
                process.discard_log()
        self._policy_version = self._drafter_version = -1

    def _started(self) -> _Running:
        if self._running is None:
            raise ValueError("the engine is not started: call start(model_path) first")
        return self._running

    def _strategies_to_run(self) -> tuple[DraftStrategy, ...]:
        wanted = checked_strategies(self.strategy_selector, self.drafter_path)
        is_fixed = isinstance(self.strategy_selector, FixedStrategy)
        return (OFF,) if self._is_drafter_rejected and is_fixed else wanted

    def _restarted(self, model_path: str) -> _Running:
        self.close()
        self.start(model_path)
        return self._started()

    @staticmethod
    def _without_tied(
        running: _Running, named_tensors: Iterable[tuple[str, Tensor]]
    ) -> Iterable[tuple[str, Tensor]]:
        if not running.config.tie_word_embeddings:
            return named_tensors
        return (one for one in named_tensors if one[0] != "lm_head.weight")

    def _judge_anew(self, name: str, weights: Iterable[tuple[str, Tensor]]) -> None:
        self._health.start(name, weights)
        self._note_failure()

    def _note_failure(self) -> None:
        """Name a drafter just found bad; whether it goes on drafting is the caller's decision."""
        if self._health.failure is not None:
            self._failures.append(self._health.failure)
            warnings.warn(self._health.failure, stacklevel=3)

    def _all_server_args(
        self, model_path: str, strategies: tuple[DraftStrategy, ...], pool: StrategyPool | None
    ) -> dict[str, Any]:
        ours = (
            self._server_args
            | {"model_path": model_path}
            | place_arguments(self._device)
            | speculation_arguments(strategies, pool, self.drafter_path)
            | graph_arguments(pool, self._device, self._max_batch_size)
        )
        check_not_ours(self._further_args, ours)
        return ours | self._further_args

    def _publisher(
        self, process: SharedProcess, role: Role, skeleton: Mapping[str, Tensor]
    ) -> WeightPublisher:
        return WeightPublisher(
            process,
            role,
            skeleton,
            dtype=getattr(torch, self._dtype),
            device=self._device,
            bucket_mib=self._bucket_mib,
            num_readers=self._tp_size // process.ranks.size,
        )

    def _new_log(self) -> Path:
        if self._log_dir is not None:
            Path(self._log_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            prefix="sglang-", suffix=".log", dir=self._log_dir, delete=False
        ) as log:
            return Path(log.name)

    # -- generation -------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        *,
        num_samples: int = 1,
        seed: int = 0,
        rl_step: int = 0,
        return_hidden_states: bool = False,
    ) -> list[Rollout]:
        """`num_samples` responses a prompt, prompt-major; see `RolloutEngine.generate`.

        Raises:
            ValueError: before `start` or `load_policy`, for a prompt that is empty or leaves no
                room for a response, or for what stock SGLang cannot sample exactly.
            EngineError: SGLang died, or took longer than generate_timeout_s; it must be started
                anew.
        """
        started = perf_counter()
        running = self._started()
        samples = [(prompt, sample) for prompt in prompts for sample in range(num_samples)]
        max_sequence = longest_sequence(running.config.max_position_embeddings, running.strategies)

        def own_requests() -> list[GenerateRequest]:
            self._check_ready(running, sampling, return_hidden_states)
            for prompt in prompts:
                check_prompt(
                    prompt,
                    max_sequence=max_sequence,
                    pool_tokens=running.engine.pool_tokens,
                    max_tokens=sampling.max_tokens,
                )
            return [
                GenerateRequest(
                    prompt=prompt.tokens,
                    sampling=sglang_sampling(
                        sampling,
                        num_prompt_tokens=len(prompt.tokens),
                        max_sequence=max_sequence,
                        eos_token_ids=running.eos_token_ids,
                        key=request_key(seed, rl_step, prompt.prompt_id, sample),
                    ),
                )
                for prompt, sample in samples
            ]

        asked = running.process.gather_requests(
            own_requests,
            {
                "num_top_logprobs": num_top_logprobs(sampling, running.config.vocab_size),
                "return_hidden_states": return_hidden_states,
            },
        )
        selector = None
        if running.pool is not None:
            selector = self.strategy_selector
            if self._is_drafter_rejected or self._health.failure is not None:
                selector.exclude(running.pool.trees)  # whichever selector is set by now
            if asked.requests:
                self._answer_cost_queries(running, asked, sampling, max_sequence)
        with without_journal(self.strategy_selector):
            responses = running.process.generate(asked, self._generate_timeout_s, selector)

        def own_rollouts() -> list[Rollout]:
            if responses.report is not None:
                take_back(self.strategy_selector, responses.report)
            return [
                as_rollout(
                    raw,
                    prompt,
                    sample,
                    sampling=sampling,
                    text=str(running.tokenizer.decode(list(raw.tokens), skip_special_tokens=True)),
                    policy_version=self._policy_version,
                )
                for raw, (prompt, sample) in zip(responses.raws, samples, strict=True)
            ]

        rollouts = running.process.ranks.agree(own_rollouts)
        num_prompt_tokens = sum(len(prompt.tokens) for prompt, _ in samples)
        if responses.report is not None:
            self._stats = counted_statistics(
                responses.report.stats,
                responses.raws,
                num_prompt_tokens=num_prompt_tokens,
                seconds=perf_counter() - started,
            )
        else:
            self._stats = statistics(
                responses.raws,
                responses.steps_by_num_accepted,
                running.strategies[0],
                num_prompt_tokens=num_prompt_tokens,
                seconds=perf_counter() - started,
            )
        self._look_at_drafts(self._stats)
        self._stats = dataclasses.replace(self._stats, drafter_failures=tuple(self._failures))
        self._failures.clear()
        if self.on_idle is not None and self.others_generate():
            self.on_idle(IdleWindow(should_stop=lambda: not self.others_generate()))
        return rollouts

    def _answer_cost_queries(
        self,
        running: _Running,
        asked: SharedRequests,
        sampling: SamplingParams,
        max_sequence: int,
    ) -> None:
        answer_cost_queries(
            running.process,
            self._generate_timeout_s,
            self.strategy_selector,
            max_batch_size=self._max_batch_size,
            max_context=asked.longest,
            max_sequence=max_sequence,
            pool_tokens=running.engine.pool_tokens,
            vocab_size=running.config.vocab_size,
            sampling=sampling,
        )

    def probe(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, *, seed: int = 0
    ) -> list[Rollout]:
        """One response a prompt, for a check; see `RolloutEngine.probe`."""
        stats, on_idle, selector = self._stats, self.on_idle, self.strategy_selector
        self.on_idle = None
        if self._started().pool is not None:
            self.strategy_selector = FixedStrategy("off")  # a bandit learns nothing from a check
        try:
            rollouts = self.generate(prompts, sampling, seed=seed)
            self._failures.extend(self._stats.drafter_failures)  # for the next `generate` to tell
        finally:
            self._stats, self.on_idle, self.strategy_selector = stats, on_idle, selector
        return rollouts

    def _look_at_drafts(self, stats: EngineStats) -> None:
        if self._health.failure is None and stats.offered_by_depth:
            self._health.record_rows(stats.offered_by_depth[0], stats.accepted_by_depth[0])
            self._note_failure()

    def _check_ready(
        self, running: _Running, sampling: SamplingParams, return_hidden_states: bool
    ) -> None:
        if not running.has_policy:
            raise ValueError("the engine has no weights: call load_policy before generate")
        if not running.has_drafter:
            raise ValueError(
                "the engine's drafter is not whole, since it slept or a publication failed: call "
                "load_drafter before generate"
            )
        if running.pool is not None:
            check_in_pool(self.strategy_selector, running.strategies)
        elif (strategies := self._strategies_to_run()) != running.strategies:
            raise ValueError(
                f"the engine runs strategy {running.strategies[0]}, which stock SGLang cannot "
                f"change to {strategies[0]} after its start: close the engine, and start it anew"
            )
        if return_hidden_states and not self._hidden_states:
            raise ValueError(
                "generate: SGLang was not started for hidden states; set engine.hidden_states: true"
            )
        check_sampling(sampling)


def _nobody() -> bool:
    return False
