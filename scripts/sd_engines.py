"""Engines of bench_sd.py: which arms each can run, and one call of it, timed.

An arm is `off`, a strategy, `adaptive` (the project's bandit over all strategies among the arms),
and of SGLang alone:

- `stock_off`, `stock_4_2_8`, …: stock SGLang, which runs one strategy from start to end, in an
  engine of its own; the others share one in which FastRL's plugin switches;
- `sglang_adaptive`: SGLang's own adaptive speculation, likewise on its own. It knows chains only,
  and chooses among those of its default configuration.

Arms of one engine are interleaved, engines come one after the other. Only the decode steps of a
call are timed. TorchEngine tells how long its prefill took. SGLang does not, so there calls for
one token each come first: one fills its cache of prefixes, emptied before, the median time of the
others is what the prefill takes of the call that is timed. Leaves out the order of calls, and what
is made of them (bench_sd.py).
"""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from rollout_figures import ADAPTIVE, OFF
from torch import Tensor
from torch.profiler import profile

from fastrl.rollout.bandit import FixedStrategy
from fastrl.rollout.bandit_base import MAX_TREE_NODES
from fastrl.rollout.engine import StrategySelector
from fastrl.rollout.model_bandit import ModelBased
from fastrl.rollout.sglang_engine import SGLangEngine
from fastrl.rollout.torch_engine import TorchEngine
from fastrl.types import DraftStrategy, EngineStats, Prompt, Rollout, SamplingParams

STOCK, SGLANG_ADAPTIVE = "stock_", "sglang_adaptive"
_SGLANG_LARGEST_CHAIN = "7_1_8"
"""Of SGLang's default adaptive configuration, whose buffers are sized by what it starts with."""
_NUM_PREFILLS = 3
"""Timed alone before each call of SGLang; one that the machine held up must not count."""
_TRACED_TOKENS = 32
"""Of each response; a trace of more is slow to open."""
_SIMULATION = "SGLANG_SIMULATE_ACC_LEN"


@dataclass(frozen=True, kw_only=True)
class SGLangOptions:
    """Of SGLang's engines, besides what all engines have."""

    tp_size: int = 1
    """GPUs that share the model."""
    mem_fraction_static: float | None = None
    """Share of the device's memory for weights and cache; null: SGLang's default."""
    attention_backend: str | None = None
    """SGLang's attention kernels; null: its default."""
    deterministic: bool = False
    """Seed every token, as runs do by default; costs speed."""
    memory_saver: bool = False
    """Start SGLang so that it can give its memory back."""
    bucketed_graphs: bool = True
    """False: CUDA graphs of each strategy for all batch sizes, to compare their memory."""
    log_dir: str | None = None
    """Folder in which SGLang's logs are kept."""
    server_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of SGLang's ServerArgs."""

    def new_engine(
        self,
        *,
        drafter: str | None,
        max_batch_size: int,
        dtype: Literal["float32", "bfloat16"],
        device: str,
        selector: StrategySelector,
        further: Mapping[str, Any] | None = None,
    ) -> SGLangEngine:
        """Not started yet.

        Args:
            drafter: folder of an EAGLE drafter.
            max_batch_size: most rows decoded at once.
            dtype: to compute in.
            device: where.
            selector: of the strategies, which the engine is prepared for.
            further: arguments of ServerArgs that go before these.
        """
        engine = SGLangEngine(
            drafter_path=drafter,
            max_batch_size=max_batch_size,
            dtype=dtype,
            device=device,
            tp_size=self.tp_size,
            mem_fraction_static=self.mem_fraction_static,
            attention_backend=self.attention_backend,
            deterministic=self.deterministic,
            memory_saver=self.memory_saver,
            bucketed_graphs=self.bucketed_graphs,
            log_dir=self.log_dir,
            server_args={**self.server_args, **(further or {})},
        )
        engine.strategy_selector = selector
        return engine


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What the engines serve, and how."""

    folder: str
    """Of the target: configuration and tokenizer."""
    drafter: str | None
    """Folder of its EAGLE drafter."""
    weights: Callable[[], Iterable[tuple[str, Tensor]]]
    """The target's, by Hugging Face name, anew at each call."""
    drafter_weights: Mapping[str, Tensor]
    """In place of those of the drafter's folder; empty: those."""
    sampling: SamplingParams
    dtype: Literal["float32", "bfloat16"]
    device: str
    sglang: SGLangOptions
    has_weights: bool = True
    """Whether the folder holds weights that SGLang can load at its start."""
    simulated_accept_length: float | None = None
    """What SGLang is to pretend that every verification yields."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One call of an arm, its prefill left out."""

    tokens_per_s: float
    step_ms: float
    """Of a decode step over the live batch; a mean, while the batch shrinks in its end."""
    accept_length: float
    """Mean tokens of a row and speculative step; 1 without speculation."""


class Arm(Protocol):
    """One way of generating."""

    def run(self, prompts: Sequence[Prompt], num_samples: int, seed: int) -> Sample:
        """Generate `num_samples` responses a prompt, all at once."""
        ...

    def trace(self, prompts: Sequence[Prompt], num_samples: int, folder: Path) -> None:
        """Generate a few tokens of each, and write what took the time to a file in the folder."""
        ...


