"""How good a drafter is: what is accepted of its drafts, and what that gains on this machine.

For a target, its drafter and prompts of one or several tasks:

- accept length by strategy, of all steps, by task and by place in the response;
- acceptance by depth, and by rank among a node's children, likewise by task and by place;
- top-k accuracy by depth: how often a response's token is among the drafter's k most likely, the
  drafter run along the true tokens (fastrl/rollout/drafters/token_ranks.py);
- tokens a second of each strategy against plain decoding, in rounds of shuffled order: decode
  steps alone, over responses of the lengths they have. `adaptive` is the project's bandit, which
  chooses among them at each step, and among n-gram trees if asked; it learns as it is timed.

    python scripts/eval_drafter.py --model models/quickstart/policy \\
        --drafter models/quickstart/drafter --tasks '[chain_sum, basic_arithmetic]' \\
        --json report.json --plot report.png

Acceptance and accuracy are of the same responses, each from the strategy's own rollouts; in float32
these are the same tokens whatever the strategy, and top-k accuracy takes the first strategy's. A
drafter that the embedded engine holds for bad is evaluated all the same, but not timed. SGLang,
one engine that switches between the strategies, tells no ranks. Leaves out training, what n-grams
accept, and what the bandit chooses (bench_rollout.py, bench_sd.py).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from acceptance_figures import PlaceCounts, depth_figures, length_figures, topk_figures
from acceptance_report import Report, draw, print_report, print_speed, write_json
from bench_inputs import load_questions, load_weights, print_machine
from bench_sd import Bench, make_figures
from drafter_runs import SESSIONS, Generated, generate, ranks_of, time_rounds
from rollout_figures import ADAPTIVE, OFF
from sd_engines import Sample, SGLangOptions, Subject
from sd_figures import EngineFigure
from transformers import PreTrainedModel

from fastrl.model_files import resolve_model
from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.drafters.loading import load_drafter
from fastrl.types import DraftStrategy, Prompt, SamplingParams

_MAX_PROMPT_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What to evaluate, and on what."""

    model: str
    """The target: its folder, or what else a `model_path` may be."""
    drafter: str
    """Folder of its EAGLE drafter."""
    ckpt: str | None = None
    """Checkpoint of a run, whose policy and co-trained drafter take the folders' places."""
    engine: Literal["torch", "sglang"] = "torch"
    """That generates."""
    tasks: list[str] = field(default_factory=lambda: ["chain_sum"])
    """reasoning-gym tasks of the prompts, held-out questions of each."""
    task_configs: dict[str, dict[str, int]] = field(default_factory=dict)
    """Their configurations by task, where not reasoning-gym's default."""
    jsonl: Path | None = None
    """JSON Lines file of prompts in place of the tasks; its name is that of the task."""
    prompt_key: str = "prompt"
    """Key of the question in each of its lines."""
    answer_key: str = "answer"
    """Key of the answer in each of its lines; not used here."""
    system_prompt: str | None = None
    """System message before each question."""
    num_prompts: int = 32
    """Of each task, or at most of the file."""
    num_samples: int = 2
    """Responses to each."""
    strategies: list[str] = field(default_factory=lambda: ["2_1_3", "4_2_8", "8_4_32"])
    """Draft trees of the drafter."""
    ngram_strategies: list[str] = field(default_factory=list)
    """Trees of n-grams, as ngram_8_1_9, that are timed as well; not with SGLang."""
    adaptive: bool = True
    """Whether the bandit over all of them is timed as well."""
    max_batch_size: int = 16
    """Most rollouts decoded at once where acceptance is counted."""
    max_depth: int = 8
    """Of top-k accuracy."""
    batch_sizes: list[int] = field(default_factory=lambda: [1, 4])
    """Most rollouts decoded at once where speed is measured; none: it is not."""
    responses_per_round: int = 8
    """That each strategy and `off` generate for the speed; at least a batch."""
    rounds: int = 5
    """Times that they do, all of them the same responses, other ones each time."""
    warm_up_rounds: int = 1
    """Rounds before those."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    """How tokens are sampled."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """To compute in."""
    device: str = "auto"
    """Where: cpu, cuda, or auto for a GPU if there is one."""
    sglang: SGLangOptions = field(default_factory=SGLangOptions)
    """Options of SGLang's engine."""
    num_threads: int = 0
    """Of PyTorch; 0: one for each core."""
    seed: int = 0
    """Of tokens, and of the order of strategies in a round."""
    json: Path | None = None
    """File for all figures and their counts."""
    plot: Path | None = None
    """File for a plot of them."""

    def __post_init__(self) -> None:
        if not self.strategies:
            raise ValueError("strategies must hold at least one draft tree, got none")
        for strategy in self.strategies:
            if not DraftStrategy.parse(strategy).needs_learned_drafter:
                raise ValueError(
                    f"strategies are draft trees of the drafter, as '4_2_8', got {strategy!r}; "
                    f"plain decoding is always measured; name n-gram trees in ngram_strategies"
                )
        for strategy in self.ngram_strategies:
            if DraftStrategy.parse(strategy).drafter != "ngram":
                raise ValueError(
                    f"ngram_strategies are written as 'ngram_8_1_9', got {strategy!r}; name trees "
                    f"of the drafter in strategies"
                )
        for name in (
            *("num_prompts", "num_samples", "max_batch_size", "max_depth"),
            "responses_per_round",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.jsonl is None and len(set(self.tasks)) != max(len(self.tasks), 1):
            raise ValueError(f"tasks must be at least one, each once, got {self.tasks}")
        if unknown := sorted(self.task_configs.keys() - set(self.tasks)):
            raise ValueError(f"task_configs are of {unknown}, which are not among the tasks")
        if self.batch_sizes:
            speed_bench(self)  # refuses what cannot be measured


def timed_arms(evaluation: Evaluation) -> list[str]:
    """What the speed is measured of."""
    adaptive = [ADAPTIVE] if evaluation.adaptive else []
    return [OFF, *evaluation.strategies, *evaluation.ngram_strategies, *adaptive]


def speed_bench(evaluation: Evaluation) -> Bench:
    """The benchmark of its arms, whose figures the speed is told in."""
    return Bench(
        engine=evaluation.engine,
        model=evaluation.model,
        drafter=evaluation.drafter,
        arms=timed_arms(evaluation),
        batch_sizes=evaluation.batch_sizes,
        rounds=evaluation.rounds,
        warm_up_rounds=evaluation.warm_up_rounds,
        seed=evaluation.seed,
        num_samples=1,
    )


# -- what is run ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Target and drafter."""

    model: PreTrainedModel
    drafter: EagleDrafter
    """With the weights that are evaluated."""
    subject: Subject
    """The same, for engines."""


def load_pair(evaluation: Evaluation) -> Pair:
    """Both, on their device."""
    device = evaluation.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, evaluation.dtype)
    folder = resolve_model(evaluation.model)
    # SGLang has the device's memory for itself.
    place = "cpu" if evaluation.engine == "sglang" else device
    model, drafter_weights = load_weights(
        folder, evaluation.ckpt, evaluation.drafter, dtype=dtype, device=place
    )
    drafter = load_drafter(evaluation.drafter, model.config)
    if drafter_weights:
        drafter.load_weights(drafter_weights.items(), source=f"checkpoint {evaluation.ckpt}")
    return Pair(
        model=model,
        drafter=drafter.to(place, dtype).eval(),
        subject=Subject(
            folder=folder,
            drafter=evaluation.drafter,
            weights=model.named_parameters,
            drafter_weights=drafter_weights,
            sampling=evaluation.sampling,
            dtype=evaluation.dtype,
            device=device,
            sglang=evaluation.sglang,
        ),
    )


