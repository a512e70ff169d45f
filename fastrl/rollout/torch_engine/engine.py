"""The embedded rollout engine: continuous batching with lossless tree speculation, in this process.

This file is its life cycle: what it is made of, weights in, memory out. How it generates is told in
generation.py. Leaves out distribution over ranks: each rank has an engine of its own.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fastrl.rollout.bandit import FixedStrategy
from fastrl.rollout.drafter_health import DrafterHealth, WatchedSelector
from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.drafters.loading import load_drafter
from fastrl.rollout.drafters.response_store import ResponseStore
from fastrl.rollout.end_of_sequence import eos_token_ids
from fastrl.rollout.engine import StrategySelector, WeightEvents
from fastrl.rollout.sampling import request_key
from fastrl.rollout.torch_engine.drafting import EagleDrafting
from fastrl.rollout.torch_engine.generation import Generation
from fastrl.rollout.torch_engine.kv_cache import KVCache
from fastrl.rollout.torch_engine.ngram_drafting import NgramDrafting
from fastrl.rollout.torch_engine.profiling import cut_to, step_seconds
from fastrl.rollout.torch_engine.requests import EndOfResponse
from fastrl.rollout.torch_engine.rows import Request
from fastrl.rollout.torch_engine.target import TargetModel
from fastrl.rollout.weight_differences import Comparison, WeightDifference
from fastrl.rollout.weights import check_fits
from fastrl.types import DraftStrategy, EngineStats, Prompt, Rollout, SamplingParams, StepStats


@dataclass(kw_only=True, slots=True)
class _Loaded:
    """What exists between `start` and `close`."""

    target: TargetModel
    cache: KVCache
    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: tuple[int, ...]
    drafter: EagleDrafter | None
    drafting: EagleDrafting | None

    def with_rows(self, num_rows: int) -> _Loaded:
        """The same weights, and caches of their own for so many rows."""
        drafting = None if self.drafting is None else self.drafting.with_rows(num_rows)
        return dataclasses.replace(self, cache=self.target.new_cache(num_rows), drafting=drafting)


class TorchEngine:
    """Rollouts from transformers' own modules, on a CPU or one GPU.

    Args:
        drafter_path: Folder of the EAGLE drafter to speculate with; null: only n-gram strategies
            can.
        strategy: Draft tree of every step, as depth_topk_verifytokens ('4_2_8'; with 'ngram_'
            before it, drafted from earlier text) or 'off'; a StrategyAdaptation callback replaces
            it by a bandit.
        max_batch_size: Most rollouts decoded at once; others wait in a queue.
        dtype: Numbers to compute in; the policy's own weights are shared if they have it, but for
            bfloat16 on a CPU.
        device: Where to compute: 'cpu', 'cuda', 'cuda:1', or 'auto' for a GPU if there is one.
    """

    def __init__(
        self,
        drafter_path: str | None = None,
        strategy: str = "off",
        max_batch_size: int = 64,
        dtype: Literal["float32", "bfloat16"] = "float32",
        device: str = "auto",
    ) -> None:
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size must be >= 1, got {max_batch_size}")
        self.drafter_path = drafter_path
        self.strategy_selector: StrategySelector = FixedStrategy(strategy)
        self._max_batch_size = max_batch_size
        self._dtype = getattr(torch, dtype)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._device = torch.device(device)
        self._policy_version = -1
        self._drafter_version = -1
        self._stats = EngineStats()
        self._known_strategies: set[DraftStrategy] = set()
        self._responses = ResponseStore()
        self._health = DrafterHealth()
        self._failures: list[str] = []  # since the last `generate` ended
        self._events = WeightEvents()
        self._loaded: _Loaded | None = None

    # -- life cycle -------------------------------------------------------------------------------

    def start(self, model_path: str) -> None:
        """Build the model's skeleton, load tokenizer and drafter; weights come by `load_policy`."""
        target = TargetModel(model_path, dtype=self._dtype, device=self._device)
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        drafter = drafting = None
        if self.drafter_path is not None:
            drafter = load_drafter(self.drafter_path, target.config)
            target.read_layers(drafter.feature_layers)
            drafter.to(self._device, self._dtype).requires_grad_(False).eval()
            drafting = EagleDrafting(drafter, target, self._max_batch_size)
        self._loaded = _Loaded(
            target=target,
            cache=target.new_cache(self._max_batch_size),
            tokenizer=tokenizer,
            eos_token_ids=eos_token_ids(model_path, target.config, tokenizer),
            drafter=drafter,
            drafting=drafting,
        )
        self._events = dataclasses.replace(self._events, wakes=self._events.wakes + 1)
        for strategy in self.strategy_selector.strategies:
            self._check_strategy(strategy)
        if drafter is not None:
            self._health.start(f"drafter of {self.drafter_path}", drafter.named_weights())
            self._note_failure()

    @property
    def policy_version(self) -> int:
        """Version of the weights it samples from; -1 before the first `load_policy`."""
        return self._policy_version

    @property
    def drafter_version(self) -> int:
        """Version of the drafter; -1 for the one loaded from drafter_path."""
        return self._drafter_version

    def load_policy(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take the policy's weights; those of our dtype and device are shared, not copied, but for
        bfloat16 on a CPU (target.py)."""
        loaded = self._started()
        loaded.target.load(named_tensors)
        if loaded.drafting is not None:
            loaded.drafting.refresh_head()
        self._policy_version = version
        events = self._events
        self._events = dataclasses.replace(events, policy_loads=events.policy_loads + 1)

    def load_drafter(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take the drafter's trainable weights, by copy, and judge it anew."""
        loaded = self._started()
        drafter, drafting = loaded.drafter, loaded.drafting
        if drafter is None or drafting is None:
            raise ValueError("load_drafter: the engine has no drafter; set engine.drafter_path")
        drafter.load_weights(named_tensors, source=f"publication {version}")
        drafting.refresh()
        self._drafter_version = version
        events = self._events
        self._events = dataclasses.replace(events, drafter_loads=events.drafter_loads + 1)
        if self._health.failure is not None:
            drafting.drop_non_numbers()
            self.strategy_selector.exclude([])
        self._health.start(f"drafter version {version}", drafter.named_weights())
        self._note_failure()

    @property
    def weight_events(self) -> WeightEvents:
        """What has been done to its weights so far."""
        return self._events

    def compare_policy(self, named_tensors: Iterable[tuple[str, Tensor]]) -> list[WeightDifference]:
        """The policy's weights that differ from these; those that are shared cannot."""
        return self._started().target.compare(named_tensors)

    def compare_drafter(
        self, named_tensors: Iterable[tuple[str, Tensor]]
    ) -> list[WeightDifference]:
        """The drafter's weights that differ from these; none without a drafter."""
        loaded = self._started()
        if loaded.drafting is None or loaded.drafter is None:
            return []
        own, comparison = dict(loaded.drafting.named_weights()), Comparison()
        given = dict(loaded.drafter.own_weights(named_tensors))
        check_fits(given, own, what="drafter weights to compare")
        for name, tensor in given.items():
            comparison.compare(name, own[name], tensor)
        return comparison.differences()

    def probe(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, *, seed: int = 0
    ) -> list[Rollout]:
        """One response a prompt by plain decoding, for a check; see `RolloutEngine.probe`."""
        loaded = self._ready()
        generation = self._generation(
            loaded, FixedStrategy("off"), NgramDrafting(ResponseStore()), sampling
        )
        return generation.run(_requests(prompts, 1, seed, 0))

    def reject_drafter(self, reason: str) -> None:
        """Leave the learned drafter's strategies out until the next is published."""
        if self._health.failure is None:
            self._health.fail(reason)
            self._note_failure()

    def stats(self) -> EngineStats:
        """What the last `generate` did."""
        return self._stats

    def sleep(self) -> None:
        """Give back the caches' memory."""
        loaded = self._started()
        loaded.cache.release()
        if loaded.drafting is not None:
            loaded.drafting.release()

    def wake(self) -> None:
        """Caches grow again as they are needed; shared weights never left."""
        self._started()
        self._events = dataclasses.replace(self._events, wakes=self._events.wakes + 1)

    def state_dict(self) -> dict[str, Any]:
        """Versions, and the responses that n-grams are drafted from: up to a million tokens, as
        plain lists. The weights themselves are pushed again on resume."""
        return {
            "policy_version": self._policy_version,
            "drafter_version": self._drafter_version,
            "responses": self._responses.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is loaded yet after a resume, whatever the versions were: pushes follow."""
        self._policy_version = -1
        self._drafter_version = -1
        self._responses.load_state_dict(state["responses"])

    def close(self) -> None:
        """Free model, caches and responses."""
        self._loaded = None
        self._responses.clear()
        self._policy_version = self._drafter_version = -1

    def _started(self) -> _Loaded:
        if self._loaded is None:
            raise ValueError("the engine is not started: call start(model_path) first")
        return self._loaded

    def _ready(self) -> _Loaded:
        loaded = self._started()
        if not loaded.target.has_weights:
            raise ValueError("the engine has no weights: call load_policy before generate")
        return loaded

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
            ValueError: before `start` or `load_policy`, or for a prompt that is empty or leaves no
                room for a response.
        """
        started = perf_counter()
        loaded = self._ready()
        for prompt in prompts:
            _check_prompt(prompt, loaded.target.max_context)
        longest_prompt = max((len(prompt.tokens) for prompt in prompts), default=0)
        self._answer_cost_queries(loaded, longest_prompt + sampling.max_tokens, sampling)
        if self._health.failure is not None:  # whichever selector is set by now
            self._exclude_learned()
        generation = self._generation(
            loaded,
            WatchedSelector(self.strategy_selector, self._look_at_step),
            NgramDrafting(self._responses),
            sampling,
            return_hidden_states=return_hidden_states,
        )
        rollouts = generation.run(_requests(prompts, num_samples, seed, rl_step))
        self._remember(rollouts)
        self._check_drafts(loaded)
        stats = generation.statistics.result(perf_counter() - started)
        self._stats = dataclasses.replace(stats, drafter_failures=tuple(self._failures))
        self._failures.clear()
        return rollouts

    def _generation(
        self,
        loaded: _Loaded,
        selector: StrategySelector,
        ngram_drafting: NgramDrafting,
        sampling: SamplingParams,
        *,
        return_hidden_states: bool = False,
    ) -> Generation:
        return Generation(
            target=loaded.target,
            cache=loaded.cache,
            drafting=loaded.drafting,
            ngram_drafting=ngram_drafting,
            selector=selector,
            check_strategy=self._check_strategy,
            end=EndOfResponse(
                loaded.tokenizer, loaded.eos_token_ids, sampling, loaded.target.max_context
            ),
            sampling=sampling,
            policy_version=self._policy_version,
            return_hidden_states=return_hidden_states,
        )

    def _answer_cost_queries(
        self, loaded: _Loaded, max_context: int, sampling: SamplingParams
    ) -> None:
        """Time what the selector asks for; one that has been answered asks for nothing more."""
        model_context = loaded.target.max_context

        def run(
            selector: StrategySelector, prompt: Prompt, num_samples: int, sampling: SamplingParams
        ) -> None:
            requests = _requests([prompt], num_samples, seed=0, rl_step=0)
            # On random tokens n-grams find little: what their steps cost is what full trees cost.
            ngram_drafting = NgramDrafting(ResponseStore(), has_full_trees=True)
            # A long context takes memory for its own rows alone, and gives it back.
            scratch = loaded.with_rows(num_samples)
            self._generation(scratch, selector, ngram_drafting, sampling).run(requests)

        queries = self.strategy_selector.cost_queries(
            self._max_batch_size, min(max_context, model_context)
        )
        for asked in queries:
            query = cut_to(model_context, asked)
            seconds = step_seconds(
                query, vocab_size=loaded.target.config.vocab_size, sampling=sampling, run=run
            )
            self.strategy_selector.record_cost(query, seconds)

    def _check_strategy(self, strategy: DraftStrategy) -> None:
        if strategy in self._known_strategies:
            return
        loaded = self._started()
        if strategy.needs_learned_drafter and loaded.drafting is None:
            raise ValueError(
                f"strategy {strategy} needs a drafter, but engine.drafter_path is null; set it to "
                f"a drafter checkpoint, or use strategy 'ngram_{strategy}' or 'off'"
            )
        vocab_size = loaded.target.config.vocab_size
        if strategy.needs_learned_drafter and loaded.drafter is not None:
            vocab_size = loaded.drafter.num_drafted
        if strategy.topk > vocab_size:
            raise ValueError(
                f"strategy {strategy}: topk {strategy.topk} is larger than the vocabulary "
                f"({vocab_size}); lower it"
            )
        self._known_strategies.add(strategy)

    def _remember(self, rollouts: Sequence[Rollout]) -> None:
        """Keep the responses of each prompt, to draft from when it is asked again."""
        by_prompt: dict[int, list[Sequence[int]]] = {}
        for rollout in rollouts:
            by_prompt.setdefault(rollout.prompt.prompt_id, []).append(rollout.tokens)
        for prompt_id, responses in by_prompt.items():
            self._responses.put(prompt_id, responses)

    # -- the learned drafter's health -------------------------------------------------------------

    def _look_at_step(self, stats: StepStats) -> None:
        was_healthy = self._health.failure is None
        self._health.record(stats)
        if was_healthy:
            self._note_failure()

    def _check_drafts(self, loaded: _Loaded) -> None:
        """After a call, when waiting for the device costs nothing."""
        if self._health.failure is not None or loaded.drafting is None:
            return
        if not loaded.drafting.is_finite():
            self._health.fail("its drafts are not numbers")
            self._note_failure()

    def _note_failure(self) -> None:
        """Name a drafter just found bad, and speculate without it until the next is published."""
        if self._health.failure is not None:
            self._failures.append(self._health.failure)
            warnings.warn(
                f"{self._health.failure}. Its strategies are left out until the next drafter is "
                f"published; n-gram strategies, if the selector has any, or 'off' take their place",
                stacklevel=3,
            )
            self._exclude_learned()

    def _exclude_learned(self) -> None:
        selector = self.strategy_selector
        selector.exclude([one for one in selector.strategies if one.needs_learned_drafter])


def _requests(
    prompts: Sequence[Prompt], num_samples: int, seed: int, rl_step: int
) -> list[Request]:
    return [
        Request(
            prompt=prompt,
            sample_index=sample,
            place=number * num_samples + sample,
            key=request_key(seed, rl_step, prompt.prompt_id, sample),
        )
        for number, prompt in enumerate(prompts)
        for sample in range(num_samples)
    ]


def _check_prompt(prompt: Prompt, max_context: int) -> None:
    num_tokens = len(prompt.tokens)
    if not 0 < num_tokens < max_context:
        raise ValueError(
            f"prompt {prompt.prompt_id} has {num_tokens} tokens; expected 1 or more, fewer than "
            f"the model's context of {max_context}, so that a response fits: filter long prompts "
            f"(data.max_prompt_tokens)"
        )
