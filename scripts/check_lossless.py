"""Check that speculation changes no token: the same prompts and seeds, with and without it.

For every strategy it generates the rollouts of plain decoding and compares them token by token.
In float32 they are identical, except where a token's uniform falls within rounding error of a
boundary of the distribution; such a difference is reported with its margin, which is then of the
size of rounding (1e-6), and anything larger is an error. Exits with 1 on an error.

    python scripts/check_lossless.py --model models/quickstart/policy \\
        --drafter models/quickstart/drafter --strategies 4_2_8 6_4_24
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import jsonargparse
import torch
import yaml
from transformers import AutoModelForCausalLM

from fastrl.config_loader import load_yaml
from fastrl.datamodules import ReasoningGymPrompts
from fastrl.datamodules.chat_template import load_tokenizer, tokenize_questions
from fastrl.model_files import resolve_model
from fastrl.rollout.bandit import FixedStrategy
from fastrl.rollout.sampling import log_distribution, position_uniforms, request_key
from fastrl.rollout.torch_engine import TorchEngine
from fastrl.types import Prompt, Rollout, SamplingParams

LARGEST_MARGIN = 1e-4
"""Distance of a uniform from its token's interval beyond which rounding is no explanation."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """What to compare."""

    model: str
    """The target: its folder, or what else a `model_path` may be."""
    drafter: str
    """Folder of its EAGLE drafter."""
    strategies: list[str] = field(default_factory=lambda: ["2_1_3", "4_2_8", "4_4_16", "8_4_48"])
    """Draft trees to compare with plain decoding."""
    task: str = "chain_sum"
    """reasoning-gym task of the prompts."""
    num_prompts: int = 64
    """Prompts."""
    num_samples: int = 4
    """Responses to each."""
    max_batch_size: int = 32
    """Most rollouts decoded at once."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    """How tokens are sampled."""
    seed: int = 0
    """Of the rollouts."""


def load_prompts(check: Check) -> list[Prompt]:
    """Held-out questions of the task."""
    source = ReasoningGymPrompts(check.task, num_train=1, num_held_out=check.num_prompts)
    return tokenize_questions(
        source.load().held_out,
        load_tokenizer(resolve_model(check.model)),
        system_prompt=None,
        max_prompt_tokens=1024,
        split="held-out",
    )


def margin(model: torch.nn.Module, rollout: Rollout, place: int, check: Check) -> float:
    """How far a token's uniform lies outside the token's interval of the exact distribution."""
    tokens = torch.tensor([(*rollout.prompt.tokens, *rollout.tokens[:place])])
    with torch.no_grad():
        logits_V = model(tokens).logits[0, -1]
    cumulative_V = log_distribution(logits_V, check.sampling).double().exp().cumsum(-1)
    key = request_key(check.seed, 0, rollout.prompt.prompt_id, rollout.sample_index)
    uniform = position_uniforms(torch.tensor(key), torch.tensor(place))
    token = rollout.tokens[place]
    start, end = (cumulative_V[token - 1] if token else 0.0), cumulative_V[token]
    return max(float(start - uniform), float(uniform - end), 0.0)


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """First place at which two responses differ."""
    pairs = zip(ours, theirs, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))


def main() -> None:
    """Generate with each strategy, compare, print a table."""
    jsonargparse.set_loader("yaml", load_yaml, exceptions=(yaml.YAMLError,))
    check: Check = jsonargparse.auto_cli(Check)
    folder = resolve_model(check.model)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    engine = TorchEngine(drafter_path=check.drafter, max_batch_size=check.max_batch_size)
    engine.start(folder)
    engine.load_policy(model.named_parameters(), version=0)
    prompts = load_prompts(check)
    reference: list[Rollout] = []
    is_lossless = True
    print(f"{'strategy':>10} {'tokens':>8} {'different':>10} {'largest margin':>15} {'accept':>7}")
    for strategy in ("off", *check.strategies):
        engine.strategy_selector = FixedStrategy(strategy)
        rollouts = engine.generate(
            prompts, check.sampling, num_samples=check.num_samples, seed=check.seed
        )
        reference = reference or rollouts
        margins = [
            margin(model, ours, first_difference(ours.tokens, its.tokens), check)
            for ours, its in zip(rollouts, reference, strict=True)
            if ours.tokens != its.tokens
        ]
        is_lossless &= max(margins, default=0.0) <= LARGEST_MARGIN
        stats = engine.stats()
        print(
            f"{strategy:>10} {stats.num_tokens:>8} {len(margins):>10} "
            f"{max(margins, default=0.0):>15.1e} {stats.accept_length:>7.2f}"
        )
    engine.close()
    if not is_lossless:
        sys.exit("speculation changed a token by more than rounding explains")
    print("every rollout is that of plain decoding")


if __name__ == "__main__":
    main()
