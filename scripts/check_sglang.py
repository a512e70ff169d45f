"""Check that SGLang's rollouts follow the policy, while the strategy changes at every step.

Two checks, over a policy that is really served, by each strategy alone and by all in turn:

- greedy: every token is the policy's best one at its place, in float32, of the response as it is.
  SGLang's dtype rounds, and its kernels for many rows or tokens in another way than those for few,
  so where two tokens are nearly as likely the other may be taken, and two responses part there for
  good. How many tokens are not the best may not be more than of plain decoding, but for chance, and
  none may stay further behind than transformers' own forward in that dtype explains, twice over.
- sampled: thousands of responses of a few tokens against the exact probability of each, from the
  policy in float32: Pearson's chi-squared test over all of them. SGLang's dtype rounds
  probabilities too, which enough samples would tell apart: of the prompts that one is sampled after
  where rounding moves them least, as far as transformers' own forward in that dtype shows, and the
  test allows for twice as far. So does the second test, against as many responses of plain
  decoding, which rounds in its own way.

Where nothing that was drafted is accepted, nothing is checked, and that is an error too: ask what
the drafter was trained for.

With --sglang.memory_saver true both once more, after SGLang has given its memory back and taken it
again: tokens and accept lengths must be those of before. Exits with 1 on an error.

    python scripts/check_sglang.py --model models/quickstart/policy \\
        --drafter models/quickstart/drafter --sglang.attention_backend triton \\
        --task_config '{min_terms: 2, max_terms: 6, min_digits: 1, max_digits: 1}'
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from bench_inputs import load_questions, load_weights, print_machine, random_prompts
from policy_statistics import (
    FEWEST_EXPECTED,
    Response,
    chi_square_p_value,
    excess_p_value,
    joint_distribution,
    noncentrality,
    probabilities_of,
    shortfalls,
    two_sample_p_value,
)
from sd_engines import SGLangOptions
from torch import nn

from fastrl.model_files import resolve_model
from fastrl.rollout.bandit import FixedStrategy, InTurns
from fastrl.rollout.drafters.loading import load_drafter
from fastrl.rollout.engine import StrategySelector
from fastrl.rollout.sglang_engine import SGLangEngine
from fastrl.types import Prompt, SamplingParams

_ROUNDING_ALLOWED = 2.0
"""How far SGLang's rounding may move logits and probabilities, in terms of transformers'."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """What to compare."""

    model: str
    """The policy: its folder, or what else a `model_path` may be."""
    drafter: str
    """Folder of its EAGLE drafter."""
    ckpt: str | None = None
    """Checkpoint of a run, whose policy and co-trained drafter take the folders' places."""
    strategies: list[str] = field(default_factory=lambda: ["2_1_3", "4_2_8", "8_4_16", "3_4_8"])
    """Draft trees of the engine, each checked alone and all in turn with `off`."""
    num_prompts: int = 64
    """Prompts of the greedy check, one of which is the sampled one's."""
    prompt_tokens: int | None = None
    """Length of random prompts, whose responses a drafter hardly foresees; null: questions of the
    task."""
    task: str = "chain_sum"
    """reasoning-gym task of the prompts."""
    task_config: dict[str, int] = field(default_factory=dict)
    """Its configuration."""
    system_prompt: str | None = None
    """System message before each question."""
    max_tokens: int = 128
    """Of a greedy response, at most."""
    largest_gap: float = 1e-3
    """Of logits, between a greedy token and the best, whatever the dtype."""
    num_samples: int = 8000
    """Responses of the sampled check."""
    sampling: SamplingParams = field(
        default_factory=lambda: SamplingParams(max_tokens=10, ignore_eos=True)
    )
    """Of the sampled check."""
    least_outcomes: int = 16
    """Responses likely enough to be counted apart, that a prompt must have at least."""
    least_p: float = 1e-4
    """Smallest p-value that passes."""
    max_batch_size: int = 64
    """Most rows decoded at once."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """SGLang's."""
    device: str = "auto"
    """Where: cpu, cuda, or auto for a GPU if there is one."""
    sglang: SGLangOptions = field(default_factory=SGLangOptions)
    """Options of SGLang."""
    seed: int = 0
    """Of prompts and responses."""


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """What the sampled check counts."""

    prompt: Prompt
    expected: Mapping[Response, float]
    """Probabilities of the responses that are counted apart."""
    rounding: float
    """What rounding adds to the statistic, on average; see `noncentrality`."""


