"""Whether tokens and samples are a policy's: the statistics of check_sglang.py.

Logits are the policy's own, from transformers' forward in float32. Leaves out what is generated,
and what is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fastrl.rollout.sampling import log_distribution
from fastrl.types import SamplingParams

Response = tuple[int, ...]

_ROWS_AT_ONCE = 16
"""Responses in one forward."""
FEWEST_EXPECTED = 5.0
"""Responses of one kind; rarer ones are counted together."""


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


def last_logits(model: nn.Module, contexts: Sequence[Sequence[int]]) -> Tensor:
    """[C, V] float32 after each context; all have one length."""
    device = next(model.parameters()).device
    with torch.no_grad():
        logits_CV: Tensor = model(torch.tensor([list(c) for c in contexts], device=device)).logits[
            :, -1
        ]
    return logits_CV.float().cpu()


# -- sampled --------------------------------------------------------------------------------------


def joint_distribution(
    model: nn.Module, prompt: Sequence[int], sampling: SamplingParams, least: float = 0.0
) -> dict[Response, float]:
    """Probabilities of all responses of sampling.max_tokens tokens that have more than `least`."""
    responses: dict[Response, float] = {(): 1.0}
    for _ in range(sampling.max_tokens):
        logits_CV = last_logits(model, [(*prompt, *tokens) for tokens in responses])
        probs_CV = log_distribution(logits_CV, sampling).exp()
        responses = {
            (*tokens, token): probability * float(probs_V[token])
            for (tokens, probability), probs_V in zip(responses.items(), probs_CV, strict=True)
            for token in (probability * probs_V > least).nonzero().flatten().tolist()
        }
    return responses


def probabilities_of(
    model: nn.Module, prompt: Sequence[int], responses: Sequence[Response], sampling: SamplingParams
) -> dict[Response, float]:
    """Of these responses."""
    logprobs_N = torch.zeros(len(responses))
    for place in range(sampling.max_tokens):
        logits_NV = last_logits(model, [(*prompt, *tokens[:place]) for tokens in responses])
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
    common = [one for one, chance in expected.items() if chance * total >= FEWEST_EXPECTED]
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
