"""Speculative decoding by batch size: off, fixed strategies, SGLang's own adaptive mode, ours.

Over either engine. A batch is so many requests at once, all to the same length, so that they end
nearly together; every arm gets the same prompts and seeds, in rounds. Arms that an engine can
switch between are interleaved, in an order shuffled anew each round; stock SGLang runs one strategy
from start to end, so its arms have an engine each, one after the other, and the batch sizes of a
round are shuffled. What is timed is decode steps, prefills left out. Warm-up rounds are run but not
counted; the adaptive arm's bandit is one for all batch sizes, as in a run, and keeps what it
learnt.

    python scripts/bench_sd.py --engine sglang --model MODEL --drafter DRAFTER \\
        --batch_sizes '[1, 4, 16, 64, 256]' --json bench.json --plot bench.png

Step costs of a shape, without a checkpoint, as if every verification yielded 6.5 tokens:

    python scripts/bench_sd.py --engine sglang --model qwen2.5-7b --load_format dummy \\
        --simulate_accept_length 6.5

SGLang sizes buffers by the longest context: --sglang.server_args.context_length 4096 saves memory
where that is long.

--profile FOLDER traces a short call of each arm at each batch size, after all that is timed: for
https://ui.perfetto.dev, where a step's time goes.

`stock_off` is plain decoding by stock SGLang, what a user has without speculation: where it is
among the arms, all ratios are to it, else to `off`. It is an engine of its own, so such a ratio is
between the medians of two engines, its spread that of the one arm. The counterpart of the original
FastRL's bench_sd.sh. Leaves out training, and whether tokens are the same (bench_rollout.py).
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import random
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from bench_inputs import (
    load_questions,
    load_weights,
    print_machine,
    random_prompts,
    random_weights,
    write_shape,
)
from rollout_figures import ADAPTIVE, OFF, print_summary, ratio_and_spread
from sd_engines import (
    SGLANG_ADAPTIVE,
    STOCK,
    Arm,
    Sample,
    Session,
    SGLangOptions,
    Subject,
    is_strategy,
    sglang_sessions,
    strategy_of,
    torch_sessions,
)
from sd_figures import EngineFigure, draw, print_against_sglang, print_figures, print_step_costs
from torch import Tensor
from transformers import AutoConfig

from fastrl.model_files import resolve_model
from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.types import Prompt, SamplingParams

STOCK_OFF = STOCK + OFF
DEFAULT_ARMS = {
    "torch": [OFF, "2_1_3", "4_1_5", "4_2_8", "8_1_9", "8_4_16", ADAPTIVE],
    "sglang": [
        *(STOCK_OFF, SGLANG_ADAPTIVE, OFF),
        *("2_1_3", "4_1_5", "4_2_8", "8_1_9", "8_4_16", "8_4_32", ADAPTIVE),
    ],
}
_RANDOM_PROMPT_TOKENS = 128


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What to compare."""

    engine: Literal["torch", "sglang"]
    """Which one."""
    model: str
    """The target: its folder, or what else a `model_path` may be; with load_format dummy a folder
    with a config.json, or one of qwen2.5-7b and qwen2.5-32b."""
    drafter: str | None = None
    """Folder of its EAGLE drafter; null with load_format dummy: one with random weights."""
    draft_vocab_size: int | None = None
    """Of a drafter with random weights: tokens that it drafts; null: the target's."""
    ckpt: str | None = None
    """Checkpoint of a run, whose policy and co-trained drafter take the folders' places."""
    load_format: Literal["auto", "dummy"] = "auto"
    """dummy: random weights of the model's shape, to measure steps without a checkpoint."""
    simulate_accept_length: float | None = None
    """Have SGLang take every verification for one that yields so many tokens on average (1 and
    more, cut to what the draft tree can yield); responses are meaningless then."""
    arms: list[str] | None = None
    """`off`, strategies, `adaptive`; of SGLang also `stock_off`, `stock_4_2_8`, … and
    `sglang_adaptive`. null: one of each kind at least."""
    batch_sizes: list[int] = field(default_factory=lambda: [1, 4, 16, 64])
    """Requests at once: fewer than num_samples, or a multiple."""
    rounds: int = 5
    """Times that every arm generates the same rollouts."""
    warm_up_rounds: int = 1
    """Rounds before those."""
    num_samples: int = 8
    """Responses to each prompt, at most."""
    prompt_tokens: int | None = None
    """Length of random prompts; null: questions of the task, or, with load_format dummy, 128."""
    task: str = "chain_sum"
    """reasoning-gym task of the prompts."""
    task_config: dict[str, int] = field(default_factory=dict)
    """Its configuration."""
    system_prompt: str | None = None
    """System message before each question."""
    sampling: SamplingParams = field(
        default_factory=lambda: SamplingParams(max_tokens=256, ignore_eos=True)
    )
    """How tokens are sampled; without ignore_eos batches shrink as in a rollout."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """To compute in."""
    device: str = "auto"
    """Where: cpu, cuda, or auto for a GPU if there is one."""
    sglang: SGLangOptions = field(default_factory=SGLangOptions)
    """Options of SGLang's engines."""
    num_threads: int = 0
    """Of PyTorch; 0: one for each core."""
    seed: int = 0
    """Of tokens, and of the order of arms."""
    json: Path | None = None
    """File for the figures: a list of {engine, batch_size, arm, tokens_per_s, ratio_to_off, spread,
    accept_length, step_ms}."""
    plot: Path | None = None
    """File for a plot of tokens a second, and of the ratios."""
    profile: Path | None = None
    """Folder for traces, one folder in it for each arm and batch size."""

    def __post_init__(self) -> None:
        arms = arms_of(self)
        strategies = [strategy for arm in arms if (strategy := strategy_of(arm))]
        if baseline(arms) is None:
            raise ValueError(
                f"arms must hold {OFF!r}, or for SGLang {STOCK_OFF!r}, what others are measured "
                f"against; got {arms}"
            )
        if ADAPTIVE in arms and not any(map(is_strategy, arms)):
            raise ValueError(f"arm {ADAPTIVE!r} chooses among strategies; name some among the arms")
        if self.engine == "torch" and any(
            arm == SGLANG_ADAPTIVE or arm.startswith(STOCK) for arm in arms
        ):
            raise ValueError(
                f"arms {SGLANG_ADAPTIVE!r} and {STOCK}… are SGLang's; use --engine sglang"
            )
        if self.engine == "sglang" and any(one.drafter == "ngram" for one in strategies):
            raise ValueError("SGLang drafts no n-gram trees; leave them out, or use --engine torch")
        needs_drafter = SGLANG_ADAPTIVE in arms or any(
            one.needs_learned_drafter for one in strategies
        )
        if needs_drafter and self.drafter is None and self.load_format == "auto":
            raise ValueError("strategies of a learned drafter need --drafter; leave them out")
        if self.simulate_accept_length is not None:
            if self.engine == "torch":
                raise ValueError("simulate_accept_length is SGLang's; use --engine sglang")
            if self.simulate_accept_length < 1:
                raise ValueError(
                    f"simulate_accept_length must be >= 1 token, got {self.simulate_accept_length}"
                )
        if self.draft_vocab_size is not None and (
            self.load_format != "dummy" or self.drafter is not None
        ):
            raise ValueError(
                "draft_vocab_size is of a drafter with random weights, which load_format dummy "
                "without a drafter makes; scripts/trim_vocabulary.py trims one that there is"
            )
        if self.load_format == "dummy" and self.ckpt is not None:
            raise ValueError("load_format dummy takes no weights, but --ckpt names some; drop one")
        if self.rounds < 1 or self.warm_up_rounds < 1 or self.num_samples < 1:
            raise ValueError("rounds, warm_up_rounds and num_samples must be >= 1")
        for batch_size in self.batch_sizes:
            if batch_size < 1 or (batch_size > self.num_samples and batch_size % self.num_samples):
                raise ValueError(
                    f"batch size {batch_size} must be >= 1, and where it is above num_samples "
                    f"({self.num_samples}) a multiple of it"
                )