def steadiest_prompt(model: nn.Module, rounded: nn.Module, check: Check) -> Sampled:
    """That where rounding moves the probabilities of responses least.

    Raises ValueError if no prompt has as many outcomes as the check asks for.

    Args:
        model: the policy in float32.
        rounded: the same in SGLang's dtype.
        check: whose prompts and samples.
    """
    least = FEWEST_EXPECTED / check.num_samples
    found = []
    for prompt in _prompts(check):
        expected = joint_distribution(model, prompt.tokens, check.sampling, least)
        if len(expected) >= check.least_outcomes:
            as_rounded = probabilities_of(rounded, prompt.tokens, list(expected), check.sampling)
            moved = noncentrality(as_rounded, expected, check.num_samples)
            found.append(Sampled(prompt=prompt, expected=expected, rounding=moved))
    if not found:
        raise ValueError(
            f"after none of {check.num_prompts} prompts have {check.least_outcomes} responses of "
            f"{check.sampling.max_tokens} tokens a probability of {least:.1e} and more; raise "
            f"num_prompts or num_samples, or lower least_outcomes"
        )
    return min(found, key=lambda sampled: sampled.rounding)


# -------------------------------------------------------------------------------------------------


def run(check: Check) -> bool:
    """Print a line for each selector; whether all passed."""
    folder = str(resolve_model(check.model))
    device = check.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    print_machine(device, check.dtype)
    model, drafter = load_weights(
        folder, check.ckpt, check.drafter, dtype=torch.float32, device=device
    )
    drafter = drafter or dict(load_drafter(check.drafter, model.config).named_weights())
    dtype = getattr(torch, check.dtype)
    rounded, _ = load_weights(folder, check.ckpt, None, dtype=dtype, device=device)
    sampled = steadiest_prompt(model, rounded, check)
    print(
        f"sampled: prompt {sampled.prompt.prompt_id}, {len(sampled.expected)} responses of "
        f"{sum(sampled.expected.values()):.3f} in all; rounding adds about {sampled.rounding:.1f} "
        f"to chi-squared"
    )
    selectors: dict[str, StrategySelector] = {
        "off": FixedStrategy("off"),
        **{strategy: FixedStrategy(strategy) for strategy in check.strategies},
        "in turns": InTurns(["off", *check.strategies]),
        "off in turns": InTurns([step for one in check.strategies for step in ("off", one)]),
    }
    engine = check.sglang.new_engine(
        drafter=check.drafter,
        max_batch_size=check.max_batch_size,
        dtype=check.dtype,
        device=device,
        selector=selectors["in turns"],
    )
    try:
        engine.start(folder)
        engine.load_policy(model.named_parameters(), version=0)
        engine.load_drafter(drafter.items(), version=0)
        comparison = Comparison(check, engine, model, rounded, sampled)
        lengths = [comparison.add(name, selector) for name, selector in selectors.items()]
        if check.sglang.memory_saver:
            engine.sleep()
            engine.wake()
            engine.load_policy(model.named_parameters(), version=1)
            engine.load_drafter(drafter.items(), version=1)
            before = dict(zip(selectors, lengths, strict=True))["in turns"]
            after = comparison.add("after sleep", selectors["in turns"])
            if abs(after - before) > 0.05 * before:
                print(f"accept length {before:.2f} before SGLang slept, {after:.2f} after: failed")
                comparison.is_passed = False
        return comparison.is_passed
    finally:
        engine.close()


def _prompts(check: Check) -> list[Prompt]:
    folder = str(resolve_model(check.model))
    if check.prompt_tokens is not None:
        return random_prompts(
            folder, length=check.prompt_tokens, count=check.num_prompts, seed=check.seed
        )
    return load_questions(
        folder,
        task=check.task,
        task_config=check.task_config,
        system_prompt=check.system_prompt,
        count=check.num_prompts,
    )


