"""The one definition of logits → distribution → token, against independent references."""

import itertools
import math

import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from fastrl.rollout.sampling import (
    RowSampling,
    exclude_tokens_,
    log_distribution,
    position_uniforms,
    request_key,
    sample_inverse_cdf,
)
from fastrl.types import SamplingParams

FILTERS = [
    {},
    {"top_k": 3},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"top_k": 5, "top_p": 0.8},
    {"top_k": 6, "top_p": 0.9, "min_p": 0.1},
]


def reference_distribution(logits: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """transformers' own warpers, one after the other, in float64."""
    scores = logits.double() / sampling.temperature
    ids = torch.zeros(len(logits), 1, dtype=torch.int64)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(ids, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(ids, scores)
    if sampling.min_p:
        scores = MinPLogitsWarper(sampling.min_p)(ids, scores)
    return scores.softmax(-1)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("filters", FILTERS)
def test_distribution_is_that_of_transformers_warpers(temperature, filters):
    logits = torch.randn(50, 11, generator=torch.Generator().manual_seed(0)) * 3
    sampling = SamplingParams(temperature=temperature, **filters)
    probs = log_distribution(logits, sampling).exp().double()
    torch.testing.assert_close(probs, reference_distribution(logits, sampling), atol=1e-6, rtol=0)


def test_distribution_by_hand():
    logits = torch.tensor([[math.log(0.5), math.log(0.3), math.log(0.15), math.log(0.05)]])
    nucleus = log_distribution(logits, SamplingParams(top_p=0.75)).exp()
    torch.testing.assert_close(nucleus, torch.tensor([[0.625, 0.375, 0.0, 0.0]]))
    cooled = log_distribution(logits, SamplingParams(temperature=0.5, top_k=2)).exp()
    torch.testing.assert_close(cooled, torch.tensor([[0.25 / 0.34, 0.09 / 0.34, 0.0, 0.0]]))


def test_greedy_puts_all_mass_on_the_most_likely_token():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    logprobs = log_distribution(logits, SamplingParams(temperature=0.0))
    assert logprobs.tolist() == [[-math.inf, 0.0, -math.inf]]
    uniforms = torch.tensor([0.999999], dtype=torch.float64)
    assert sample_inverse_cdf(logprobs, uniforms).tolist() == [1]


def test_a_kept_token_survives_every_filter():
    logits = torch.tensor([[5.0, 4.0, -3.0]])
    sampling = SamplingParams(top_k=1, top_p=0.5, min_p=0.5)
    assert log_distribution(logits, sampling)[0, 2] == -math.inf
    kept = log_distribution(logits, sampling, keep=torch.tensor([2]))
    expected = torch.tensor([5.0, -3.0]).log_softmax(-1)
    torch.testing.assert_close(kept[0, [0, 2]], expected)


def excluded_by_definition(logits: list[float], sampling: SamplingParams) -> set[int]:
    """Token by token, in Python's float64."""
    if sampling.temperature == 0:
        return set(range(len(logits))) - {logits.index(max(logits))}
    scaled = [logit / sampling.temperature for logit in logits]
    kept = set(range(len(scaled)))
    if sampling.top_k:
        kept = {v for v in kept if sum(one > scaled[v] for one in scaled) < sampling.top_k}
    mass = {v: math.exp(scaled[v] - max(scaled)) for v in kept}
    left = sampling.top_p * math.fsum(mass.values())
    if sampling.top_p < 1:
        kept = {v for v in kept if math.fsum(m for m in mass.values() if m > mass[v]) < left}
    if sampling.min_p:
        kept = {v for v in kept if scaled[v] >= max(scaled) + math.log(sampling.min_p)}
    return set(range(len(scaled))) - kept


def test_rows_with_filters_of_their_own_keep_what_the_definition_says():
    """More rows than are taken at once, of few different logits: half of all tokens have twins."""
    generator = torch.Generator().manual_seed(3)
    temperatures, filters = (0.0, 0.5, 1.0, 1.6), [*FILTERS, {"top_k": 1}, {"top_k": 99}]
    samplings = [
        SamplingParams(temperature=temperature, **one)
        for temperature, one in itertools.product(temperatures, filters)
    ] * 6
    logits_RV = torch.randint(-8, 9, (len(samplings), 23), generator=generator) * 0.37
    rows = RowSampling(
        temperature=torch.tensor([[one.temperature or 1.0] for one in samplings]),
        top_k=torch.tensor([[one.top_k] for one in samplings]),
        top_p=torch.tensor([[one.top_p] for one in samplings]),
        min_p=torch.tensor([[one.min_p] for one in samplings]),
        is_greedy=torch.tensor([[one.temperature == 0] for one in samplings]),
        largest_top_k=200,
        has_top_p=True,
        has_min_p=True,
        has_greedy=True,
    )
    filtered_RV = logits_RV.clone()
    exclude_tokens_(filtered_RV, rows)
    for logits_V, filtered_V, sampling in zip(logits_RV, filtered_RV, samplings, strict=True):
        excluded = {v for v, logit in enumerate(filtered_V.tolist()) if logit == -math.inf}
        assert excluded == excluded_by_definition(logits_V.double().tolist(), sampling)
        torch.testing.assert_close(
            (filtered_V / (sampling.temperature or 1.0)).log_softmax(-1),
            log_distribution(logits_V, sampling),
        )
    twice_RV = logits_RV[:40].repeat_interleave(3, 0)
    exclude_tokens_(twice_RV, rows.some(slice(40)).repeated(3))
    assert torch.equal(twice_RV, filtered_RV[:40].repeat_interleave(3, 0))


@pytest.mark.parametrize("filters", [{"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.9}, {"top_k": 1}])
def test_tokens_that_are_equally_likely_share_their_fate(filters):
    logits = torch.tensor([0.0, 2.0, 1.0, 2.0, 2.0])
    kept = log_distribution(logits, SamplingParams(**filters)).exp()
    torch.testing.assert_close(kept, torch.tensor([0.0, 1 / 3, 0.0, 1 / 3, 1 / 3]))


@pytest.mark.parametrize("filters", FILTERS)
def test_logits_that_are_no_numbers_are_still_none(filters):
    logits = torch.full((3, 11), math.nan)
    assert log_distribution(logits, SamplingParams(**filters)).isnan().all()


@pytest.mark.parametrize("vocab_size", [2, 7, 1024, 1025, 5000])
def test_inverse_cdf_gives_each_token_its_share_of_the_unit_interval(vocab_size):
    generator = torch.Generator().manual_seed(vocab_size)
    logprobs = (torch.randn(vocab_size, generator=generator) * 2).log_softmax(-1)
    logprobs[vocab_size // 2] = -math.inf
    num_points = 20_000
    uniforms = (torch.arange(num_points, dtype=torch.float64) + 0.5) / num_points
    tokens = torch.cat(
        [sample_inverse_cdf(logprobs.expand(len(u), -1), u) for u in uniforms.split(1000)]
    )
    counts = torch.bincount(tokens, minlength=vocab_size)
    probs = logprobs.double().exp()
    expected = probs / probs.sum() * num_points
    assert (counts - expected).abs().max() <= 1.0
    assert (tokens.diff() >= 0).all()
    assert counts[vocab_size // 2] == 0


@pytest.mark.parametrize("vocab_size", [3, 3000])
def test_a_token_without_probability_is_never_drawn_at_the_ends_of_the_interval(vocab_size):
    logprobs = torch.full((2, vocab_size), -math.inf)
    logprobs[:, 1] = 0.0
    ends = torch.tensor([0.0, 1.0 - 2.0**-53], dtype=torch.float64)
    assert sample_inverse_cdf(logprobs, ends).tolist() == [1, 1]


def reference_uniform(key: int, position: int) -> float:
    """SplitMix64 with Python's integers: state after position + 1 increments, then the mix."""
    mask = (1 << 64) - 1
    state = (key + (position + 1) * 0x9E3779B97F4A7C15) & mask
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    state ^= state >> 31
    return (state >> 11) / 2**53


def test_uniforms_are_the_splitmix64_stream():
    # Published first outputs of SplitMix64 seeded with 1234567.
    first = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    keys = torch.tensor([1234567])
    expected = [(value >> 11) / 2**53 for value in first]
    assert position_uniforms(keys, torch.arange(3)).tolist() == expected
    for key, position in itertools.product((-(2**63), -5, 0, 2**62 + 11), (0, 1, 77, 32_000)):
        ours = position_uniforms(torch.tensor([key]), torch.tensor([position])).item()
        assert ours == reference_uniform(key, position)


def test_uniforms_are_uniform_and_independent_over_positions_samples_and_steps():
    keys = torch.tensor(
        [request_key(0, s, p, i) for s in range(8) for p in range(8) for i in range(8)]
    )
    uniforms = position_uniforms(keys.unsqueeze(1), torch.arange(200))
    counts = torch.histc(uniforms.float(), bins=64, min=0, max=1)
    expected = uniforms.numel() / 64
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 63 + 4 * math.sqrt(2 * 63)
    for other in (uniforms.roll(1, 0), uniforms.roll(1, 1)):
        correlation = torch.corrcoef(torch.stack((uniforms.flatten(), other.flatten())))[0, 1]
        assert abs(correlation) < 4 / math.sqrt(uniforms.numel())


def test_every_part_of_a_rollouts_identity_changes_its_key():
    base = (3, 5, 7, 11)
    keys = {request_key(*base)}
    for place in range(4):
        changed = list(base)
        changed[place] += 1
        keys.add(request_key(*changed))
    assert len(keys) == 5
    assert request_key(1, 23, 4, 5) != request_key(12, 3, 4, 5)


@pytest.mark.parametrize(
    ("bad", "expectation"),
    [
        ({"temperature": -0.1}, "temperature must be >= 0"),
        ({"temperature": math.inf}, "and finite"),
        ({"stop": ("a", "")}, "empty string"),
        ({"top_k": -1}, "top_k must be >= 0"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"min_p": 1.0}, "min_p must be in"),
        ({"max_tokens": 0}, "max_tokens must be >= 1"),
    ],
)
def test_bad_sampling_parameters_are_named(bad, expectation):
    with pytest.raises(ValueError, match=expectation):
        SamplingParams(**bad)