def arms_of(bench: Bench) -> list[str]:
    """Those given, or the engine's default."""
    return DEFAULT_ARMS[bench.engine] if bench.arms is None else bench.arms


def baseline(arms: Sequence[str]) -> str | None:
    """The arm that ratios are to."""
    return next((arm for arm in (STOCK_OFF, OFF) if arm in arms), None)


# -- what is run ----------------------------------------------------------------------------------


def prepare(bench: Bench, scratch: Path) -> Subject:
    """The model, its weights and its drafter; what has to be made is written to `scratch`."""
    dtype = getattr(torch, bench.dtype)
    device = bench.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    drafter_path = bench.drafter
    drafter_weights: dict[str, Tensor] = {}
    if bench.load_format == "dummy":
        folder = str(write_shape(bench.model, scratch / "model"))
        config = AutoConfig.from_pretrained(folder)
        if drafter_path is None:
            drafter_path = str(scratch / "drafter")
            drafter = EagleDrafter.for_target(config, seed=bench.seed)
            if bench.draft_vocab_size is not None:
                drafter.trim_vocabulary(range(bench.draft_vocab_size))
            drafter.save_pretrained(drafter_path)

        def weights() -> Iterable[tuple[str, Tensor]]:
            return random_weights(config, dtype=dtype, device=device, seed=bench.seed)
    else:
        folder = resolve_model(bench.model)
        # SGLang takes them from the host, bucket by bucket: its device holds them once.
        place = "cpu" if bench.engine == "sglang" else device
        model, drafter_weights = load_weights(
            folder, bench.ckpt, drafter_path, dtype=dtype, device=place
        )
        weights = model.named_parameters
    return Subject(
        folder=folder,
        drafter=drafter_path,
        weights=weights,
        drafter_weights=drafter_weights,
        sampling=bench.sampling,
        dtype=bench.dtype,
        device=device,
        sglang=bench.sglang,
        has_weights=bench.load_format == "auto",
        simulated_accept_length=bench.simulate_accept_length,
    )


