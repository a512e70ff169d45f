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

import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from bench_inputs import load_questions, load_weights, print_machine, random_prompts
from sd_engines import SGLangOptions
from torch import Tensor, nn

from fastrl.model_files import resolve_model
from fastrl.rollout.bandit import FixedStrategy, InTurns
from fastrl.rollout.drafters.loading import load_drafter
from fastrl.rollout.engine import StrategySelector
from fastrl.rollout.sampling import log_distribution
from fastrl.rollout.sglang_engine import SGLangEngine
from fastrl.types import Prompt, SamplingParams

Response = tuple[int, ...]

_ROUNDING_ALLOWED = 2.0
"""How far SGLang's rounding may move logits and probabilities, in terms of transformers'."""
_ROWS_AT_ONCE = 16
"""Responses in one forward."""


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


# -- greedy ---------------------------------------------------------------------------------------


def shortfalls(
    model: nn.Module,
    contexts: Sequence[tuple[Sequence[int], Response]],
    other: nn.Module | None = None,
) -> list[Tensor]:
    """How far, in logits, each token of a response stays behind the best at its place.

    Args:
        model: whose logits they are.
        contexts: prompts and their responses.
        other: a model whose best tokens are taken there instead of the responses'.
    """
    found = []
    for first in range(0, len(contexts), _ROWS_AT_ONCE):
        some = contexts[first : first + _ROWS_AT_ONCE]
        logits = _logits_at_responses(model, some)
        taken = [torch.tensor(response) for _, response in some]
        if other is not None:
            taken = [logits_TV.argmax(-1) for logits_TV in _logits_at_responses(other, some)]
        found += [
            logits_TV.amax(-1) - logits_TV.gather(1, token_T[:, None])[:, 0]
            for logits_TV, token_T in zip(logits, taken, strict=True)
        ]
    return found


def _logits_at_responses(
    model: nn.Module, contexts: Sequence[tuple[Sequence[int], Response]]
) -> list[Tensor]:
    """[T, V] float32 before each token of each response."""
    rows = [(*prompt, *response) for prompt, response in contexts]
    width = max(map(len, rows))
    device = next(model.parameters()).device
    padded_CW = torch.tensor([(*row, *[0] * (width - len(row))) for row in rows], device=device)
    with torch.no_grad():
        logits_CWV = model(padded_CW).logits.float().cpu()
    return [
        logits_CWV[row, len(prompt) - 1 : len(prompt) + len(response) - 1]
        for row, (prompt, response) in enumerate(contexts)
    ]


def excess_p_value(ours: int, our_total: int, theirs: int, their_total: int) -> float:
    """Of so many of ours more than of theirs by chance, where both are as likely; one-sided."""
    share = (ours + theirs) / (our_total + their_total)
    deviation = math.sqrt(share * (1 - share) * (1 / our_total + 1 / their_total))
    if deviation == 0:
        return 1.0
    excess = (ours / our_total - theirs / their_total) / deviation
    return math.erfc(excess / math.sqrt(2)) / 2


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


def two_sample_p_value(
    ours: Mapping[Response, int], theirs: Mapping[Response, int], allowed: float = 0.0
) -> float:
    """Of two lots of as many responses having one distribution, each but for what has a
    noncentrality of at most `allowed`; rare ones are taken together."""
    outcomes = {*ours, *theirs}
    common = {one for one in outcomes if ours.get(one, 0) + theirs.get(one, 0) >= 10}
    pairs = [(ours.get(one, 0), theirs.get(one, 0)) for one in common]
    rare = outcomes - common
    pairs.append((sum(ours.get(one, 0) for one in rare), sum(theirs.get(one, 0) for one in rare)))
    pairs = [(mine, its) for mine, its in pairs if mine + its]
    statistic = sum((mine - its) ** 2 / (mine + its) for mine, its in pairs)
    return _chi_square_tail(statistic, len(pairs) - 1, allowed)


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
    model, drafter = load_weights(folder, check.ckpt, dtype=torch.float32, device=device)
    drafter = drafter or dict(load_drafter(check.drafter).named_weights())
    dtype = getattr(torch, check.dtype)
    rounded, _ = load_weights(folder, check.ckpt, dtype=dtype, device=device)
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