@dataclass(frozen=True, kw_only=True)
class Session:
    """Arms that exist at the same time, and the batch sizes they are run at."""

    arms: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    open: Callable[[], AbstractContextManager[Mapping[str, Arm]]]
    """Starts what they need, and ends it."""
    max_tree_nodes: float = math.inf
    """Arms whose trees have more over a batch are left out there."""

    def arms_at(self, batch_size: int) -> list[str]:
        """Those that are run at a batch size."""
        nodes = {arm: one.verify_tokens for arm in self.arms if (one := strategy_of(arm))}
        return [
            arm
            for arm in self.arms
            if nodes.get(arm, 1) == 1 or nodes[arm] * batch_size <= self.max_tree_nodes
        ]


def is_strategy(arm: str) -> bool:
    """Whether an arm is one of FastRL's own fixed strategies, other than `off`."""
    return arm not in (OFF, ADAPTIVE, SGLANG_ADAPTIVE) and not arm.startswith(STOCK)


def strategy_of(arm: str) -> DraftStrategy | None:
    """What an arm always runs; None for one that chooses. ValueError for a name that is no arm."""
    if arm in (ADAPTIVE, SGLANG_ADAPTIVE):
        return None
    return DraftStrategy.parse(arm.removeprefix(STOCK))


def sample_of(rollouts: Sequence[Rollout], stats: EngineStats, prefill_s: float) -> Sample:
    """From what an engine says of a call. A response's first token is the prefill's."""
    num_tokens = sum(sum(rollout.accept_lengths) for rollout in rollouts)
    seconds = stats.seconds - prefill_s
    if num_tokens == 0 or seconds <= 0:
        raise ValueError(
            f"a call decoded {num_tokens} tokens in {stats.seconds:.4f} s, of which its prefill "
            f"took {prefill_s:.4f} s: too little to time; raise sampling.max_tokens"
        )
    return Sample(
        tokens_per_s=num_tokens / seconds,
        step_ms=1000 * seconds / stats.num_steps,
        accept_length=stats.accept_length,
    )


# -- the embedded engine --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TorchArm:
    """An embedded engine under a selector."""

    engine: TorchEngine
    sampling: SamplingParams

    def run(self, prompts: Sequence[Prompt], num_samples: int, seed: int) -> Sample:
        """See `Arm.run`."""
        rollouts = self.engine.generate(prompts, self.sampling, num_samples=num_samples, seed=seed)
        stats = self.engine.stats()
        return sample_of(rollouts, stats, stats.prefill_seconds)

    def trace(self, prompts: Sequence[Prompt], num_samples: int, folder: Path) -> None:
        """See `Arm.trace`."""
        short = dataclasses.replace(self.sampling, max_tokens=_TRACED_TOKENS)
        with profile() as traced:
            self.engine.generate(prompts, short, num_samples=num_samples)
        traced.export_chrome_trace(str(folder / "trace.json.gz"))


def torch_sessions(
    subject: Subject, arms: Sequence[str], batch_sizes: Sequence[int]
) -> list[Session]:
    """One for each batch size, with an engine an arm: n-grams find no other arm's responses."""
    bandit = _bandit_over(arms) if ADAPTIVE in arms else None

    @contextmanager
    def engines(batch_size: int) -> Iterator[Mapping[str, Arm]]:
        with ExitStack() as started:
            opened: dict[str, Arm] = {}
            for arm in arms:
                engine = TorchEngine(
                    drafter_path=subject.drafter,
                    max_batch_size=batch_size,
                    dtype=subject.dtype,
                    device=subject.device,
                )
                if bandit is not None and arm == ADAPTIVE:
                    engine.strategy_selector = bandit
                else:
                    engine.strategy_selector = FixedStrategy(arm)
                started.callback(engine.close)
                engine.start(subject.folder)
                _publish(subject, engine)
                opened[arm] = TorchArm(engine=engine, sampling=subject.sampling)
            yield opened

    def session(batch_size: int) -> Session:
        return Session(
            arms=tuple(arms), batch_sizes=(batch_size,), open=lambda: engines(batch_size)
        )

    return [session(batch_size) for batch_size in batch_sizes]


# -- SGLang ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SGLangArm:
    """A SGLang engine, under a selector where it can switch."""

    engine: SGLangEngine
    sampling: SamplingParams
    selector: StrategySelector | None = None
    """None: the engine's own."""

    def run(self, prompts: Sequence[Prompt], num_samples: int, seed: int) -> Sample:
        """See `Arm.run`."""
        # A full cache has old prefixes to evict, of which a run, whose weights change, has none.
        self.engine.flush_cache()
        first_token = dataclasses.replace(self.sampling, max_tokens=1)
        if self.selector is not None:
            # A bandit would have steps timed for as short a response as its first call asks for.
            self.engine.strategy_selector = FixedStrategy(OFF)
        prefills_s = []
        for _ in range(1 + _NUM_PREFILLS):
            self.engine.generate(prompts, first_token, num_samples=num_samples, seed=seed)
            prefills_s.append(self.engine.stats().seconds)
        prefill_s = statistics.median(prefills_s[1:])
        if self.selector is not None:
            self.engine.strategy_selector = self.selector
        rollouts = self.engine.generate(prompts, self.sampling, num_samples=num_samples, seed=seed)
        return sample_of(rollouts, self.engine.stats(), prefill_s)

    def trace(self, prompts: Sequence[Prompt], num_samples: int, folder: Path) -> None:
        """See `Arm.trace`."""
        if self.selector is not None:
            self.engine.strategy_selector = self.selector
        short = dataclasses.replace(self.sampling, max_tokens=_TRACED_TOKENS)
        with self.engine.profiled(str(folder)):
            self.engine.generate(prompts, short, num_samples=num_samples)


