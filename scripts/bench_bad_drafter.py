"""What a drafter gone bad costs: random weights swapped in mid-run, and the good ones swapped back.

In each round a new bandit settles on the good drafter, and goes on from there through three phases
of the same rollouts: `good`; `bad`, the drafter's weights replaced by random ones of the same means
and deviations; `recovered`, the good ones back. Both swaps are made

- `silent`: in the middle of a rollout, in place. Neither engine nor bandit is ever told;
- `in_run`: likewise, but RL steps go by: after every call of the engine the bandit is told, as
  always in a run, that the policy has changed;
- `published`: between rollouts, as a new drafter version, of which both are told.

Plain decoding of the same rollouts is interleaved, and tokens must be the same in every phase: a
difference ends the run with an error. By bucket of live batch sizes, from the 21st decode step of a
phase there on, the bandit must be

- back: at 0.97 or more of plain decoding's tokens a second while the drafter is bad;
- recovered: at 0.97 or more of what it reached before, once the drafter is good again.

The engine's health check, which excludes a drafter with next to nothing accepted until the next
publication, is part of what is measured; so are steps that explore. Leaves out prefills, the
bandit's own time, and how figures come from steps (bad_drafter_figures.py).

    python scripts/bench_bad_drafter.py --ckpt CKPT --json bad_drafter.json
"""

from __future__ import annotations

import csv
import json
import os
import random
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import torch
import yaml
from bad_drafter_figures import (
    BAD,
    GOOD,
    PHASES,
    Figure,
    Round,
    figures,
    print_figure,
    print_header,
)
from bench_inputs import print_machine
from bench_rollout import (
    Bench,
    Responses,
    load_prompts,
    load_weights,
    num_prompts_of_round,
)
from torch import Tensor
from transformers import PreTrainedModel

from fastrl.config_loader import load_yaml
from fastrl.rollout.bandit import FixedStrategy
from fastrl.rollout.drafter_health import WatchedSelector
from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.engine import StrategySelector
from fastrl.rollout.model_bandit import ModelBased
from fastrl.rollout.torch_engine import TorchEngine
from fastrl.types import DraftStrategy, Prompt, SamplingParams, StepStats

Scenario = Literal["silent", "in_run", "published"]
Weights = dict[str, Tensor]

SWAP_STEP = 10
"""Decode steps of a rollout before a silent swap."""
KEEP = 0.5
"""What StrategyAdaptation by default tells the bandit to keep after the policy has changed."""
_SETTLING_SEED = 1_000_000
"""Apart from those of the rounds."""


@dataclass(frozen=True, kw_only=True)
class BadDrafterBench:
    """What to measure."""

    model: str = "models/quickstart/policy"
    """Folder of the target."""
    drafter: str = "models/quickstart/drafter"
    """Folder of its EAGLE drafter."""
    ckpt: str | None = None
    """Checkpoint of a run, whose policy and co-trained drafter take the folders' places."""
    scenarios: list[Scenario] = field(default_factory=lambda: ["silent", "in_run", "published"])
    """How the weights are swapped."""
    strategies: list[str] = field(
        default_factory=lambda: ["2_1_3", "4_1_5", "6_1_7", "8_1_9", "6_2_12"]
    )
    """The bandit's, besides `off`."""
    batch_sizes: list[int] = field(default_factory=lambda: [1, 4, 16, 64])
    """Of the engine: live rollouts, until its queue is empty and the batch shrinks."""
    rounds: int = 5
    """Times through all phases, with other random weights each time."""
    settle_calls: int = 4
    """Calls of the engine with the good drafter before a round, for a new bandit to settle."""
    phase_calls: int = 2
    """Calls of the engine in a phase."""
    rollouts_per_row: int = 4
    """Rollouts of a call, for each row of the batch; the queue that keeps it full."""
    min_rollouts: int = 16
    """Fewest rollouts of a call."""
    num_samples: int = 8
    """Responses to each prompt."""
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(max_tokens=256))
    """How tokens are sampled; with ignore_eos all responses have max_tokens."""
    device: str = "cpu"
    """Where."""
    num_threads: int = 0
    """Of PyTorch; 0: one for each core."""
    seed: int = 0
    """Of tokens, random weights, and the order of arms."""
    json: Path | None = None
    """File for the figures: a list, one for each scenario, batch size and bucket."""
    steps: Path | None = None
    """File for every decode step, as CSV."""

    def __post_init__(self) -> None:
        if min(self.rounds, self.settle_calls, self.phase_calls) < 1:
            raise ValueError(
                f"rounds, settle_calls and phase_calls must be >= 1, got {self.rounds}, "
                f"{self.settle_calls} and {self.phase_calls}"
            )
        for text in self.strategies:
            if not DraftStrategy.parse(text).needs_learned_drafter:
                raise ValueError(
                    f"strategies must be drafted by the learned drafter, whose weights are "
                    f"swapped, got {text!r}; leave it out ('off' is always an arm)"
                )


