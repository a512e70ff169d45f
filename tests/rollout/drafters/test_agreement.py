"""Self-fed agreement by depth against the naive reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastrl.rollout.drafters.agreement import agreement_by_depth
from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.drafters.loss import eagle_loss
from fastrl.rollout.drafters.packing import pack_sequences
from fastrl.types import SequenceFeatures
from tests.rollout.drafters.conftest import random_sequences
from tests.rollout.drafters.naive_chains import naive_chains


def naive_agreement(
    drafter: EagleDrafter,
    embedding_VD: Tensor,
    lm_head_VD: Tensor,
    sequences: list[SequenceFeatures],
    depth: int,
) -> tuple[int, float, float]:
    """Chains that reach the depth, their mean cross-entropy and top-1 acceptance there."""
    cross_entropies, acceptances = [], []
    for output, target in naive_chains(drafter, embedding_VD, sequences, depth):
        target_V = (lm_head_VD @ target).softmax(0)
        draft_V = (lm_head_VD @ output).log_softmax(0)
        cross_entropies.append(float(-(target_V * draft_V).sum()))
        acceptances.append(float(target_V[draft_V.argmax()]))
    num_chains = len(acceptances)
    return num_chains, sum(cross_entropies) / num_chains, sum(acceptances) / num_chains


def test_agreement_at_every_depth_equals_the_one_token_at_a_time_reference(
    drafter: EagleDrafter, shared_weights: tuple[Tensor, Tensor]
) -> None:
    """Sequences that end at different depths, one of them without a prompt, in one packed row."""
    sequences = random_sequences((9, 3), (4, 1), (12, 7), (6, 5), (5, 0))
    packed = pack_sequences(sequences, max_pairs=1000)
    agreements = agreement_by_depth(drafter, *shared_weights, packed, max_depth=6)
    assert len(agreements) == 6
    for depth, agreement in enumerate(agreements, start=1):
        with torch.no_grad():
            expected = naive_agreement(drafter, *shared_weights, sequences, depth)
        assert agreement.num_chains == expected[0]
        assert agreement.cross_entropy == pytest.approx(expected[1], rel=1e-4)
        assert agreement.top1_acceptance == pytest.approx(expected[2], rel=1e-4)


def test_depth_1_is_what_the_loss_counts(
    drafter: EagleDrafter, shared_weights: tuple[Tensor, Tensor]
) -> None:
    packed = pack_sequences(random_sequences((9, 3), (12, 7)), max_pairs=1000)
    (agreement,) = agreement_by_depth(drafter, *shared_weights, packed, max_depth=1)
    loss = eagle_loss(drafter, *shared_weights, packed, hidden_loss_weight=1.0)
    assert agreement.num_chains == packed.loss_mask_BT.sum()
    assert agreement.cross_entropy == pytest.approx(loss.cross_entropy.item(), rel=1e-5)
    assert agreement.top1_acceptance == pytest.approx(loss.top1_acceptance.item(), rel=1e-5)


def test_depths_that_no_chain_reaches_are_left_out(
    drafter: EagleDrafter, shared_weights: tuple[Tensor, Tensor]
) -> None:
    """Two response tokens: no third draft could be right or wrong, even past the row's end."""
    packed = pack_sequences(random_sequences((6, 4)), max_pairs=1000)
    agreements = agreement_by_depth(drafter, *shared_weights, packed, max_depth=6)
    assert [agreement.num_chains for agreement in agreements] == [2, 1]


def test_nothing_is_left_for_a_gradient(
    drafter: EagleDrafter, shared_weights: tuple[Tensor, Tensor]
) -> None:
    """No graph is built, whose activations would stay in memory."""
    seen: list[bool] = []
    handle = drafter.register_forward_hook(lambda *args: seen.append(args[2].requires_grad))
    packed = pack_sequences(random_sequences((9, 3)), max_pairs=1000)
    agreement_by_depth(drafter, *shared_weights, packed, max_depth=2)
    handle.remove()
    assert seen == [False, False]
