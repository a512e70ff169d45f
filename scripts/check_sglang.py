"""Check that SGLang's rollouts follow the policy, while the strategy changes at every step.

Two checks, over a policy that is really served, by each strategy alone and by all in turn:

- greedy: tokens are those of plain decoding. Kernels for many rows or tokens round another way than
  those for few, so a response may leave the plain one where two tokens are nearly as likely; such a
  place is shown with the distance of their logits in a forward of the policy in float32, and is an
  error beyond what rounding explains.
- sampled: thousands of responses of a few tokens against the exact probability of each, from the
  policy in float32: Pearson's chi-squared test over all of them. SGLang's dtype rounds
  probabilities too, which enough samples would tell apart: of the prompts that one is sampled after
  where rounding moves them least, as far as transformers' own forward in that dtype shows, and the
  test allows for twice as far. The second test is against as many responses of plain decoding, and
  allows for nothing.

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

_ROUNDING_ALLOWED = 2.0
"""How far SGLang's rounding may move probabilities, in terms of transformers'."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """What to compare."""

    model: str
    """The policy: its folder, or what else a `model_path` may be."""
    drafter: str
    """Folder of its EAGLE drafter."""
    strategies: list[str] = field(default_factory=lambda: ["2_1_3", "4_2_8", "8_4_16", "3_4_8"])
    """Draft trees of the engine, each checked alone and all in turn with `off`."""
    num_prompts: int = 64
    """Prompts of the greedy check, one of which is the sampled one's."""
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
        default_factory=lambda: SamplingParams(max_tokens=3, ignore_eos=True)
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


# -- greedy ---------------------------------------------------------------------------------------


def logit_gap(model: nn.Module, prompt: Sequence[int], ours: Response, theirs: Response) -> float:
    """Distance of the logits of two greedy responses' tokens at the first place where they differ;
    0 where they do not."""
    pairs = zip(ours, theirs, strict=True)
    place = next((i for i, (mine, its) in enumerate(pairs) if mine != its), None)
    if place is None:
        return 0.0
    (logits_V,) = _logits(model, [(*prompt, *ours[:place])])
    return float((logits_V[ours[place]] - logits_V[theirs[place]]).abs())


def _logits(model: nn.Module, contexts: Sequence[Sequence[int]]) -> Tensor:
    """[C, V] float32 after each context; all have one length."""
    device = next(model.parameters()).device
    with torch.no_grad():
        logits_CV: Tensor = model(torch.tensor([list(c) for c in contexts], device=device)).logits[
            :, -1
        ]
    return logits_CV.float().cpu()


# -- sampled --------------------------------------------------------------------------------------


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
    least = _FEWEST_EXPECTED / check.num_samples
    found = []
    for prompt in _prompts(check):
        expected = joint_distribution(model, prompt.tokens, check.sampling, least)
        if len(expected) >= check.least_outcomes:
            as_rounded = _probabilities(rounded, prompt.tokens, list(expected), check.sampling)
            moved = noncentrality(as_rounded, expected, check.num_samples)
            found.append(Sampled(prompt=prompt, expected=expected, rounding=moved))
    if not found:
        raise ValueError(
            f"after none of {check.num_prompts} prompts have {check.least_outcomes} responses of "
            f"{check.sampling.max_tokens} tokens a probability of {least:.1e} and more; raise "
            f"num_prompts or num_samples, or lower least_outcomes"
        )
    return min(found, key=lambda sampled: sampled.rounding)


def joint_distribution(
    model: nn.Module, prompt: Sequence[int], sampling: SamplingParams, least: float = 0.0
) -> dict[Response, float]:
    """Probabilities of all responses of sampling.max_tokens tokens that have more than `least`."""
    responses: dict[Response, float] = {(): 1.0}
    for _ in range(sampling.max_tokens):
        logits_CV = _logits(model, [(*prompt, *tokens) for tokens in responses])
        probs_CV = log_distribution(logits_CV, sampling).exp()
        responses = {
            (*tokens, token): probability * float(probs_V[token])
            for (tokens, probability), probs_V in zip(responses.items(), probs_CV, strict=True)
            for token in (probability * probs_V > least).nonzero().flatten().tolist()
        }
    return responses