def workload(bench: BadDrafterBench) -> Bench:
    """The same rollouts in the rollout benchmark's terms."""
    return Bench(
        model=bench.model,
        drafter=bench.drafter,
        ckpt=bench.ckpt,
        batch_sizes=bench.batch_sizes,
        rollouts_per_row=bench.rollouts_per_row,
        min_rollouts=bench.min_rollouts,
        num_samples=bench.num_samples,
        sampling=bench.sampling,
        device=bench.device,
        num_threads=bench.num_threads,
        seed=bench.seed,
    )


# -- the engine ----------------------------------------------------------------------------------


class CorruptibleEngine(TorchEngine):
    """An engine whose drafter can change without anyone being told."""

    def overwrite_drafter(self, weights: Weights) -> None:
        """Replace the served weights in place: no version, no health check, no word to a bandit."""
        loaded = self._started()
        assert loaded.drafter is not None, "the benchmark's engine has a drafter"
        assert loaded.drafting is not None, "made along with the drafter"
        loaded.drafter.load_weights(weights.items(), source="a silent swap")
        loaded.drafting.refresh()


def make_engine(bench: BadDrafterBench, batch_size: int, model: PreTrainedModel) -> Any:
    """With the policy, and the drafter of its folder."""
    engine = CorruptibleEngine(
        drafter_path=bench.drafter, max_batch_size=batch_size, device=bench.device
    )
    engine.start(bench.model)
    engine.load_policy(model.named_parameters(), version=0)
    return engine


def random_weights(good: Weights, seed: int) -> Weights:
    """Normal ones, with the mean and the deviation of each tensor."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: weight.mean().cpu()
        + weight.std().cpu() * torch.randn(weight.shape, generator=generator)
        for name, weight in good.items()
    }


class Recorder(WatchedSelector):
    """A bandit in one round: what its steps did, by phase, and when it gave the drafter up.

    Args:
        bandit: that decides, and is told everything.
    """

    def __init__(self, bandit: ModelBased) -> None:
        super().__init__(bandit, self._keep)
        self.bandit = bandit
        self.phase = GOOD
        self.steps: dict[str, list[StepStats]] = {phase: [] for phase in PHASES}
        self.alarm_step: dict[str, int] = {}
        self.exclusion_step: dict[str, int] = {}
        self._num_alarms = bandit.num_alarms
        self._swap: tuple[CorruptibleEngine, Weights, str] | None = None
        self._steps_to_swap = 0

    def swap_silently(self, engine: CorruptibleEngine, weights: Weights, phase: str) -> None:
        """Begin a phase after the next `SWAP_STEP` steps, which count to the one before."""
        self._swap, self._steps_to_swap = (engine, weights, phase), SWAP_STEP

    def check_swapped(self) -> None:
        """Raises ValueError if the rollout was over before."""
        if self._swap is not None:
            raise ValueError(
                f"a rollout ended before its decode step {SWAP_STEP}, at which weights are "
                f"swapped; raise rollouts_per_row, min_rollouts or sampling.max_tokens"
            )

    def _keep(self, stats: StepStats) -> None:
        self.steps[self.phase].append(stats)

    def record(self, stats: StepStats) -> None:
        """Pass the step on, note an alarm that it raised, and swap if it is time."""
        super().record(stats)
        if self.bandit.num_alarms > self._num_alarms:
            self._num_alarms = self.bandit.num_alarms
            self.alarm_step.setdefault(self.phase, len(self.steps[self.phase]))
        if self._swap is not None:
            self._steps_to_swap -= 1
            if self._steps_to_swap == 0:
                engine, weights, self.phase = self._swap
                engine.overwrite_drafter(weights)
                self._swap = None

    def exclude(self, strategies: Collection[DraftStrategy]) -> None:
        """Pass on, and note the step that made the health check exclude the drafter."""
        super().exclude(strategies)
        if strategies:  # before the step is recorded
            self.exclusion_step.setdefault(self.phase, len(self.steps[self.phase]) + 1)


# -- rounds --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What all rounds at a batch size share."""

    bench: BadDrafterBench
    batch_size: int
    engine: CorruptibleEngine
    prompts: Sequence[Prompt]
    good: Weights
    """Of the drafter."""

    def generate(self, selector: StrategySelector, seed: int) -> Responses:
        """One call under a selector."""
        self.engine.strategy_selector = selector
        rollouts = self.engine.generate(
            self.prompts, self.bench.sampling, num_samples=self.bench.num_samples, seed=seed
        )
        return [rollout.tokens for rollout in rollouts]

    def settle(self, number: int) -> dict[str, Any]:
        """State of a new bandit once it knows step times and the good drafter."""
        bandit = ModelBased(self.bench.strategies, seed=number)
        self.engine.strategy_selector = bandit
        self.engine.load_drafter(self.good.items(), version=0)
        for call in range(self.bench.settle_calls):
            seed = _SETTLING_SEED + self.bench.seed + number * self.bench.settle_calls + call
            self.generate(bandit, seed)
        return bandit.state_dict()

    def play(self, settled: dict[str, Any], scenario: Scenario, number: int) -> Round:
        """A round from the settled bandit on; exits where tokens differ from plain decoding's."""
        rng = random.Random(f"{self.bench.seed}/{self.batch_size}/{scenario}/{number}")
        bandit = ModelBased(self.bench.strategies)
        bandit.load_state_dict(settled)
        bandit.reseed(number)
        recorder = Recorder(bandit)
        off_steps: dict[str, list[StepStats]] = {phase: [] for phase in PHASES}
        bad = random_weights(self.good, seed=rng.randrange(2**31))
        self.engine.strategy_selector = recorder
        self.engine.load_drafter(self.good.items(), version=0)
        for version, phase in enumerate(PHASES):
            if phase != GOOD:
                self._swap(recorder, bad if phase == BAD else self.good, version, scenario)
            off = WatchedSelector(FixedStrategy("off"), off_steps[phase].append)
            for call in range(self.bench.phase_calls):
                seed = self.bench.seed + number * self.bench.phase_calls + call  # in each phase
                arms: dict[str, StrategySelector] = {"off": off, "adaptive": recorder}
                order = rng.sample(list(arms), len(arms))
                responses = {arm: self.generate(arms[arm], seed) for arm in order}
                recorder.check_swapped()
                check_tokens(responses["adaptive"], responses["off"], f"{scenario}, {phase}")
                if scenario == "in_run":  # the policy changed, no drafter was published
                    bandit.discount(KEEP, drafter_changed=False)
        return Round(
            steps=recorder.steps,
            off_steps=off_steps,
            alarm_step=recorder.alarm_step.get(BAD),
            exclusion_step=recorder.exclusion_step.get(BAD),
        )

    def _swap(self, recorder: Recorder, weights: Weights, version: int, scenario: Scenario) -> None:
        """Begin the phase of this version, now or in the next rollout."""
        phase = PHASES[version]
        if scenario != "published":
            recorder.swap_silently(self.engine, weights, phase)
            return
        self.engine.strategy_selector = recorder  # to be told that the drafter may be tried again
        self.engine.load_drafter(weights.items(), version)
        recorder.bandit.discount(KEEP)
        recorder.phase = phase


