"""Rollout speed by batch size: off, each fixed strategy, n-gram, adaptive; and transformers' own.

All arms generate the same rollouts (same prompts, same seeds) in rounds, in an order shuffled anew
each round, so that a machine's moods meet all of them; each round's ratio to `off` is taken within
the round. Batches are kept full from a queue, as in a rollout; prefills count. Tokens of all engine
arms must be the same: in float32 a difference ends the run with an error, in bfloat16 rounding may
move a token, and differing rollouts are counted. The adaptive arm's bandit is one for all batch
sizes, as in a run, and keeps what it learnt; warm-up rounds are run but not counted. Each round
asks prompts of its own, so that n-gram arms find a prompt's other responses, and none of an earlier
time.

    python scripts/bench_rollout.py --model models/quickstart/policy \\
        --drafter models/quickstart/drafter --ckpt CKPT --json bench.json --plot bench.png

Leaves out training, and speed on several devices.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import bench_inputs
import jsonargparse
import torch
import yaml
from bench_inputs import print_machine
from rollout_figures import ADAPTIVE, OFF, Figure, draw_ratios, print_summary, ratio_and_spread
from torch import Tensor
from transformers import PreTrainedModel
from transformers_baselines import TRANSFORMERS_ARMS, TransformersArm

from fastrl.config_loader import load_yaml
from fastrl.datamodules.chat_template import load_tokenizer
from fastrl.rollout.bandit import FixedStrategy
from fastrl.rollout.engine import StrategySelector
from fastrl.rollout.model_bandit import ModelBased
from fastrl.rollout.torch_engine import TorchEngine
from fastrl.types import DraftStrategy, Prompt, SamplingParams

TINY_SUMS = {"min_terms": 2, "max_terms": 6, "min_digits": 1, "max_digits": 1}


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What to compare."""

    model: str
    """Folder of the target."""
    drafter: str | None = None
    """Folder of its EAGLE drafter; null: n-gram strategies only."""
    ckpt: str | None = None
    """Checkpoint of a run, whose policy and co-trained drafter take the folders' places."""
    arms: list[str] = field(
        default_factory=lambda: [
            OFF,
            *("2_1_3", "4_1_5", "6_1_7", "8_1_9", "6_2_12", "ngram_4_1_5", "ngram_8_1_9"),
            ADAPTIVE,
        ]
    )
    """`off`, strategies, `adaptive`, and `hf_generate`, `hf_continuous`, `hf_assisted`
    (transformers' generate, continuous batching, and prompt-lookup assisted generation)."""
    batch_sizes: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64, 128])
    """Live rollouts."""
    rounds: int = 5
    """Times that every arm generates the same rollouts."""
    warm_up_rounds: int = 1
    """Rounds before those."""
    rollouts_per_row: int = 4
    """Rollouts of a round, for each row of the batch; the queue that keeps it full."""
    min_rollouts: int = 16
    """Fewest rollouts of a round."""
    num_samples: int = 8
    """Responses to each prompt."""
    task: str = "chain_sum"
    """reasoning-gym task of the prompts."""
    task_config: dict[str, int] = field(default_factory=lambda: dict(TINY_SUMS))
    """Its configuration."""
    system_prompt: str | None = None
    """System message before each question."""
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(max_tokens=256))
    """How tokens are sampled; with ignore_eos all responses have max_tokens."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """To compute in."""
    device: str = "cpu"
    """Where."""
    num_threads: int = 0
    """Of PyTorch; 0: one for each core."""
    seed: int = 0
    """Of tokens, and of the order of arms."""
    json: Path | None = None
    """File for the figures: a list of {batch_size, arm, tokens_per_s, ratio_to_off, spread}."""
    plot: Path | None = None
    """File for a plot of the ratios."""

    def __post_init__(self) -> None:
        if OFF not in self.arms:
            raise ValueError(f"arms must hold {OFF!r}, what others are measured against")
        if self.rounds < 1 or self.rollouts_per_row < 1 or self.num_samples < 1:
            raise ValueError("rounds, rollouts_per_row and num_samples must be >= 1")


def fixed_strategies(bench: Bench) -> list[str]:
    """Those among the arms, which are also the adaptive one's."""
    others = (OFF, ADAPTIVE, *TRANSFORMERS_ARMS)
    return [arm for arm in bench.arms if arm not in others]