def _probabilities(
    model: nn.Module, prompt: Sequence[int], responses: Sequence[Response], sampling: SamplingParams
) -> dict[Response, float]:
    """Of these responses."""
    logprobs_N = torch.zeros(len(responses))
    for place in range(sampling.max_tokens):
        logits_NV = _logits(model, [(*prompt, *tokens[:place]) for tokens in responses])
        token_N = torch.tensor([tokens[place] for tokens in responses])
        logprobs_NV = log_distribution(logits_NV, sampling)
        logprobs_N += logprobs_NV.gather(1, token_N[:, None])[:, 0]
    return dict(zip(responses, logprobs_N.exp().tolist(), strict=True))


def noncentrality(
    true: Mapping[Response, float], expected: Mapping[Response, float], total: int
) -> float:
    """What the chi-squared statistic of a test against `expected` has too much on average, where
    samples follow `true`."""
    rest = max(1 - sum(expected.values()), 1e-9)
    rest_moved = 1 - sum(true[one] for one in expected) - rest
    moved = rest_moved**2 / rest if rest * total >= 1 else 0.0
    return total * sum(
        ((true[one] - probability) ** 2 / probability for one, probability in expected.items()),
        start=moved,
    )


_FEWEST_EXPECTED = 5.0
"""Responses of one kind; rarer ones are counted together."""


def chi_square_p_value(
    counts: Mapping[Response, int],
    expected: Mapping[Response, float],
    total: int,
    allowed: float = 0.0,
) -> float:
    """Of the counts under the expected probabilities, with a noncentrality of at most `allowed`.

    What is not among the expected ones, and rare outcomes, are taken together. 0 if an outcome was
    counted that nothing is left for.
    """
    unexpected = sum(count for outcome, count in counts.items() if not expected.get(outcome))
    if unexpected and 1 - sum(expected.values()) < 1e-5:
        return 0.0
    common = [one for one, chance in expected.items() if chance * total >= _FEWEST_EXPECTED]
    observed = [float(counts.get(outcome, 0)) for outcome in common]
    means = [expected[outcome] * total for outcome in common]
    if (rest := total - sum(means)) >= 1:
        observed.append(total - sum(observed))
        means.append(rest)
    statistic = sum((seen - mean) ** 2 / mean for seen, mean in zip(observed, means, strict=True))
    return _chi_square_tail(statistic, len(means) - 1, allowed)


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


def _chi_square_tail(statistic: float, degrees: int, noncentrality: float = 0.0) -> float:
    """A noncentral chi-squared variable is a Poisson mixture of central ones."""
    half_statistic, half = torch.tensor(statistic / 2).double(), noncentrality / 2
    last = math.ceil(half + 12 * math.sqrt(half) + 12) if half else 0
    extra_K = torch.arange(last + 1).double()
    log_weight_K = extra_K * math.log(half or 1.0) - half - torch.lgamma(extra_K + 1)
    tail_K = torch.special.gammaincc(degrees / 2 + extra_K, half_statistic.expand_as(extra_K))
    return min(1.0, float((log_weight_K.exp() * tail_K).sum()))


# -------------------------------------------------------------------------------------------------


def run(check: Check) -> bool:
    """Print a line for each selector; whether all passed."""
    folder = str(resolve_model(check.model))
    device = check.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    print_machine(device, check.dtype)
    model, _ = load_weights(folder, None, dtype=torch.float32, device=device)
    dtype = getattr(torch, check.dtype)
    rounded, _ = load_weights(folder, None, dtype=dtype, device=device)
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
        comparison = Comparison(check, engine, model, sampled)
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


def _prompts(check: Check) -> list[Prompt]:
    return random_prompts(
        str(resolve_model(check.model)),
        length=check.prompt_tokens,
        count=check.num_prompts,
        seed=check.seed,
    )


class Comparison:
    """Holds what an engine generates against the policy, and against its own plain decoding.

    Args:
        check: what to compare.
        engine: that serves the policy.
        model: the policy, in float32.
        sampled: what the sampled check counts.
    """

    def __init__(self, check: Check, engine: SGLangEngine, model: Any, sampled: Sampled) -> None:
        self._check, self._engine, self._model = check, engine, model
        self._prompts = _prompts(check)
        self._sampled = sampled
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
        counts = self._draw()
        p_exact = chi_square_p_value(
            counts,
            self._sampled.expected,
            check.num_samples,
            _ROUNDING_ALLOWED**2 * self._sampled.rounding,
        )
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
