"""Check that SGLang's rollouts follow the policy, while the strategy changes at every step.

Two checks, over a policy that is really served, by each strategy alone and by all in turn:

- greedy: tokens are those of plain decoding. Kernels for many rows or tokens round another way than
  those for few, so a response may leave the plain one where two tokens are nearly as likely; such a
  place is shown with the distance of their logits in a forward of the policy in float32, and is an
  error beyond what rounding explains.
- sampled: responses of a few tokens out of few each, thousands of them, against the exact
  probability of each from the policy in float32: Pearson's chi-squared test over all of them.
  Rounding moves probabilities too, in bfloat16 by a percent or so, which enough samples would tell
  apart; the second test is against as many responses of plain decoding. Rounding may also swap a
  token that may be sampled for one that may not: of the prompts that one is sampled after which
  this is least likely, and its distance is printed.

With --sglang.memory_saver true both once more, after SGLang has given its memory back and taken it
again: tokens and accept lengths must be those of before. Exits with 1 on an error.

    python scripts/check_sglang.py --model models/quickstart/policy \\
        --drafter models/quickstart/drafter --sglang.attention_backend triton
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from bench_inputs import load_weights, print_machine, random_prompts
from sd_engines import SGLangOptions
from torch import Tensor, nn

from fastrl.model_files import resolve_model
from fastrl.rollout.bandit import FixedStrategy, InTurns
from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.engine import StrategySelector
from fastrl.rollout.sampling import log_distribution
from fastrl.rollout.sglang_engine import SGLangEngine
from fastrl.types import Prompt, SamplingParams

Response = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Check:
    """What to compare."""

    model: str
    """The policy: its folder, or what else a `model_path` may be."""
    drafter: str
    """Folder of its EAGLE drafter."""
    strategies: list[str] = field(default_factory=lambda: ["2_1_3", "4_2_8", "8_4_16", "3_4_8"])
    """Draft trees of the engine, each checked alone and all in turn with `off`."""
    num_prompts: int = 32
    """Prompts of the greedy check."""
    prompt_tokens: int = 24
    """Random tokens of each."""
    max_tokens: int = 128
    """Of a greedy response."""
    largest_gap: float = 0.25
    """Of logits, where a greedy response may leave the plain one: in bfloat16 a step between
    numbers of the size of logits is 0.03 to 0.125."""
    num_samples: int = 8000
    """Responses of the sampled check."""
    sampling: SamplingParams = field(
        default_factory=lambda: SamplingParams(max_tokens=3, top_k=4, ignore_eos=True)
    )
    """Of the sampled check; top_k ** max_tokens responses are possible."""
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


# -- greedy ---------------------------------------------------------------------------------------


def logit_gap(model: nn.Module, prompt: Sequence[int], ours: Response, theirs: Response) -> float:
    """Distance of the logits of two greedy responses' tokens at the first place where they differ;
    0 where they do not."""
    pairs = zip(ours, theirs, strict=True)
    place = next((i for i, (mine, its) in enumerate(pairs) if mine != its), None)
    if place is None:
        return 0.0
    logits_V = _logits(model, (*prompt, *ours[:place]))
    return float((logits_V[ours[place]] - logits_V[theirs[place]]).abs())


def _logits(model: nn.Module, tokens: Sequence[int]) -> Tensor:
    device = next(model.parameters()).device
    with torch.no_grad():
        logits_V: Tensor = model(torch.tensor([list(tokens)], device=device)).logits[0, -1]
    return logits_V.float().cpu()


# -- sampled --------------------------------------------------------------------------------------


def clearest_prompt(
    model: nn.Module, prompts: Sequence[Prompt], sampling: SamplingParams
) -> tuple[Prompt, float]:
    """The prompt after which least depends on rounding, and how far, in logits, its most likely
    token that may not be sampled stays behind the least likely one that may, at the nearest."""

    def distance(prompt: Prompt) -> float:
        nearest, contexts = math.inf, [tuple(prompt.tokens)]
        for _ in range(sampling.max_tokens):
            longer = []
            for context in contexts:
                best = _logits(model, context).topk(sampling.top_k + 1)
                nearest = min(nearest, float(best.values[-2] - best.values[-1]))
                longer += [(*context, token) for token in best.indices[:-1].tolist()]
            contexts = longer
        return nearest

    distances = [distance(prompt) for prompt in prompts]
    clearest = max(range(len(prompts)), key=distances.__getitem__)
    return prompts[clearest], distances[clearest]


def joint_distribution(
    model: nn.Module, prompt: Sequence[int], sampling: SamplingParams
) -> dict[Response, float]:
    """Probabilities of all responses of sampling.max_tokens tokens."""
    responses: dict[Response, float] = {(): 1.0}
    for _ in range(sampling.max_tokens):
        longer: dict[Response, float] = {}
        for tokens, probability in responses.items():
            probs_V = log_distribution(_logits(model, (*prompt, *tokens)), sampling).exp()
            for token in probs_V.nonzero().flatten().tolist():
                longer[(*tokens, token)] = probability * float(probs_V[token])
        responses = longer
    return responses


def chi_square_p_value(
    counts: Mapping[Response, int], expected: Mapping[Response, float], total: int
) -> float:
    """Of the counts under the expected probabilities; rare outcomes are taken together.

    0 if an outcome was counted that has no probability.
    """
    if any(count and not expected.get(outcome) for outcome, count in counts.items()):
        return 0.0
    common = [outcome for outcome, probability in expected.items() if probability * total >= 5]
    observed = [float(counts.get(outcome, 0)) for outcome in common]
    means = [expected[outcome] * total for outcome in common]
    if (rest := total - sum(means)) >= 1:
        observed.append(total - sum(observed))
        means.append(rest)
    statistic = sum((seen - mean) ** 2 / mean for seen, mean in zip(observed, means, strict=True))
    return _chi_square_tail(statistic, len(means) - 1)


def two_sample_p_value(ours: Mapping[Response, int], theirs: Mapping[Response, int]) -> float:
    """Of two lots of as many responses having one distribution; rare ones are taken together."""
    outcomes = {*ours, *theirs}
    common = {one for one in outcomes if ours.get(one, 0) + theirs.get(one, 0) >= 10}
    pairs = [(ours.get(one, 0), theirs.get(one, 0)) for one in common]
    rare = outcomes - common
    pairs.append((sum(ours.get(one, 0) for one in rare), sum(theirs.get(one, 0) for one in rare)))
    pairs = [(mine, its) for mine, its in pairs if mine + its]
    statistic = sum((mine - its) ** 2 / (mine + its) for mine, its in pairs)
    return _chi_square_tail(statistic, len(pairs) - 1)


def _chi_square_tail(statistic: float, degrees: int) -> float:
    half, at = torch.tensor(degrees / 2), torch.tensor(statistic / 2)
    return float(torch.special.gammaincc(half.double(), at.double()))


# -------------------------------------------------------------------------------------------------


def run(check: Check) -> bool:
    """Print a line for each selector; whether all passed."""
    folder = str(resolve_model(check.model))
    device = check.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    print_machine(device, check.dtype)
    model, _ = load_weights(folder, None, dtype=torch.float32, device=device)
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
        comparison = Comparison(check, engine, model, folder)
        lengths = [comparison.add(name, selector) for name, selector in selectors.items()]
        if check.sglang.memory_saver:
            engine.sleep()
            engine.wake()
            engine.load_policy(model.named_parameters(), version=1)
            drafter = EagleDrafter.from_pretrained(check.drafter)
            engine.load_drafter(drafter.named_weights(), version=1)
            before = dict(zip(selectors, lengths, strict=True))["in turns"]
            after = comparison.add("after sleep", selectors["in turns"])
            if abs(after - before) > 0.05 * before:
                print(f"accept length {before:.2f} before SGLang slept, {after:.2f} after: failed")
                comparison.is_passed = False
        return comparison.is_passed
    finally:
        engine.close()


class Comparison:
    """Holds what an engine generates against the policy, and against its own plain decoding.

    Args:
        check: what to compare.
        engine: that serves the policy.
        model: the policy, in float32.
        folder: of the model.
    """

    def __init__(self, check: Check, engine: SGLangEngine, model: Any, folder: str) -> None:
        self._check, self._engine, self._model = check, engine, model
        self._prompts = random_prompts(
            folder, length=check.prompt_tokens, count=check.num_prompts, seed=check.seed
        )
        self._sampled_prompt, distance = self._prompts[0], math.inf
        if 0 < check.sampling.top_k < model.config.vocab_size:
            self._sampled_prompt, distance = clearest_prompt(model, self._prompts, check.sampling)
        print(f"sampled: prompt {self._sampled_prompt.prompt_id}, {distance:.3f} from other tokens")
        self._expected = joint_distribution(model, self._sampled_prompt.tokens, check.sampling)
        self._plain: list[Response] = []
        self._plain_counts: Counter[Response] = Counter()
        self._seed = check.seed
        self.is_passed = True
        print(
            f"{'':>14} {'accept':>7} {'greedy':>8} {'largest gap':>12} "
            f"{'p exact':>8} {'p plain':>8}"
        )

    def add(self, name: str, selector: StrategySelector) -> float:
        """Generate under a selector, the first of which is plain decoding, and print a line.

        Returns the greedy responses' accept length.
        """
        check, prompts = self._check, self._prompts
        self._engine.strategy_selector = selector
        greedy = SamplingParams(max_tokens=check.max_tokens, temperature=0, ignore_eos=True)
        responses = [rollout.tokens for rollout in self._engine.generate(prompts, greedy)]
        accept_length = self._engine.stats().accept_length
        self._plain = self._plain or responses
        gaps = [
            logit_gap(self._model, prompt.tokens, ours, theirs)
            for prompt, ours, theirs in zip(prompts, responses, self._plain, strict=True)
        ]
        counts = self._sampled()
        p_exact = chi_square_p_value(counts, self._expected, check.num_samples)
        p_plain = two_sample_p_value(counts, self._plain_counts) if self._plain_counts else 1.0
        self._plain_counts = self._plain_counts or counts
        is_good = max(gaps) <= check.largest_gap and min(p_exact, p_plain) >= check.least_p
        self.is_passed &= is_good
        num_equal = sum(ours == its for ours, its in zip(responses, self._plain, strict=True))
        print(
            f"{name:>14} {accept_length:>7.2f} {num_equal:>4}/{len(prompts):<3} {max(gaps):>12.2e} "
            f"{p_exact:>8.4f} {p_plain:>8.4f}{'' if is_good else '  failed'}",
            flush=True,
        )
        return accept_length

    def _sampled(self) -> Counter[Response]:
        rollouts = self._engine.generate(
            [self._sampled_prompt],
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
