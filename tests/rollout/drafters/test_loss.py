"""The drafter's loss against a naive reference that takes one pair of one sequence at a time."""

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.drafters.loss import EagleLoss, LossSettings, eagle_loss
from fastrl.rollout.drafters.packing import fold_segments, pack_sequences
from fastrl.types import SequenceFeatures
from tests.rollout.drafters.conftest import HIDDEN_SIZE, VOCAB_SIZE, random_sequences
from tests.rollout.drafters.naive_chains import naive_chains


@pytest.fixture
def sequences() -> list[SequenceFeatures]:
    return random_sequences((7, 3), (3, 1), (10, 6), (5, 2))


def naive_losses(
    drafter: EagleDrafter,
    embedding_VD: Tensor,
    lm_head_VD: Tensor,
    sequences: list[SequenceFeatures],
) -> dict[str, Tensor]:
    """Each response token's prediction from its own prefix, unpacked and without a mask.

    Token `place` is predicted by the last output over tokens 1 … place-1, hidden 0 … place-2.
    """
    smooth_l1s, cross_entropies, agreements, acceptances = [], [], [], []
    for features in sequences:
        tokens, hidden = features.tokens_T, features.hidden_TD
        for place in range(max(features.num_prompt_tokens, 2), len(tokens)):
            predicted = drafter(
                embedding_VD[tokens[1:place]][None],
                hidden[: place - 1][None],
                torch.arange(place - 1)[None],
            )[0, -1]
            for difference in predicted - hidden[place - 1]:
                is_small = abs(difference) < 1
                smooth_l1s.append(difference**2 / 2 if is_small else abs(difference) - 0.5)
            target_logits = [float(row @ hidden[place - 1]) for row in lm_head_VD.detach()]
            normalizer = sum(math.exp(logit) for logit in target_logits)
            target_probs = [math.exp(logit) / normalizer for logit in target_logits]
            draft_logits = [row @ predicted for row in lm_head_VD.detach()]
            log_normalizer = sum(logit.exp() for logit in draft_logits).log()
            cross_entropies.append(
                -sum(
                    p * (logit - log_normalizer)
                    for p, logit in zip(target_probs, draft_logits, strict=True)
                )
            )
            draft_best = max(range(VOCAB_SIZE), key=lambda token: draft_logits[token].item())
            agreements.append(float(target_probs[draft_best] == max(target_probs)))
            acceptances.append(target_probs[draft_best])
    return {
        "hidden": torch.stack(smooth_l1s).mean(),
        "cross_entropy": torch.stack(cross_entropies).mean(),
        "top1_agreement": torch.tensor(agreements).mean(),
        "top1_acceptance": torch.tensor(acceptances).mean(),
    }


def gradients(drafter: EagleDrafter, loss: Tensor) -> dict[str, Tensor]:
    drafter.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in drafter.named_parameters()}


def packed_loss(
    drafter: EagleDrafter,
    shared_weights: tuple[Tensor, Tensor],
    sequences: list[SequenceFeatures],
    **options: int,
) -> EagleLoss:
    packed = pack_sequences(sequences, max_pairs=1000)
    return eagle_loss(drafter, *shared_weights, packed, hidden_loss_weight=0.3, **options)


@pytest.mark.parametrize("max_chunk_logits", [2**24, 3 * VOCAB_SIZE, 1])
def test_packed_loss_and_gradients_equal_the_one_pair_at_a_time_reference(
    drafter: EagleDrafter,
    shared_weights: tuple[Tensor, Tensor],
    sequences: list[SequenceFeatures],
    max_chunk_logits: int,
) -> None:
    naive = naive_losses(drafter, *shared_weights, sequences)
    naive_gradients = gradients(drafter, naive["cross_entropy"] + 0.3 * naive["hidden"])
    result = packed_loss(drafter, shared_weights, sequences, max_chunk_logits=max_chunk_logits)
    for name, expected in naive.items():
        torch.testing.assert_close(getattr(result, name), expected.detach(), msg=name)
    expected_loss = (naive["cross_entropy"] + 0.3 * naive["hidden"]).detach()
    torch.testing.assert_close(result.loss.detach(), expected_loss)
    for name, gradient in gradients(drafter, result.loss).items():
        torch.testing.assert_close(gradient, naive_gradients[name], rtol=1e-4, atol=1e-5)


def naive_loss(
    drafter: EagleDrafter,
    shared_weights: tuple[Tensor, Tensor],
    sequences: list[SequenceFeatures],
    num_depths: int,
) -> Tensor:
    """Chain by chain in float64: each depth's mean, the next counting 0.8 times as much."""
    embedding_VD, lm_head_VD = (weight.detach().double() for weight in shared_weights)
    total, total_weight = torch.zeros((), dtype=torch.float64), 0.0
    for depth in range(1, num_depths + 1):
        losses = []
        for predicted, target in naive_chains(drafter, embedding_VD, sequences, depth):
            distance = (predicted - target).abs()
            smooth_l1 = torch.where(distance < 1, distance**2 / 2, distance - 0.5).mean()
            target_V = (lm_head_VD @ target).softmax(0)
            cross_entropy = -(target_V * (lm_head_VD @ predicted).log_softmax(0)).sum()
            losses.append(cross_entropy + 0.3 * smooth_l1)
        total = total + 0.8 ** (depth - 1) * sum(losses) / len(losses)
        total_weight += 0.8 ** (depth - 1)
    return total / total_weight


