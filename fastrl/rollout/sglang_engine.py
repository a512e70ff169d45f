"""The rollout engine for production: stock SGLang, in processes of its own.

This file keeps the contract `RolloutEngine`: what is asked of SGLang, and when. Its options are in
sglang_options.py, its start in sglang_running.py. How its processes are kept is told in
sglang_process.py, and in shared_process.py for ranks that share them; what runs in them in
sglang_host.py; how weights get there in sglang_served_weights.py and sglang_weights.py; and how
records are translated in sglang_calls.py and sglang_rollouts.py. With a selector that can choose (a
bandit, set before `start`) SGLang runs FastRL's plugin (sglang_plugin.py, sglang_worker.py), which
asks it before each decode step; sglang_adaptation.py brings it there and back.

Randomness is seeded by request, or without `deterministic` by call, and so reproducible as long as
the strategies (and the batches) are; but with speculation on SGLang draws other numbers than with
it off: the distribution is the same, the tokens are not.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from fastrl.rollout.bandit import FixedStrategy, InTurns
from fastrl.rollout.drafter_health import DrafterWatch
from fastrl.rollout.engine import StrategySelector, WeightEvents
from fastrl.rollout.engine_group import EngineGroup
from fastrl.rollout.sglang_adaptation import check_in_pool, generate_under, take_back
from fastrl.rollout.sglang_arguments import checked_strategies, strategy_pool
from fastrl.rollout.sglang_calls import GenerateCall
from fastrl.rollout.sglang_options import SGLangOptions
from fastrl.rollout.sglang_running import RunningEngine, StartRequest, start_engine
from fastrl.rollout.sglang_weights import MESSAGE_TIMEOUT_S, weight_checksums
from fastrl.rollout.shared_process import GenerateRequest, SharedProcess, SharedResponses
from fastrl.rollout.weight_differences import WeightDifference
from fastrl.types import OFF, DraftStrategy, EngineStats, Prompt, Rollout, SamplingParams


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
        deterministic: Seed every token, so that rollouts of one strategy repeat whatever the batch;
            costs speed (SGLang's batch-invariant kernels). Without it each `generate` call seeds
            SGLang's generators by all its requests, and its tokens repeat as far as its batches do:
            which requests a step finds in the queue is a matter of time. Under a bandit, whose
            choices rest on measured times, nothing repeats either way.
        hidden_states: Whether rollouts can be asked for hidden states; SGLang prepares for it at
            its start.
        memory_saver: Whether `sleep` can give memory back; needs the package torch-memory-saver.
        bucketed_graphs: Whether a bandit's strategies share CUDA graphs of equal shapes, and have
            them only for batch sizes in which each may be chosen; false: all for each, to compare.
        unread_gib: Device memory for hidden states of plain steps that the drafter has not read,
            in GiB: the more it holds, the less is read in vain. At least 32 tokens a row are kept;
            `sleep` does not give it back.
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
        bucketed_graphs: bool = True,
        unread_gib: float = 1.0,
        bucket_mib: int = 512,
        start_timeout_s: float = 600.0,
        generate_timeout_s: float = 3600.0,
        log_dir: str | None = None,
        server_args: Mapping[str, Any] | None = None,
    ) -> None:
        self.drafter_path = drafter_path
        self.strategy_selector: StrategySelector = FixedStrategy(strategy)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._options = SGLangOptions(
            max_batch_size=max_batch_size,
            dtype=dtype,
            device=torch.device(device),
            tp_size=tp_size,
            mem_fraction_static=mem_fraction_static,
            attention_backend=attention_backend,
            deterministic=deterministic,
            hidden_states=hidden_states,
            memory_saver=memory_saver,
            bucketed_graphs=bucketed_graphs,
            unread_gib=unread_gib,
            bucket_mib=bucket_mib,
            start_timeout_s=start_timeout_s,
            generate_timeout_s=generate_timeout_s,
            log_dir=log_dir,
            server_args=dict(server_args or {}),
        )
        self._stats = EngineStats()
        self._events = WeightEvents()
        self._drafter_watch = DrafterWatch()
        self._is_drafter_rejected = False
        self._num_probe_steps = 0
        self._is_asleep = False
        self._running: RunningEngine | None = None

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
        options = self._options
        group = EngineGroup.join(options.tp_size, timeout_s=options.group_timeout_s)
        self._start(model_path, group)

    def _start(self, model_path: str, group: EngineGroup) -> None:
        def request() -> StartRequest:
            return StartRequest(
                model_path=model_path,
                strategies=self._strategies_to_run(),
                pool=strategy_pool(
                    self.strategy_selector,
                    self._options.max_batch_size,
                    bucketed_graphs=self._options.bucketed_graphs,
                    unread_gib=self._options.unread_gib,
                ),
                drafter_path=self.drafter_path,
            )

        running = start_engine(request, self._options, group)
        self._running, self._is_asleep = running, False
        self._events = dataclasses.replace(self._events, wakes=self._events.wakes + 1)
        if running.drafter is not None:
            self._drafter_watch.start(
                f"drafter of {self.drafter_path}", running.drafter.named_weights()
            )

    @property
    def policy_version(self) -> int:
        """Version of the weights it samples from; -1 before the first `load_policy`."""
        return -1 if self._running is None else self._running.weights.policy_version

    @property
    def drafter_version(self) -> int:
        """Version of the drafter; -1 for the one loaded from drafter_path."""
        return -1 if self._running is None else self._running.weights.drafter_version

    def load_policy(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Send the policy's weights, bucket by bucket; the drafter's embedding and LM head follow.

        Raises ValueError naming missing, unknown and misshapen tensors: then the engine generates
        nothing until all are sent; and while it sleeps.
        """
        self._check_awake("load_policy")
        self._started().weights.publish_policy(named_tensors, version)
        events = self._events
        self._events = dataclasses.replace(events, policy_loads=events.policy_loads + 1)

    def load_drafter(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Send the drafter's trainable weights; an embedding or LM head among them is left out.

        After a drafter was rejected SGLang is started anew for it, and has no policy then.
        Raises ValueError as `load_policy` does, and where ranks that share the engine hold
        different drafters.
        """
        self._check_awake("load_drafter")
        running = self._started()
        if self._is_drafter_rejected:
            self._is_drafter_rejected = False
            if running.pool is None:
                running = self._restarted(running)
        if running.weights.drafter is None:
            raise ValueError(
                f"load_drafter: the engine has no drafter (engine.drafter_path "
                f"{self.drafter_path}, strategy {running.model.strategies[0]}); set "
                f"engine.drafter_path and a strategy that uses it, e.g. engine.strategy '4_2_8'"
            )
        assert running.drafter is not None, "its weights are published"
        weights = list(running.drafter.own_weights(named_tensors))
        running.weights.publish_drafter(weights, version)
        events = self._events
        self._events = dataclasses.replace(events, drafter_loads=events.drafter_loads + 1)
        self._drafter_watch.start(f"drafter version {version}", weights)
        if running.pool is not None:
            self.strategy_selector.exclude(())

    @property
    def process(self) -> SharedProcess | None:
        """SGLang's processes; None before `start`, and after they have ended."""
        if self._running is None or self._running.process.has_ended:
            return None
        return self._running.process

    def graph_memory(self) -> dict[str, float]:
        """GiB of the device's memory that each strategy's buffers and CUDA graphs took as they were
        built, and `all` of them; empty without FastRL's plugin, zeros on a CPU."""
        running = self._started()
        if running.pool is None:
            return {}
        gib: dict[str, float] = running.process.call("graph_memory", MESSAGE_TIMEOUT_S)
        return gib

    def flush_cache(self) -> None:
        """Forget the prefixes of past prompts and responses, as a publication does."""
        self._started().process.call("flush_cache", MESSAGE_TIMEOUT_S)

    @contextmanager
    def profiled(self, folder: str) -> Iterator[None]:
        """Have SGLang trace its schedulers meanwhile, by PyTorch's profiler: a file each, written
        to the folder in the end."""
        process = self._started().process
        process.call("start_profile", MESSAGE_TIMEOUT_S, folder=folder)
        try:
            yield
        finally:
            process.call("stop_profile", MESSAGE_TIMEOUT_S)

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
        return self._started().weights.compare_policy(named_tensors)

    def compare_drafter(
        self, named_tensors: Iterable[tuple[str, Tensor]]
    ) -> list[WeightDifference]:
        """The drafter's weights that differ from these; none where speculation is off."""
        return self._started().weights.compare_drafter(named_tensors)

    def reject_drafter(self, reason: str) -> None:
        """Speculate no more until the next drafter is published. Stock SGLang, which changes its
        strategy at no other time, is started anew for it: the policy must be published again."""
        running = self._started()
        if not any(strategy.needs_learned_drafter for strategy in running.model.strategies):
            return
        self._drafter_watch.fail(reason)
        if running.pool is not None:
            self._is_drafter_rejected = True
            return
        warnings.warn(
            f"{self._drafter_watch.failure}. SGLang is started anew without speculation, until the "
            f"next drafter is published",
            stacklevel=2,
        )
        self._is_drafter_rejected = True
        self._restarted(running)

    def stats(self) -> EngineStats:
        """What the last `generate` did, as far as SGLang tells (sglang_rollouts.statistics)."""
        return self._stats

    def sleep(self) -> None:
        """Give back the memory of cache, graphs and weights: publish policy and drafter after
        `wake`."""
        running = self._started()
        if not self._options.memory_saver:
            raise ValueError(
                "sleep: SGLang gives memory back only where it was started for that; set "
                "engine.memory_saver: true (needs the package torch-memory-saver)"
            )
        running.weights.lose()
        running.process.call("sleep", MESSAGE_TIMEOUT_S)
        self._is_asleep = True

    def wake(self) -> None:
        """Take the memory again; `generate` refuses until the weights are published."""
        self._started().process.call("wake", MESSAGE_TIMEOUT_S)
        self._is_asleep = False
        self._events = dataclasses.replace(self._events, wakes=self._events.wakes + 1)

    def state_dict(self) -> dict[str, Any]:
        """Versions; the weights themselves are pushed again on resume."""
        return {"policy_version": self.policy_version, "drafter_version": self.drafter_version}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is loaded yet after a resume, whatever the versions were: pushes follow."""
        if self._running is not None:
            self._running.weights.forget_versions()

    def close(self) -> None:
        """End SGLang's processes; safe to call twice."""
        if self._running is not None:
            process = self._running.process
            self._running = None
            process.end()
            if self._options.log_dir is None and not process.has_failed:
                process.discard_log()

    def _started(self) -> RunningEngine:
        if self._running is None:
            raise ValueError("the engine is not started: call start(model_path) first")
        return self._running

    def _check_awake(self, method: str) -> None:
        if self._is_asleep:
            raise ValueError(
                f"{method}: the engine sleeps, and has given the memory of its weights back; call "
                f"wake() first"
            )

    def _strategies_to_run(self) -> tuple[DraftStrategy, ...]:
        wanted = checked_strategies(self.strategy_selector, self.drafter_path)
        is_fixed = isinstance(self.strategy_selector, FixedStrategy)
        return (OFF,) if self._is_drafter_rejected and is_fixed else wanted

    def _restarted(self, running: RunningEngine) -> RunningEngine:
        """With the same ranks, under the strategies that are to run now."""
        self.close()
        self._start(running.model_path, running.process.ranks)
        return self._started()

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
                room for a response.
            EngineError: SGLang died, or took longer than generate_timeout_s; it must be started
                anew.
        """
        call = GenerateCall(
            prompts=prompts,
            sampling=sampling,
            num_samples=num_samples,
            seed=seed,
            rl_step=rl_step,
            return_hidden_states=return_hidden_states,
        )
        rollouts, stats = self._answer(call, self.strategy_selector)
        self._drafter_watch.look(stats)
        self._stats = dataclasses.replace(stats, drafter_failures=self._drafter_watch.take())
        return rollouts

    def _answer(
        self, call: GenerateCall, selector: StrategySelector
    ) -> tuple[list[Rollout], EngineStats]:
        """What the call asks for, under this selector, and what was done for it."""
        running, model = self._started(), self._started().model

        def requests() -> list[GenerateRequest]:
            self._check_ready(running, selector, call.return_hidden_states)
            return call.requests(model)

        def rollouts_of(responses: SharedResponses) -> list[Rollout]:
            if responses.report is not None:
                take_back(selector, responses.report)
            return call.rollouts(responses, model, self.policy_version)

        asked = running.process.gather_requests(
            requests, call.options(seeds_tokens=self._options.deterministic)
        )
        responses = generate_under(
            self._deciding(selector, running),
            asked,
            process=running.process,
            model=model,
            sampling=call.sampling,
            max_batch_size=self._options.max_batch_size,
            timeout_s=self._options.generate_timeout_s,
        )
        rollouts = running.process.ranks.agree("rollouts", lambda: rollouts_of(responses))
        return rollouts, call.statistics(responses, model)

    def _deciding(
        self, selector: StrategySelector, running: RunningEngine
    ) -> StrategySelector | None:
        """None for stock SGLang, which has one strategy. Without a sound drafter none of its
        strategies can be chosen, whichever selector is set by now."""
        if running.pool is None:
            return None
        if self._drafter_watch.failure is not None or self._is_drafter_rejected:
            if isinstance(selector, FixedStrategy):
                return FixedStrategy("off")
            selector.exclude(running.pool.trees)
        return selector

    def probe(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, *, seed: int = 0
    ) -> list[Rollout]:
        """One response a prompt, for a check; see `RolloutEngine.probe`.

        Of a pool all strategies take their turn, step by step, and from one probe to the next: what
        verifies drafts is checked as well as plain decoding.
        """
        selector, pool = self.strategy_selector, self._started().pool
        if pool is not None:
            names = [str(strategy) for strategy in pool.allowed(len(prompts))]
            start = self._num_probe_steps % len(names)
            selector = InTurns(names[start:] + names[:start])
        call = GenerateCall(prompts=prompts, sampling=sampling, seed=seed)
        rollouts, stats = self._answer(call, selector)
        self._num_probe_steps += stats.num_steps
        return rollouts

    def _check_ready(
        self, running: RunningEngine, selector: StrategySelector, return_hidden_states: bool
    ) -> None:
        running.weights.check_whole()
        strategies = running.model.strategies
        if running.pool is not None:
            check_in_pool(selector, strategies)
        elif (wanted := self._strategies_to_run()) != strategies:
            raise ValueError(
                f"the engine runs strategy {strategies[0]}, which stock SGLang cannot change to "
                f"{wanted[0]} after its start: close the engine, and start it anew"
            )
        if return_hidden_states and not self._options.hidden_states:
            raise ValueError(
                "generate: SGLang was not started for hidden states; set engine.hidden_states: true"
            )