def load_prompts(evaluation: Evaluation, folder: str) -> dict[str, list[Prompt]]:
    """By task; ids are numbers over all of them, for they are what tokens are drawn by."""
    by_task: dict[str, list[Prompt]] = {}
    if evaluation.jsonl is not None:
        by_task[evaluation.jsonl.stem] = _prompts_of_file(evaluation, evaluation.jsonl, folder)
    else:
        for task in evaluation.tasks:
            by_task[task] = load_questions(
                folder,
                task=task,
                task_config=evaluation.task_configs.get(task, {}),
                system_prompt=evaluation.system_prompt,
                count=evaluation.num_prompts,
            )
    ids = itertools.count()
    return {task: _numbered(prompts, ids) for task, prompts in by_task.items()}


def _prompts_of_file(evaluation: Evaluation, file: Path, folder: str) -> list[Prompt]:
    # An environment with SGLang alone can evaluate, if not from a file or the command line.
    from fastrl.datamodules import JsonlPrompts
    from fastrl.datamodules.chat_template import load_tokenizer, tokenize_questions

    source = JsonlPrompts(
        str(file),
        held_out_fraction=0,
        prompt_key=evaluation.prompt_key,
        answer_key=evaluation.answer_key,
    )
    return tokenize_questions(
        source.load().train[: evaluation.num_prompts],
        load_tokenizer(folder),
        system_prompt=evaluation.system_prompt,
        max_prompt_tokens=_MAX_PROMPT_TOKENS,
        split=str(file),
    )


def _numbered(prompts: Sequence[Prompt], ids: Iterator[int]) -> list[Prompt]:
    return [dataclasses.replace(prompt, prompt_id=next(ids)) for prompt in prompts]