@pytest.mark.parametrize("is_folded", [False, True])
@pytest.mark.parametrize("max_chunk_logits", [2**24, 3 * VOCAB_SIZE])
@pytest.mark.parametrize("num_depths", [1, 2, 4])
def test_loss_over_depths_and_its_gradients_equal_the_one_chain_at_a_time_reference(
    drafter: EagleDrafter,
    shared_weights: tuple[Tensor, Tensor],
    sequences: list[SequenceFeatures],
    num_depths: int,
    max_chunk_logits: int,
    is_folded: bool,
) -> None:
    exact = copy.deepcopy(drafter).double()
    sequences_64 = [dataclasses.replace(f, hidden_TD=f.hidden_TD.double()) for f in sequences]
    expected = naive_loss(exact, shared_weights, sequences_64, num_depths)
    packed = pack_sequences(sequences, max_pairs=1000)
    result = eagle_loss(
        drafter,
        *shared_weights,
        fold_segments(packed) if is_folded else packed,
        hidden_loss_weight=0.3,
        num_depths=num_depths,
        max_chunk_logits=max_chunk_logits,
    )
    torch.testing.assert_close(result.loss.detach(), expected.detach().float())
    ours = gradients(drafter, result.loss)
    for name, expected_gradient in gradients(exact, expected).items():
        tolerance = 1e-4 * expected_gradient.abs().max().item()  # float32 through every depth
        gradient = ours[name].double()
        torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=tolerance)


def test_the_parts_are_those_of_depth_1_however_many_are_trained(
    drafter: EagleDrafter, shared_weights: tuple[Tensor, Tensor], sequences: list[SequenceFeatures]
) -> None:
    one = packed_loss(drafter, shared_weights, sequences)
    three = packed_loss(drafter, shared_weights, sequences, num_depths=3)
    for name in ("hidden", "cross_entropy", "top1_agreement", "top1_acceptance"):
        assert torch.equal(getattr(one, name), getattr(three, name)), name
    assert one.loss != three.loss


def test_depths_that_no_chain_reaches_do_not_count(
    drafter: EagleDrafter, shared_weights: tuple[Tensor, Tensor]
) -> None:
    """Two response tokens make two depths, whatever is asked for."""
    sequences = random_sequences((6, 4))
    two, nine = (packed_loss(drafter, shared_weights, sequences, num_depths=n).loss for n in (2, 9))
    assert torch.equal(two, nine)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_depths": 0}, "num_depths must be >= 1, got 0"),
        ({"hidden_weight": -0.1}, "hidden_weight must be >= 0 and finite, got -0.1"),
        ({"hidden_weight": math.inf}, "hidden_weight must be >= 0 and finite, got inf"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossSettings(**options)


def test_a_drafter_that_reproduces_the_target_reaches_its_entropy(
    shared_weights: tuple[Tensor, Tensor], sequences: list[SequenceFeatures]
) -> None:
    """Feed it the targets as predictions: SmoothL1 is 0, agreement 1, cross-entropy the entropy."""
    packed = pack_sequences(sequences, max_pairs=1000)

    class PerfectDrafter(EagleDrafter):
        def forward(self, *args: object, **kwargs: object) -> Tensor:
            return packed.target_hidden_BTD

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    result = eagle_loss(PerfectDrafter(config), *shared_weights, packed, hidden_loss_weight=1.0)
    targets_MD = packed.target_hidden_BTD[packed.loss_mask_BT]
    probs = (targets_MD @ shared_weights[1].detach().T).softmax(-1)
    assert result.hidden.item() == 0
    assert result.top1_agreement.item() == 1
    entropy = torch.distributions.Categorical(probs).entropy().mean()
    torch.testing.assert_close(result.cross_entropy, entropy)
    torch.testing.assert_close(result.top1_acceptance, probs.amax(-1).mean())


def test_embedding_and_lm_head_get_no_gradient(
    drafter: EagleDrafter, shared_weights: tuple[Tensor, Tensor], sequences: list[SequenceFeatures]
) -> None:
    for max_chunk_logits in (2**24, VOCAB_SIZE):
        packed_loss(
            drafter, shared_weights, sequences, max_chunk_logits=max_chunk_logits
        ).loss.backward()
    assert all(weight.grad is None for weight in shared_weights)
    assert all(parameter.grad.abs().sum() > 0 for parameter in drafter.parameters())


def test_backward_keeps_no_logits_of_more_than_a_chunk(
    drafter: EagleDrafter, shared_weights: tuple[Tensor, Tensor], sequences: list[SequenceFeatures]
) -> None:
    """What autograd saves over the vocabulary: all tokens in one chunk, nothing with several."""

    def saved_over_vocabulary(max_chunk_logits: int) -> int:
        sizes = []

        def record(tensor: Tensor) -> Tensor:
            if tensor.ndim == 2 and tensor.shape[1] == VOCAB_SIZE:
                sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            packed_loss(drafter, shared_weights, sequences, max_chunk_logits=max_chunk_logits)
        return sum(sizes)

    assert saved_over_vocabulary(2**24) > 0
    assert saved_over_vocabulary(2 * VOCAB_SIZE) == 0


def test_an_empty_loss_mask_is_refused(
    drafter: EagleDrafter, shared_weights: tuple[Tensor, Tensor]
) -> None:
    prompt_only = SequenceFeatures(
        tokens_T=torch.arange(5),
        hidden_TD=torch.zeros(5, HIDDEN_SIZE),
        num_prompt_tokens=5,
        rl_step=0,
    )
    with pytest.raises(ValueError, match="no response token"):
        packed_loss(drafter, shared_weights, [prompt_only])