def sglang_sessions(
    subject: Subject, arms: Sequence[str], batch_sizes: Sequence[int]
) -> list[Session]:
    """One for each stock arm, and one for all others together."""
    sizes = tuple(batch_sizes)
    own = [arm for arm in arms if arm == SGLANG_ADAPTIVE or arm.startswith(STOCK)]
    sessions = [
        Session(arms=(arm,), batch_sizes=sizes, open=_stock_engine(subject, arm, max(sizes)))
        for arm in own
    ]
    if switched := tuple(arm for arm in arms if arm not in own):
        opener = _switching_engine(subject, switched, max(sizes))
        sessions.append(
            # The bandit chooses none beyond, so the engine prepares no CUDA graphs for them.
            Session(arms=switched, batch_sizes=sizes, open=opener, max_tree_nodes=MAX_TREE_NODES)
        )
    return sessions


def _stock_engine(
    subject: Subject, arm: str, max_batch_size: int
) -> Callable[[], AbstractContextManager[Mapping[str, Arm]]]:
    @contextmanager
    def started() -> Iterator[Mapping[str, Arm]]:
        further: dict[str, Any] = {}
        strategy = arm.removeprefix(STOCK)
        if arm == SGLANG_ADAPTIVE:
            strategy, further = _SGLANG_LARGEST_CHAIN, {"speculative_adaptive": True}
        engine = _new_sglang(subject, max_batch_size, FixedStrategy(strategy), further)
        with _running(subject, engine):
            yield {arm: SGLangArm(engine=engine, sampling=subject.sampling)}

    return started


def _switching_engine(
    subject: Subject, arms: Sequence[str], max_batch_size: int
) -> Callable[[], AbstractContextManager[Mapping[str, Arm]]]:
    @contextmanager
    def started() -> Iterator[Mapping[str, Arm]]:
        # Its strategies are those that the engine is prepared for.
        pool = _bandit_over(arms) if any(map(is_strategy, arms)) else FixedStrategy(OFF)
        engine = _new_sglang(subject, max_batch_size, pool, {})
        with _running(subject, engine):
            _print_graph_memory(engine)
            yield {
                arm: SGLangArm(
                    engine=engine,
                    sampling=subject.sampling,
                    selector=pool if arm == ADAPTIVE else FixedStrategy(arm),
                )
                for arm in arms
            }

    return started


def _new_sglang(
    subject: Subject, max_batch_size: int, selector: StrategySelector, further: Mapping[str, Any]
) -> SGLangEngine:
    without_weights = {} if subject.has_weights else {"load_format": "dummy"}
    return subject.sglang.new_engine(
        drafter=subject.drafter,
        max_batch_size=max_batch_size,
        dtype=subject.dtype,
        device=subject.device,
        selector=selector,
        further={**without_weights, **further},
    )


def _print_graph_memory(engine: SGLangEngine) -> None:
    """What the strategies of an engine that can switch took of the device's memory."""
    gib = engine.graph_memory()
    if total := gib.pop("all", 0.0):
        parts = ", ".join(f"{name} {one:.2f}" for name, one in gib.items())
        print(f"CUDA graphs and their buffers: {total:.2f} GiB in all; as built: {parts}")


@contextmanager
def _running(subject: Subject, engine: SGLangEngine) -> Iterator[None]:
    try:
        with _simulating(subject.simulated_accept_length):
            engine.start(subject.folder)
        _publish(subject, engine)
        yield
    finally:
        engine.close()


@contextmanager
def _simulating(accept_length: float | None) -> Iterator[None]:
    """SGLang takes it from the environment in which it starts."""
    before = os.environ.pop(_SIMULATION, None)
    if accept_length is not None:
        os.environ[_SIMULATION] = str(accept_length)
    try:
        yield
    finally:
        os.environ.pop(_SIMULATION, None)
        if before is not None:
            os.environ[_SIMULATION] = before


# -------------------------------------------------------------------------------------------------


def _publish(subject: Subject, engine: TorchEngine | SGLangEngine) -> None:
    engine.load_policy(subject.weights(), version=0)
    can_draft = any(one.needs_learned_drafter for one in engine.strategy_selector.strategies)
    if subject.drafter_weights and can_draft:
        engine.load_drafter(subject.drafter_weights.items(), version=1)


def _bandit_over(arms: Sequence[str]) -> ModelBased:
    return ModelBased([arm for arm in arms if is_strategy(arm)])
