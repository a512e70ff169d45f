"""Token log-probabilities against a naive float64 loop, whatever the chunks; what they save."""

import math

import pytest
import torch
from torch import Tensor, nn

from fastrl.modules.logprobs import entropy_of, response_logprobs
from fastrl.types import SamplingParams

V, D = 11, 6
SAMPLINGS = [
    SamplingParams(),
    SamplingParams(temperature=0.6),
    SamplingParams(top_k=3),
    SamplingParams(temperature=1.3, top_p=0.7),
    SamplingParams(temperature=0.8, top_k=6, top_p=0.9, min_p=0.1),
]


def case(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, nn.Linear]:
    """Hidden states, tokens, a ragged response mask, a head."""
    generator = torch.Generator().manual_seed(seed)
    hidden_BTD = torch.randn(3, 9, D, generator=generator)
    tokens_BT = torch.randint(V, (3, 9), generator=generator)
    starts, ends = torch.tensor([[2], [4], [1]]), torch.tensor([[9], [5], [6]])
    places = torch.arange(9)
    torch.manual_seed(seed)
    return hidden_BTD, tokens_BT, (places >= starts) & (places < ends), nn.Linear(D, V, bias=False)


def naive_distribution(logits: list[float], sampling: SamplingParams, keep: int) -> list[float]:
    """Probabilities, filter by filter, in Python floats; `keep` survives every filter."""
    scaled = [x / sampling.temperature for x in logits]
    order = sorted(range(len(scaled)), key=lambda v: -scaled[v])
    alive = set(order[: sampling.top_k] if sampling.top_k else order)
    mass = sum(math.exp(scaled[v]) for v in alive)
    before, by_top_p = 0.0, set()
    for v in (v for v in order if v in alive):
        if before < sampling.top_p:
            by_top_p.add(v)
        before += math.exp(scaled[v]) / mass
    floor = scaled[order[0]] + math.log(sampling.min_p) if sampling.min_p else -math.inf
    alive = {v for v in by_top_p if scaled[v] >= floor} | {keep}
    mass = sum(math.exp(scaled[v]) for v in alive)
    return [math.exp(x) / mass if v in alive else 0.0 for v, x in enumerate(scaled)]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("logits_per_chunk", [1, 4 * V, 1000 * V])
def test_logprobs_and_entropy_equal_a_naive_loop(
    sampling: SamplingParams, logits_per_chunk: int
) -> None:
    hidden_BTD, tokens_BT, mask_BT, head = case()
    logprobs_BT, entropy_BT = response_logprobs(
        hidden_BTD,
        tokens_BT,
        mask_BT,
        head,
        sampling,
        vocab_size=V,
        logits_per_chunk=logits_per_chunk,
    )
    logits_BTV = (hidden_BTD.double() @ head.weight.double().T).tolist()
    for b, t in ((b, t) for b in range(3) for t in range(9)):
        if not mask_BT[b, t]:
            assert logprobs_BT[b, t] == entropy_BT[b, t] == 0
            continue
        token = int(tokens_BT[b, t])
        probs = naive_distribution(logits_BTV[b][t - 1], sampling, token)
        entropy = -sum(p * math.log(p) for p in probs if p)
        assert logprobs_BT[b, t].item() == pytest.approx(math.log(probs[token]), abs=1e-5)
        assert entropy_BT[b, t].item() == pytest.approx(entropy, abs=1e-5)


def gradients(sampling: SamplingParams, logits_per_chunk: int) -> tuple[Tensor, Tensor]:
    """Of a random combination of log-probabilities and entropies: to hidden states and head."""
    hidden_BTD, tokens_BT, mask_BT, head = case()
    hidden_BTD.requires_grad_()
    outputs = response_logprobs(
        hidden_BTD,
        tokens_BT,
        mask_BT,
        head,
        sampling,
        vocab_size=V,
        has_entropy_gradient=True,
        logits_per_chunk=logits_per_chunk,
    )
    weights = torch.randn(2, *mask_BT.shape, generator=torch.Generator().manual_seed(3))
    (torch.stack(outputs) * weights).sum().backward()
    assert hidden_BTD.grad is not None
    assert head.weight.grad is not None
    return hidden_BTD.grad, head.weight.grad


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("logits_per_chunk", [1, 4 * V])
def test_gradients_do_not_depend_on_chunks(sampling: SamplingParams, logits_per_chunk: int) -> None:
    chunked, whole = gradients(sampling, logits_per_chunk), gradients(sampling, 1000 * V)
    for given, expected in zip(chunked, whole, strict=True):
        assert expected.isfinite().all()
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-6)


def test_gradient_is_that_of_plain_log_softmax() -> None:
    hidden_BTD, tokens_BT, mask_BT, head = case()
    logprobs_BT, _ = response_logprobs(
        hidden_BTD, tokens_BT, mask_BT, head, SamplingParams(temperature=0.5), vocab_size=V
    )
    (given,) = torch.autograd.grad(logprobs_BT.square().sum(), head.weight)
    plain = (head(hidden_BTD[:, :-1]) / 0.5).log_softmax(-1)
    plain = plain.gather(-1, tokens_BT[:, 1:, None]).squeeze(-1)[mask_BT[:, 1:]]
    (expected,) = torch.autograd.grad(plain.square().sum(), head.weight)
    torch.testing.assert_close(given, expected)


def test_a_sampled_token_that_the_filters_now_drop_keeps_a_finite_logprob() -> None:
    hidden_BTD, _, mask_BT, head = case()
    least_likely_BT = head(hidden_BTD).argmin(-1).roll(1, dims=1)
    logprobs_BT, _ = response_logprobs(
        hidden_BTD, least_likely_BT, mask_BT, head, SamplingParams(top_k=1), vocab_size=V
    )
    assert logprobs_BT.isfinite().all()
    assert (logprobs_BT[mask_BT] < 0).all()


def test_chunks_save_no_logits_for_the_backward() -> None:
    num_tokens, vocab_size = 200, 5000
    head = nn.Linear(D, vocab_size, bias=False)
    hidden_BTD = torch.randn(1, num_tokens + 1, D, requires_grad=True)
    tokens_BT = torch.randint(vocab_size, (1, num_tokens + 1))
    mask_BT = torch.arange(num_tokens + 1)[None] > 0

    def largest_saved(logits_per_chunk: int) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda saved: (sizes.append(saved.numel()), saved)[1], lambda saved: saved
        ):
            response_logprobs(
                hidden_BTD,
                tokens_BT,
                mask_BT,
                head,
                SamplingParams(temperature=0.9),
                vocab_size=vocab_size,
                has_entropy_gradient=True,
                logits_per_chunk=logits_per_chunk,
            )
        return max(sizes)

    assert largest_saved(num_tokens * vocab_size) >= num_tokens * vocab_size
    assert largest_saved(10 * vocab_size) <= head.weight.numel()


def test_entropy_counts_excluded_tokens_as_nothing() -> None:
    logits = torch.tensor([0.0, 0.0, 0.0], requires_grad=True)
    excluded = torch.tensor([False, False, True])
    entropy = entropy_of(logits.masked_fill(excluded, -math.inf).log_softmax(-1))
    assert entropy.item() == pytest.approx(math.log(2))
    (gradient,) = torch.autograd.grad(entropy, logits)
    assert gradient.isfinite().all()