class Comparison:
    """Holds what an engine generates against the policy, and against its own plain decoding.

    Args:
        check: what to compare.
        engine: that serves the policy.
        model: the policy, in float32.
        rounded: the same in SGLang's dtype.
        sampled: what the sampled check counts.
    """

    def __init__(
        self,
        check: Check,
        engine: SGLangEngine,
        model: nn.Module,
        rounded: nn.Module,
        sampled: Sampled,
    ) -> None:
        self._check, self._engine, self._model, self._rounded = check, engine, model, rounded
        self._prompts = _prompts(check)
        self._sampled = sampled
        self._plain: list[Response] = []
        self._plain_misses = 0, 1
        self._largest_gap = check.largest_gap
        self._plain_counts: Counter[Response] = Counter()
        self._seed = check.seed
        self.is_passed = True
        print(
            f"{'':>14} {'accept':>7} {'as plain':>8} {'not best':>9} {'furthest':>9} "
            f"{'accept':>7} {'p exact':>8} {'p plain':>8}"
        )

    def add(self, name: str, selector: StrategySelector) -> float:
        """Generate under a selector, the first of which is plain decoding, and print a line.

        Returns the greedy responses' accept length.
        """
        check, prompts = self._check, self._prompts
        self._engine.strategy_selector = selector
        greedy = SamplingParams(max_tokens=check.max_tokens, temperature=0)
        responses = [rollout.tokens for rollout in self._engine.generate(prompts, greedy)]
        greedy_stats = self._engine.stats()
        contexts = [(one.tokens, own) for one, own in zip(prompts, responses, strict=True)]
        gap_N = torch.cat(shortfalls(self._model, contexts))
        misses = int((gap_N > check.largest_gap).sum()), len(gap_N)
        if not self._plain:
            self._plain, self._plain_misses = responses, misses
            by_rounding = torch.cat(shortfalls(self._model, contexts, other=self._rounded))
            self._largest_gap += _ROUNDING_ALLOWED * float(by_rounding.max())
        p_greedy = excess_p_value(*misses, *self._plain_misses)
        counts = self._draw()
        sampled_stats = self._engine.stats()
        allowed = _ROUNDING_ALLOWED**2 * self._sampled.rounding
        p_exact = chi_square_p_value(counts, self._sampled.expected, check.num_samples, allowed)
        p_plain = 1.0
        if self._plain_counts:
            p_plain = two_sample_p_value(counts, self._plain_counts, allowed)
        self._plain_counts = self._plain_counts or counts
        is_good = float(gap_N.max()) <= self._largest_gap
        is_good &= min(p_greedy, p_exact, p_plain) >= check.least_p
        if any(not one.is_off for one in selector.strategies):
            is_good &= min(greedy_stats.accepted_tokens, sampled_stats.accepted_tokens) > 0
        self.is_passed &= is_good
        num_equal = sum(ours == its for ours, its in zip(responses, self._plain, strict=True))
        print(
            f"{name:>14} {greedy_stats.accept_length:>7.2f} {num_equal:>4}/{len(prompts):<3} "
            f"{misses[0] / misses[1]:>9.2%} {float(gap_N.max()):>9.2e} "
            f"{sampled_stats.accept_length:>7.2f} {p_exact:>8.4f} {p_plain:>8.4f}"
            f"{'' if is_good else '  failed'}",
            flush=True,
        )
        return greedy_stats.accept_length

    def _draw(self) -> Counter[Response]:
        rollouts = self._engine.generate(
            [self._sampled.prompt],
            self._check.sampling,
            num_samples=self._check.num_samples,
            seed=self._seed,
        )
        self._seed += 1
        return Counter(rollout.tokens for rollout in rollouts)


def main() -> None:
    """As the command line says."""
    import jsonargparse  # not installed where tests run beside SGLang alone
    import yaml

    from fastrl.config_loader import load_yaml

    jsonargparse.set_loader("yaml", load_yaml, exceptions=(yaml.YAMLError,))
    check: Check = jsonargparse.auto_cli(Check, as_positional=False)
    if not run(check):
        sys.exit("rollouts with speculation are not those of the policy: see the lines that failed")
    print("rollouts follow the policy, whatever the strategy")


if __name__ == "__main__":
    main()