Responses = list[tuple[int, ...]]


class Arm(Protocol):
    """One way of generating."""

    def generate(self, prompts: Sequence[Prompt], num_samples: int, seed: int) -> Responses:
        """Response tokens, prompt-major."""
        ...

    @property
    def accept_length(self) -> float:
        """Of the last call."""
        ...


class EngineArm:
    """The engine under a selector."""

    def __init__(
        self, engine: TorchEngine, selector: StrategySelector, sampling: SamplingParams
    ) -> None:
        self._engine, self._selector, self._sampling = engine, selector, sampling
        self.accept_length = 1.0

    def generate(self, prompts: Sequence[Prompt], num_samples: int, seed: int) -> Responses:
        self._engine.strategy_selector = self._selector
        rollouts = self._engine.generate(
            prompts, self._sampling, num_samples=num_samples, seed=seed
        )
        self.accept_length = self._engine.stats().accept_length
        return [rollout.tokens for rollout in rollouts]


def load_weights(bench: Bench) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """The target, and the co-trained drafter's weights (none: those of its folder)."""
    dtype = getattr(torch, bench.dtype)
    return bench_inputs.load_weights(
        bench.model, bench.ckpt, bench.drafter, dtype=dtype, device=bench.device
    )


def load_prompts(bench: Bench) -> list[Prompt]:
    """As many held-out questions as the largest batch takes in all rounds."""
    return bench_inputs.load_questions(
        bench.model,
        task=bench.task,
        task_config=bench.task_config,
        system_prompt=bench.system_prompt,
        count=num_prompts_of_round(bench, max(bench.batch_sizes)) * num_rounds(bench),
    )


def num_rollouts(bench: Bench, batch_size: int) -> int:
    """Of a round."""
    return max(bench.min_rollouts, bench.rollouts_per_row * batch_size)