def measure_speed(
    evaluation: Evaluation, pair: Pair, prompts: dict[str, list[Prompt]]
) -> list[EngineFigure]:
    """Each arm against `off`, on prompts of all tasks in turn; none where it is not asked."""
    if not evaluation.batch_sizes:
        return []
    mixed = [
        prompt
        for in_turn in itertools.zip_longest(*prompts.values())
        for prompt in in_turn
        if prompt is not None
    ]
    asked = _numbered_forever(mixed)
    samples: dict[tuple[str, int], list[Sample]] = {}
    sessions = SESSIONS[evaluation.engine](
        pair.subject, timed_arms(evaluation), evaluation.batch_sizes
    )
    for session in sessions:
        for batch_size in session.batch_sizes:
            num_responses = max(evaluation.responses_per_round, batch_size)
            timed = time_rounds(
                session,
                batch_size,
                asked,
                num_prompts=math.ceil(num_responses / evaluation.num_samples),
                num_rounds=evaluation.rounds,
                num_warm_up=evaluation.warm_up_rounds,
                num_samples=evaluation.num_samples,
                seed=evaluation.seed,
            )
            samples |= {(arm, batch_size): of_arm for arm, of_arm in timed.items()}
    return make_figures(speed_bench(evaluation), samples, sessions)


def _numbered_forever(prompts: Sequence[Prompt]) -> Iterator[Prompt]:
    """All in turn, again and again, each time with another id and so with other responses."""
    for number, prompt in enumerate(itertools.cycle(prompts)):
        yield dataclasses.replace(prompt, prompt_id=number)


# -- all of it ------------------------------------------------------------------------------------


def evaluate(evaluation: Evaluation) -> Report:
    """Generate, count, measure, print, and write what was asked for."""
    torch.set_num_threads(evaluation.num_threads or len(os.sched_getaffinity(0)))
    pair = load_pair(evaluation)
    prompts = load_prompts(evaluation, pair.subject.folder)
    print_machine(pair.subject.device, evaluation.dtype)
    (session,) = SESSIONS[evaluation.engine](
        pair.subject, evaluation.strategies, [evaluation.max_batch_size]
    )
    generated = generate(
        session,
        prompts,
        evaluation.sampling,
        num_samples=evaluation.num_samples,
        seed=evaluation.seed,
    )
    report = count(evaluation, pair, generated)
    print_report(report)
    write(evaluation, report)
    if report.failures:
        print(f"\nnot timed, for engines leave this drafter out: {report.failures[0]}")
    else:
        report.speed.extend(measure_speed(evaluation, pair, prompts))
        print_speed(report.speed)
        write(evaluation, report)
    return report


def count(evaluation: Evaluation, pair: Pair, generated: Mapping[str, Generated]) -> Report:
    """All but the speed."""
    every_stats = [stats for result in generated.values() for stats in result.stats.values()]
    report = Report(
        subject=_subject(evaluation),
        failures=[failure for stats in every_stats for failure in stats.drafter_failures],
    )
    for strategy, result in generated.items():
        report.lengths.extend(length_figures(strategy, result.rollouts))
        report.depths.extend(depth_figures(strategy, result.stats))
        if result.counts is not None:
            report.ranks.extend(result.counts.figures(strategy))
            by_place = result.counts.by_place
        else:
            by_place = PlaceCounts.of_rollouts(
                itertools.chain(*result.rollouts.values()), DraftStrategy.parse(strategy).depth
            )
        report.depths.extend(by_place.figures(strategy))
    ranks = {
        task: ranks_of(pair.model, pair.drafter, rollouts, max_depth=evaluation.max_depth)
        for task, rollouts in generated[evaluation.strategies[0]].rollouts.items()
    }
    report.topk.extend(topk_figures(ranks))
    return report


def write(evaluation: Evaluation, report: Report) -> None:
    """The files that were asked for."""
    if evaluation.json is not None:
        write_json(report, evaluation.json)
    if evaluation.plot is not None:
        draw(report, evaluation.plot)


def _subject(evaluation: Evaluation) -> dict[str, Any]:
    """What a reader of the figures wants to know of their origin."""
    left_out = ("json", "plot", "sglang", "prompt_key", "answer_key")
    plain = {
        name: value
        for name, value in dataclasses.asdict(evaluation).items()
        if name not in left_out
    }
    return plain | {"jsonl": None if evaluation.jsonl is None else str(evaluation.jsonl)}


def parse(args: list[str] | None = None) -> Evaluation:
    """The evaluation that the command line asks for."""
    import jsonargparse
    import yaml

    from fastrl.config_loader import load_yaml

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    jsonargparse.set_loader("yaml", load_yaml, exceptions=(yaml.YAMLError,))
    evaluation: Evaluation = jsonargparse.auto_cli(Evaluation, args=args, as_positional=False)
    return evaluation


if __name__ == "__main__":
    evaluate(parse())
