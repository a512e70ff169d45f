"""Chains of a whole row at once against chains one by one, values and gradients, in float64."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from fastrl.rollout.drafters.chain import chain_depths
from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.drafters.eagle3 import Eagle3Drafter
from fastrl.rollout.drafters.loss import eagle_loss
from fastrl.rollout.drafters.packing import fold_segments, pack_sequences
from tests.rollout.drafters.conftest import HIDDEN_SIZE, VOCAB_SIZE, random_sequences
from tests.rollout.drafters.naive_chains import naive_chains

SIZES = ((9, 3), (4, 1), (12, 7), (6, 5), (5, 0))
"""Tokens and prompt tokens: they end at different depths, one is without a prompt."""


def gradients(drafter: EagleDrafter, value: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(drafter.parameters()), retain_graph=True))


@pytest.mark.parametrize("is_folded", [False, True])
def test_every_depth_and_its_gradients_equal_the_one_chain_at_a_time_reference(
    drafter: EagleDrafter, shared_weights: tuple[Tensor, Tensor], is_folded: bool
) -> None:
    """To double precision; a random weight on each output tells all gradients apart."""
    drafter, embedding_VD = copy.deepcopy(drafter).double(), shared_weights[0].double()
    sequences = [
        dataclasses.replace(f, hidden_TD=f.hidden_TD.double()) for f in random_sequences(*SIZES)
    ]
    packed = pack_sequences(sequences, max_pairs=1000)
    if is_folded:
        packed = fold_segments(packed)
    weights_D = torch.randn(packed.hidden_BTD.shape[-1], dtype=torch.float64)
    depths = list(chain_depths(drafter, embedding_VD, packed, max_depth=5))
    assert len(depths) == 5
    for depth, chains in enumerate(depths, start=1):
        naive = naive_chains(drafter, embedding_VD, sequences, depth)
        predicted_MD = torch.stack([predicted for predicted, _ in naive])
        target_MD = torch.stack([target for _, target in naive])
        # Folding changes the order of sequences: sorted by target, which is random, both agree.
        ours, theirs = chains.target_MD[:, 0].argsort(), target_MD[:, 0].argsort()
        assert len(chains) == len(naive)
        torch.testing.assert_close(chains.target_MD[ours], target_MD[theirs])
        torch.testing.assert_close(chains.predicted_MD[ours], predicted_MD[theirs])
        torch.testing.assert_close(
            gradients(drafter, (chains.predicted_MD.sin() @ weights_D).sum()),
            gradients(drafter, (predicted_MD.sin() @ weights_D).sum()),
        )


def test_depth_1_is_the_plain_forward_to_the_bit(
    drafter: EagleDrafter, shared_weights: tuple[Tensor, Tensor]
) -> None:
    """EAGLE's own training forward, under a mask and without a view; its gradients too."""
    packed = pack_sequences(random_sequences(*SIZES), max_pairs=1000)
    embeddings_BTD = shared_weights[0].detach()[packed.next_tokens_BT]
    plain_MD = drafter(
        embeddings_BTD,
        packed.hidden_BTD,
        packed.position_ids_BT,
        attention_mask=packed.attention_mask(),
    )[packed.loss_mask_BT]
    (chains,) = chain_depths(drafter, shared_weights[0], packed, max_depth=1)
    assert torch.equal(chains.predicted_MD, plain_MD)
    of_chains, of_plain = (
        gradients(drafter, x.square().sum()) for x in (chains.predicted_MD, plain_MD)
    )
    assert all(map(torch.equal, of_chains, of_plain))


@pytest.mark.parametrize("kind", [EagleDrafter, Eagle3Drafter])
def test_what_padding_contains_changes_neither_output_nor_gradient(
    shared_weights: tuple[Tensor, Tensor], kind: type[EagleDrafter]
) -> None:
    """To the bit, of a folded row whose padding holds other tokens, states and positions."""
    drafter = kind.for_target(CONFIG, seed=0)
    sequences = random_sequences(*SIZES)
    wide = [
        dataclasses.replace(f, hidden_TD=f.hidden_TD.repeat(1, drafter.state_size // HIDDEN_SIZE))
        for f in sequences
    ]
    folded = fold_segments(pack_sequences(wide, max_pairs=1000))
    is_padding_BT = folded.segment_BT < 0
    assert is_padding_BT.any()
    generator = torch.Generator().manual_seed(3)
    filled = dataclasses.replace(
        folded,
        next_tokens_BT=folded.next_tokens_BT.masked_fill(is_padding_BT, 7),
        position_ids_BT=folded.position_ids_BT.masked_fill(is_padding_BT, 5),
        hidden_BTD=torch.where(
            is_padding_BT.unsqueeze(-1),
            torch.randn(folded.hidden_BTD.shape, generator=generator),
            folded.hidden_BTD,
        ),
        target_hidden_BTD=torch.where(
            is_padding_BT.unsqueeze(-1),
            torch.randn(folded.target_hidden_BTD.shape, generator=generator),
            folded.target_hidden_BTD,
        ),
    )
    losses = []
    for packed in (folded, filled):
        depths = list(chain_depths(drafter, shared_weights[0], packed, max_depth=4))
        loss = eagle_loss(
            drafter, *shared_weights, packed, hidden_loss_weight=0.5, num_depths=3, top_k=2
        ).loss
        trained = torch.autograd.grad(loss, list(drafter.parameters()))
        losses.append([*(d.predicted_MD for d in depths), *(d.target_MD for d in depths), *trained])
        losses[-1].append(loss.detach())
    assert len(losses[0]) == len(losses[1])
    for plain, with_padding in zip(*losses, strict=True):
        assert torch.equal(plain, with_padding)


CONFIG = LlamaConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=HIDDEN_SIZE,
    intermediate_size=16,
    num_hidden_layers=7,
    num_attention_heads=2,
    num_key_value_heads=1,
    initializer_range=0.5,
)


def test_depths_that_no_chain_reaches_are_left_out(
    drafter: EagleDrafter, shared_weights: tuple[Tensor, Tensor]
) -> None:
    """Two response tokens: no third draft could be right or wrong, even past the row's end."""
    packed = pack_sequences(random_sequences((6, 4)), max_pairs=1000)
    depths = chain_depths(drafter, shared_weights[0], packed, max_depth=6)
    assert [len(chains) for chains in depths] == [2, 1]