def check_tokens(ours: Responses, off: Responses, where: str) -> None:
    """Exit unless speculation changed no token, whatever the drafter."""
    num_different = sum(one != other for one, other in zip(ours, off, strict=True))
    if num_different:
        sys.exit(f"{where}: {num_different} of {len(off)} rollouts differ from plain decoding's")


# -- output --------------------------------------------------------------------------------------

_STEP_COLUMNS = (
    *("swap", "engine", "round", "arm", "phase"),
    *("live_batch", "strategy", "tokens", "seconds"),
)


def write_steps(writer: Any, key: Sequence[object], round_: Round) -> None:
    """A line of CSV for each decode step, of the bandit and of plain decoding."""
    for arm, by_phase in {"adaptive": round_.steps, "off": round_.off_steps}.items():
        for phase, steps in by_phase.items():
            for step in steps:
                cells = step.batch_size, step.strategy, step.num_tokens, f"{step.seconds:.6f}"
                writer.writerow((*key, arm, phase, *cells))


def run(bench: BadDrafterBench) -> list[Figure]:
    """Measure everything, print, and write what was asked for."""
    torch.set_num_threads(bench.num_threads or len(os.sched_getaffinity(0)))
    rollouts = workload(bench)
    model, good = load_weights(rollouts)
    good = good or dict(EagleDrafter.from_pretrained(bench.drafter).named_weights())
    good = {name: weight.detach() for name, weight in good.items()}
    prompts = load_prompts(rollouts)
    print_machine(rollouts.device, rollouts.dtype)
    print_header()
    found: list[Figure] = []
    log: list[tuple[tuple[object, ...], Round]] = []
    for batch_size in bench.batch_sizes:
        subject = Subject(
            bench=bench,
            engine=make_engine(bench, batch_size, model),
            batch_size=batch_size,
            prompts=prompts[: num_prompts_of_round(rollouts, batch_size)],
            good=good,
        )
        rounds: dict[Scenario, list[Round]] = {scenario: [] for scenario in bench.scenarios}
        for number in range(bench.rounds):
            settled = subject.settle(number)
            for scenario, played in rounds.items():
                played.append(subject.play(settled, scenario, number))
                log.append(((scenario, batch_size, number), played[-1]))
        for scenario, played in rounds.items():
            for figure in figures(scenario, batch_size, played, settled["batch_thresholds"]):
                print_figure(figure)
                found.append(figure)
    if bench.json is not None:
        bench.json.write_text(json.dumps([asdict(figure) for figure in found], indent=1) + "\n")
    if bench.steps is not None:
        with bench.steps.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(_STEP_COLUMNS)
            for key, round_ in log:
                write_steps(writer, key, round_)
    return found


def parse(args: list[str] | None = None) -> BadDrafterBench:
    """The benchmark that the command line asks for."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    jsonargparse.set_loader("yaml", load_yaml, exceptions=(yaml.YAMLError,))
    bench: BadDrafterBench = jsonargparse.auto_cli(BadDrafterBench, args=args, as_positional=False)
    return bench


if __name__ == "__main__":
    run(parse())
