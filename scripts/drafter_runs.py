"""What eval_drafter.py runs: strategies over an engine, a drafter along responses, timed rounds.

An engine of either kind is asked through the sessions of sd_engines.py. Leaves out what is run on
(eval_drafter.py), and what is made of it (acceptance_figures.py).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from acceptance_figures import RankCounts
from sd_engines import Sample, Session, SGLangArm, TorchArm, sglang_sessions, torch_sessions
from torch import Tensor
from transformers import PreTrainedModel

from fastrl.rollout.bandit import FixedStrategy
from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.drafters.states import inputs_of_layers
from fastrl.rollout.drafters.token_ranks import token_ranks
from fastrl.types import (
    DraftStrategy,
    EngineStats,
    Prompt,
    Rollout,
    SamplingParams,
    SequenceFeatures,
    StepStats,
)

SESSIONS = {"torch": torch_sessions, "sglang": sglang_sessions}
"""By engine; each gives one session where no arm is of stock SGLang and one batch size is asked."""


class RecordedStrategy(FixedStrategy):
    """Always the same strategy; counts what is accepted by rank.

    Stays with its drafter however bad it is, for that is what is to be found out.
    """

    def __init__(self, strategy: str) -> None:
        super().__init__(strategy)
        self.counts = RankCounts()

    def record(self, stats: StepStats) -> None:
        """Count the step."""
        self.counts.add(stats)

    def exclude(self, strategies: Collection[DraftStrategy]) -> None:
        """Exclude nothing."""


@dataclass(kw_only=True)
class Generated:
    """What one strategy generated."""

    rollouts: dict[str, list[Rollout]] = field(default_factory=dict)
    """By task."""
    stats: dict[str, EngineStats] = field(default_factory=dict)
    """By task."""
    counts: RankCounts | None = None
    """None from SGLang, whose steps are in another process."""


def generate(
    session: Session,
    prompts: Mapping[str, Sequence[Prompt]],
    sampling: SamplingParams,
    *,
    num_samples: int,
    seed: int,
) -> dict[str, Generated]:
    """Responses to all prompts, which are by task, of each strategy of the session.

    Raises ValueError for a strategy that the session's engine has no room for.
    """
    (batch_size,) = session.batch_sizes
    if too_large := sorted(set(session.arms) - set(session.arms_at(batch_size))):
        raise ValueError(
            f"strategies {too_large} have more than {session.max_tree_nodes:.0f} nodes over "
            f"{batch_size} rows, for which SGLang is not prepared; lower max_batch_size"
        )
    generated = {strategy: Generated() for strategy in session.arms}
    with session.open() as opened:
        for strategy, result in generated.items():
            arm = opened[strategy]
            assert isinstance(arm, TorchArm | SGLangArm), "what sessions open"
            selector = FixedStrategy(strategy)
            if isinstance(arm, TorchArm):
                selector = RecordedStrategy(strategy)
                result.counts = selector.counts
            arm.engine.strategy_selector = selector
            for task, of_task in prompts.items():
                if result.counts is not None:
                    result.counts.task = task
                result.rollouts[task] = arm.engine.generate(
                    of_task, sampling, num_samples=num_samples, seed=seed
                )
                result.stats[task] = arm.engine.stats()
    return generated


@torch.no_grad()
def features_of(
    model: PreTrainedModel, drafter: EagleDrafter, rollout: Rollout
) -> SequenceFeatures:
    """A response's tokens and the target's hidden states along them."""
    tokens_T = torch.tensor((*rollout.prompt.tokens, *rollout.tokens), device=model.device)
    base: Any = model.base_model
    with inputs_of_layers(base, drafter.feature_layers) as inputs:
        output = base(tokens_T[None, :-1])
    parts = (output.last_hidden_state, *(inputs[layer] for layer in drafter.feature_layers))
    return SequenceFeatures(
        tokens_T=tokens_T,
        hidden_TD=torch.cat(parts, dim=-1)[0],
        num_prompt_tokens=len(rollout.prompt.tokens),
        rl_step=0,
    )


def ranks_of(
    model: PreTrainedModel, drafter: EagleDrafter, rollouts: Sequence[Rollout], *, max_depth: int
) -> list[list[Tensor]]:
    """What `token_ranks` gives, by response."""
    embedding: Any = model.get_input_embeddings()
    lm_head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return [
        token_ranks(
            drafter,
            embedding.weight,
            lm_head.weight,
            features_of(model, drafter, rollout),
            max_depth=max_depth,
        )
        for rollout in rollouts
    ]


def time_rounds(
    session: Session,
    batch_size: int,
    asked: Iterator[Prompt],
    *,
    num_prompts: int,
    num_rounds: int,
    num_warm_up: int,
    num_samples: int,
    seed: int,
) -> dict[str, list[Sample]]:
    """By arm, one a round after the warm-up.

    Args:
        session: of all arms.
        batch_size: one of its.
        asked: prompts without end; all arms answer the same, in an order of each round's own.
        num_prompts: of a round.
        num_rounds: that count.
        num_warm_up: before those.
        num_samples: responses a prompt.
        seed: of tokens, and of the order of arms.
    """
    names = session.arms_at(batch_size)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    rng = random.Random(f"{seed}/{batch_size}")
    with session.open() as arms:
        for round_ in range(num_warm_up + num_rounds):
            prompts = list(itertools.islice(asked, num_prompts))
            for name in rng.sample(names, len(names)):
                sample = arms[name].run(prompts, num_samples, seed + round_)
                if round_ >= num_warm_up:
                    samples[name].append(sample)
    return samples
