"""Objectives against hand-worked numbers; KL estimators by enumeration of a small vocabulary."""

import math

import pytest
import torch

from fastrl.modules.objectives import (
    Aggregation,
    KLEstimator,
    clipped_objective,
    kl_estimate,
    token_weights,
)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "is_clipped", "gradient"),
    [
        (1.0, 2.0, -2.0, False, -2.0),
        (1.1, 2.0, -2.2, False, -2.2),
        (1.5, 2.0, -2 * 1.3, True, 0.0),  # up, but already above 1 + clip_high
        (1.5, -2.0, 3.0, False, 3.0),  # down from above: never clipped
        (0.5, 2.0, -1.0, False, -1.0),  # up from below: never clipped
        (0.5, -2.0, 2 * 0.8, True, 0.0),  # down, but already below 1 - clip_low
    ],
)
def test_clipped_objective_by_hand(
    ratio: float, advantage: float, loss: float, is_clipped: bool, gradient: float
) -> None:
    policy = torch.tensor([math.log(ratio) - 1.5], requires_grad=True)
    given, clipped = clipped_objective(
        policy, torch.tensor([-1.5]), torch.tensor([advantage]), clip_low=0.2, clip_high=0.3
    )
    given.sum().backward()
    assert given.item() == pytest.approx(loss, rel=1e-5)
    assert clipped.tolist() == [is_clipped]
    assert policy.grad is not None
    assert policy.grad.item() == pytest.approx(gradient, rel=1e-5)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [("k1", math.log(2)), ("k2", math.log(2) ** 2 / 2), ("k3", 0.5 - 1 + math.log(2))],
)
def test_kl_estimates_by_hand(estimator: KLEstimator, expected: float) -> None:
    # The policy gives the token 0.8, the reference 0.4: r = 1/2.
    policy, reference = torch.tensor([math.log(0.8)]), torch.tensor([math.log(0.4)])
    assert kl_estimate(policy, reference, estimator).item() == pytest.approx(expected, rel=1e-5)


def enumerated(estimator: KLEstimator) -> tuple[torch.Tensor, ...]:
    """Expected estimate and expected gradient over a 7-token vocabulary, and both true KLs."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(7, generator=generator, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(7, generator=generator, dtype=torch.float64).log_softmax(-1)
    policy = logits.log_softmax(-1)
    probs = policy.exp().detach()  # tokens are sampled: no gradient through how they were chosen
    value = (probs * kl_estimate(policy, reference, estimator)).sum()
    (gradient,) = torch.autograd.grad(value, logits, retain_graph=True)
    forward_kl = (policy.exp() * (policy - reference)).sum()
    reverse_kl = (reference.exp() * (reference - policy)).sum()
    (forward_gradient,) = torch.autograd.grad(forward_kl, logits, retain_graph=True)
    (reverse_gradient,) = torch.autograd.grad(reverse_kl, logits)
    return value, gradient, forward_kl, forward_gradient, reverse_gradient


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator: KLEstimator) -> None:
    value, _, kl, _, _ = enumerated(estimator)
    torch.testing.assert_close(value, kl)


def test_k2_is_biased_as_a_value() -> None:
    value, _, kl, _, _ = enumerated("k2")
    assert (value - kl).abs() > 0.01


@pytest.mark.parametrize("estimator", ["k1", "k2"])
def test_k1_and_k2_have_the_gradient_of_kl_policy_reference(estimator: KLEstimator) -> None:
    _, gradient, _, forward_gradient, _ = enumerated(estimator)
    torch.testing.assert_close(gradient, forward_gradient)


def test_k3_has_the_gradient_of_kl_reference_policy() -> None:
    _, gradient, _, forward_gradient, reverse_gradient = enumerated("k3")
    torch.testing.assert_close(gradient, reverse_gradient)
    assert (gradient - forward_gradient).abs().max() > 0.01


def test_k3_is_never_negative() -> None:
    policy, reference = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0)) - 3
    assert kl_estimate(policy, reference, "k3").min() >= 0
    assert kl_estimate(policy, reference, "k1").min() < 0


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        # Losses 1, 2, 3 in one row and 10 in another; longest response 8.
        ("token-mean", (1 + 2 + 3 + 10) / 4),
        ("sequence-mean", ((1 + 2 + 3) / 3 + 10) / 2),
        ("constant", (1 + 2 + 3 + 10) / (2 * 8)),
    ],
)
def test_aggregation_by_hand(aggregation: Aggregation, expected: float) -> None:
    mask_BT = torch.tensor([[False, True, True, True], [False, False, True, False]])
    loss_BT = torch.tensor([[99.0, 1.0, 2.0, 3.0], [99.0, 99.0, 10.0, 99.0]])
    weights_BT = token_weights(mask_BT, aggregation, num_rows=2, num_tokens=4, max_tokens=8)
    assert (weights_BT * loss_BT).sum().item() == pytest.approx(expected)
    first, second = (
        token_weights(mask_BT[[row]], aggregation, num_rows=2, num_tokens=4, max_tokens=8)
        for row in (0, 1)
    )
    assert torch.equal(torch.cat([first, second]), weights_BT)  # a rank each