def num_prompts_of_round(bench: Bench, batch_size: int) -> int:
    """Each asked for `num_samples` responses."""
    return max(num_rollouts(bench, batch_size) // bench.num_samples, 1)


def num_rounds(bench: Bench) -> int:
    """Those of warming up included."""
    return bench.warm_up_rounds + bench.rounds


def make_arms(
    bench: Bench,
    batch_size: int,
    model: PreTrainedModel,
    drafter: dict[str, Tensor],
    bandit: StrategySelector | None,
) -> dict[str, Arm]:
    """All arms at a batch size, each with an engine of its own, which share weights."""
    arms: dict[str, Arm] = {}
    for name in bench.arms:
        if name in TRANSFORMERS_ARMS:
            if name != "hf_assisted" or batch_size == 1:
                tokenizer = load_tokenizer(bench.model)
                arms[name] = TransformersArm(name, model, tokenizer, bench.sampling, batch_size)
            continue
        selector = bandit if name == ADAPTIVE else FixedStrategy(name)
        assert selector is not None, "the adaptive arm has a bandit"
        engine = TorchEngine(
            drafter_path=bench.drafter,
            max_batch_size=batch_size,
            dtype=bench.dtype,
            device=bench.device,
        )
        engine.start(bench.model)
        engine.load_policy(model.named_parameters(), version=0)
        if drafter:
            engine.load_drafter(drafter.items(), version=1)
        arms[name] = EngineArm(engine, selector, bench.sampling)
    return arms


def measure(
    bench: Bench, batch_size: int, arms: dict[str, Arm], prompts: Sequence[Prompt]
) -> list[Figure]:
    """Rounds over all arms at one batch size; prints a line an arm.

    Each round asks prompts of its own, as the steps of a run's first epoch do: n-gram arms find
    what a prompt's other responses hold, and nothing from an earlier round.
    """
    rng = random.Random(f"{bench.seed}/{batch_size}")
    num_prompts = num_prompts_of_round(bench, batch_size)
    rates: dict[str, list[float]] = {name: [] for name in arms}
    num_different = dict.fromkeys(arms, 0)
    for round_ in range(num_rounds(bench)):
        asked = prompts[round_ * num_prompts : (round_ + 1) * num_prompts]
        responses: dict[str, Responses] = {}
        for name in rng.sample(list(arms), len(arms)):
            started = time.perf_counter()
            responses[name] = arms[name].generate(asked, bench.num_samples, bench.seed + round_)
            seconds = time.perf_counter() - started
            if round_ >= bench.warm_up_rounds:
                rates[name].append(sum(map(len, responses[name])) / seconds)
        for name in arms:
            if name not in TRANSFORMERS_ARMS:
                pairs = zip(responses[name], responses[OFF], strict=True)
                num_different[name] += sum(ours != its for ours, its in pairs)
    figures = [_figure(batch_size, name, rates[name], rates[OFF]) for name in arms]
    for figure in figures:
        low, high = figure.spread
        print(
            f"{batch_size:>5} {figure.arm:>14} {figure.tokens_per_s:>9.0f} "
            f"{figure.ratio_to_off:>7.2f} [{low:.2f}, {high:.2f}] "
            f"{arms[figure.arm].accept_length:>7.2f} {num_different[figure.arm]:>6}",
            flush=True,
        )
    if bench.dtype == "float32" and any(num_different.values()):
        sys.exit(f"batch {batch_size}: tokens differ from plain decoding's: {num_different}")
    return figures


def _figure(
    batch_size: int, arm: str, rates: Sequence[float], off_rates: Sequence[float]
) -> Figure:
    ratio, spread = ratio_and_spread(rates, off_rates)
    return Figure(
        batch_size=batch_size,
        arm=arm,
        tokens_per_s=statistics.median(rates),
        ratio_to_off=ratio,
        spread=spread,
    )


def draw(figures: Iterable[Figure], path: Path) -> None:
    """Ratios to off over batch size, a line an arm, quartiles as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    canvas, axes = pyplot.subplots(figsize=(8, 5))
    draw_ratios(axes, figures)
    canvas.tight_layout()
    canvas.savefig(path, dpi=120)
    pyplot.close(canvas)


def print_header() -> None:
    """Of the lines that `measure` prints."""
    header = ("batch", "arm", "tokens/s", "ratio", "[quartiles]", "accept", "differ")
    print("{:>5} {:>14} {:>9} {:>7} {:>12} {:>7} {:>6}".format(*header))


def run(bench: Bench) -> list[Figure]:
    """Measure everything, print, and write what was asked for."""
    torch.set_num_threads(bench.num_threads or len(os.sched_getaffinity(0)))
    model, drafter = load_weights(bench)
    prompts = load_prompts(bench)
    bandit = ModelBased(fixed_strategies(bench)) if ADAPTIVE in bench.arms else None
    if bench.drafter is None and any(
        DraftStrategy.parse(name).drafter == "learned" for name in fixed_strategies(bench)
    ):
        raise ValueError("strategies of a learned drafter need --drafter; leave them out of --arms")
    print_machine(bench.device, bench.dtype)
    print_header()
    figures: list[Figure] = []
    for batch_size in bench.batch_sizes:
        arms = make_arms(bench, batch_size, model, drafter, bandit)
        figures += measure(bench, batch_size, arms, prompts)
    if bandit is not None:
        print_summary(figures, [OFF, *fixed_strategies(bench)])
    if bench.json is not None:
        bench.json.write_text(json.dumps([asdict(figure) for figure in figures], indent=1) + "\n")
    if bench.plot is not None:
        draw(figures, bench.plot)
    return figures


def parse(args: list[str] | None = None) -> Bench:
    """The benchmark that the command line asks for."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    jsonargparse.set_loader("yaml", load_yaml, exceptions=(yaml.YAMLError,))
    bench: Bench = jsonargparse.auto_cli(Bench, args=args, as_positional=False)
    return bench


if __name__ == "__main__":
    run(parse())