def num_prompts(bench: Bench, batch_size: int) -> int:
    """Prompts of a call."""
    return max(batch_size // bench.num_samples, 1)


def load_prompts(bench: Bench, folder: str) -> list[Prompt]:
    """As many as the largest batch takes in all rounds."""
    count = num_prompts(bench, max(bench.batch_sizes)) * (bench.warm_up_rounds + bench.rounds)
    length = bench.prompt_tokens
    if length is None and bench.load_format == "dummy":
        length = _RANDOM_PROMPT_TOKENS
    if length is not None:
        return random_prompts(folder, length=length, count=count, seed=bench.seed)
    return load_questions(
        folder,
        task=bench.task,
        task_config=bench.task_config,
        system_prompt=bench.system_prompt,
        count=count,
    )


Samples = dict[tuple[str, int], list[Sample]]
"""By arm and batch size, one a round."""


def measure(bench: Bench, session: Session, prompts: Sequence[Prompt]) -> Samples:
    """All rounds of a session's arms; each asks prompts of its own."""
    samples: Samples = {
        (arm, size): [] for size in session.batch_sizes for arm in session.arms_at(size)
    }
    rng = random.Random(f"{bench.seed}/{session.arms}/{session.batch_sizes}")
    with session.open() as arms:
        for round_ in range(bench.warm_up_rounds + bench.rounds):
            for batch_size in rng.sample(session.batch_sizes, len(session.batch_sizes)):
                count = num_prompts(bench, batch_size)
                asked = prompts[round_ * count : (round_ + 1) * count]
                num_samples = min(batch_size, bench.num_samples)
                names = session.arms_at(batch_size)
                for name in rng.sample(names, len(names)):
                    sample = arms[name].run(asked, num_samples, bench.seed + round_)
                    if round_ >= bench.warm_up_rounds:
                        samples[name, batch_size].append(sample)
        if bench.profile is not None:
            _trace(bench, session, arms, prompts)
    return samples


def _trace(
    bench: Bench, session: Session, arms: Mapping[str, Arm], prompts: Sequence[Prompt]
) -> None:
    """A short call of each arm, the prompts' prefixes being cached by those before."""
    assert bench.profile is not None, "asked for by the caller"
    for batch_size in session.batch_sizes:
        asked = prompts[: num_prompts(bench, batch_size)]
        for name in session.arms_at(batch_size):
            folder = bench.profile / f"{name}_batch_{batch_size}"
            folder.mkdir(parents=True, exist_ok=True)
            arms[name].trace(asked, min(batch_size, bench.num_samples), folder)


# -- figures --------------------------------------------------------------------------------------


def make_figures(
    bench: Bench, samples: Mapping[tuple[str, int], Sequence[Sample]], sessions: Sequence[Session]
) -> list[EngineFigure]:
    """Medians and ratios, by batch size and in the order of the arms, of all measured so far."""
    off = baseline(arms_of(bench))
    assert off is not None, "Bench has checked it"
    session_of = {arm: session for session in sessions for arm in session.arms}
    figures = []
    for batch_size in bench.batch_sizes:
        for arm in arms_of(bench):
            if (arm, batch_size) not in samples or (off, batch_size) not in samples:
                continue
            rates = [sample.tokens_per_s for sample in samples[arm, batch_size]]
            off_rates = [sample.tokens_per_s for sample in samples[off, batch_size]]
            if session_of[arm] is not session_of[off]:
                off_rates = [statistics.median(off_rates)] * len(rates)
            ratio, spread = ratio_and_spread(rates, off_rates)
            figures.append(
                EngineFigure(
                    engine=bench.engine,
                    batch_size=batch_size,
                    arm=arm,
                    tokens_per_s=statistics.median(rates),
                    ratio_to_off=ratio,
                    spread=spread,
                    accept_length=_median(samples[arm, batch_size], lambda s: s.accept_length),
                    step_ms=_median(samples[arm, batch_size], lambda s: s.step_ms),
                )
            )
    return figures


def _median(samples: Sequence[Sample], value: Callable[[Sample], float]) -> float:
    return statistics.median(map(value, samples))


# -- all of it ------------------------------------------------------------------------------------


def run(bench: Bench) -> list[EngineFigure]:
    """Measure everything, print, and write what was asked for, after each session anew."""
    torch.set_num_threads(bench.num_threads or len(os.sched_getaffinity(0)))
    off = baseline(arms_of(bench))
    assert off is not None, "Bench has checked it"
    samples: Samples = {}
    figures: list[EngineFigure] = []
    with tempfile.TemporaryDirectory() as scratch:
        subject = prepare(bench, Path(scratch))
        prompts = load_prompts(bench, subject.folder)
        make_sessions = {"torch": torch_sessions, "sglang": sglang_sessions}[bench.engine]
        sessions = make_sessions(subject, arms_of(bench), bench.batch_sizes)
        sessions.sort(key=lambda session: off not in session.arms)
        print_machine(subject.device, bench.dtype)
        if bench.engine == "sglang":
            print(f"sglang {importlib.metadata.version('sglang')}")
        for session in sessions:
            samples |= measure(bench, session, prompts)
            figures = make_figures(bench, samples, sessions)
            print_figures(figure for figure in figures if _is_of(figure, session))
            write(bench, figures)
    print_step_costs(figures, off)
    if ADAPTIVE in arms_of(bench):
        print_summary(figures, [arm for arm in arms_of(bench) if strategy_of(arm) is not None])
    if {ADAPTIVE, SGLANG_ADAPTIVE} <= set(arms_of(bench)):
        print_against_sglang(figures)
    return figures


def _is_of(figure: EngineFigure, session: Session) -> bool:
    return figure.arm in session.arms and figure.batch_size in session.batch_sizes


def write(bench: Bench, figures: Sequence[EngineFigure]) -> None:
    """The files that were asked for."""
    if bench.json is not None:
        bench.json.write_text(json.dumps([asdict(figure) for figure in figures], indent=1) + "\n")
    if bench.plot is not None:
        draw(figures, bench.plot)


def parse(args: list[str] | None = None) -> Bench:
    """The benchmark that the command line asks for."""
    # An environment with SGLang alone can run a benchmark, if not from the command line.
    import jsonargparse
    import yaml

    from fastrl.config_loader import load_yaml

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    jsonargparse.set_loader("yaml", load_yaml, exceptions=(yaml.YAMLError,))
    bench: Bench = jsonargparse.auto_cli(Bench, args=args, as_positional=False)
    return bench


if __name__ == "__main__":
    run(parse())
