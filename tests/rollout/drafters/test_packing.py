"""Packing: which pairs a sequence gives, which of them the loss counts, and what each may see."""

import dataclasses

import pytest
import torch
from transformers import LlamaConfig

from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.drafters.packing import (
    PackedFeatures,
    fold_segments,
    num_loss_pairs,
    num_pairs,
    pack_sequences,
)
from fastrl.types import SequenceFeatures

HIDDEN_SIZE = 8


def sequence(num_tokens: int, num_prompt_tokens: int, first_token: int = 0) -> SequenceFeatures:
    """Tokens first_token, first_token + 1, …; the hidden state of token i is filled with i."""
    tokens = torch.arange(first_token, first_token + num_tokens)
    return SequenceFeatures(
        tokens_T=tokens,
        hidden_TD=tokens.float().unsqueeze(1).expand(-1, HIDDEN_SIZE).clone(),
        num_prompt_tokens=num_prompt_tokens,
        rl_step=0,
    )


def test_pairs_of_a_hand_worked_sequence() -> None:
    """Tokens 10 … 15, the prompt 10, 11, 12: pairs 1, 2, 3 predict tokens 13, 14, 15."""
    packed = pack_sequences([sequence(6, num_prompt_tokens=3, first_token=10)], max_pairs=100)
    assert packed.hidden_BTD[0, :, 0].tolist() == [10, 11, 12, 13]
    assert packed.next_tokens_BT[0].tolist() == [11, 12, 13, 14]
    assert packed.target_hidden_BTD[0, :, 0].tolist() == [11, 12, 13, 14]
    assert packed.position_ids_BT[0].tolist() == [0, 1, 2, 3]
    assert packed.loss_mask_BT[0].tolist() == [False, True, True, True]


@pytest.mark.parametrize(
    ("num_tokens", "num_prompt_tokens"), [(1, 1), (2, 1), (3, 1), (3, 3), (9, 0), (9, 1), (9, 6)]
)
def test_counts_are_those_of_the_packed_row(num_tokens: int, num_prompt_tokens: int) -> None:
    features = sequence(num_tokens, num_prompt_tokens)
    other = sequence(3, num_prompt_tokens=2)
    packed = pack_sequences([features, other], max_pairs=100)
    assert len(packed) == num_pairs(features) + 1
    assert int(packed.loss_mask_BT.sum()) == num_loss_pairs(features) + 1


def test_the_last_hidden_state_is_not_needed() -> None:
    """Engines return none for it, the training forward does: the row is the same."""
    whole = sequence(7, num_prompt_tokens=2)
    decoded = SequenceFeatures(
        tokens_T=whole.tokens_T, hidden_TD=whole.hidden_TD[:-1], num_prompt_tokens=2, rl_step=0
    )
    of_whole, of_decoded = pack_sequences([whole], 100), pack_sequences([decoded], 100)
    assert torch.equal(of_whole.target_hidden_BTD, of_decoded.target_hidden_BTD)
    assert torch.equal(of_whole.hidden_BTD, of_decoded.hidden_BTD)


def test_segments_restart_positions_and_no_pair_crosses_them() -> None:
    packed = pack_sequences(
        [sequence(5, 1, first_token=100), sequence(2, 1), sequence(4, 3, first_token=200)], 100
    )
    assert packed.position_ids_BT[0].tolist() == [0, 1, 2, 0, 1]
    assert packed.segment_BT[0].tolist() == [0, 0, 0, 1, 1]
    assert packed.hidden_BTD[0, :, 0].tolist() == [100, 101, 102, 200, 201]
    assert packed.target_hidden_BTD[0, :, 0].tolist() == [101, 102, 103, 201, 202]
    assert packed.next_tokens_BT[0].tolist() == [101, 102, 103, 201, 202]


def test_mask_is_block_diagonal_and_causal() -> None:
    """Against the definition, entry by entry."""
    packed = pack_sequences([sequence(5, 1), sequence(4, 1), sequence(3, 1)], max_pairs=100)
    mask = packed.attention_mask()
    segments = packed.segment_BT[0].tolist()
    for query in range(len(packed)):
        for key in range(len(packed)):
            may_see = segments[query] == segments[key] and key <= query
            assert bool(mask[0, 0, query, key]) == may_see, (query, key)


def test_a_row_has_no_padding_and_keeps_its_bound() -> None:
    """Six pairs fit into 8, the 4 of the second do not, and it is left out whole."""
    sequences = [sequence(8, 1), sequence(6, 1), sequence(3, 1)]
    packed = pack_sequences(sequences, max_pairs=8)
    assert len(packed) == 6
    assert len(pack_sequences(sequences, max_pairs=10)) == 10


def test_a_sequence_longer_than_the_row_keeps_its_latest_pairs_and_true_positions() -> None:
    packed = pack_sequences([sequence(10, num_prompt_tokens=6)], max_pairs=5)
    assert packed.position_ids_BT[0].tolist() == [3, 4, 5, 6, 7]
    assert packed.hidden_BTD[0, :, 0].tolist() == [3, 4, 5, 6, 7]
    assert packed.target_hidden_BTD[0, :, 0].tolist() == [4, 5, 6, 7, 8]
    assert packed.loss_mask_BT[0].tolist() == [False, True, True, True, True]


def test_bad_rows_are_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"at least 3 tokens.*got \[2\]"):
        pack_sequences([sequence(2, 1)], max_pairs=10)
    with pytest.raises(ValueError, match="max_pairs must be >= 1, got 0"):
        pack_sequences([sequence(5, 1)], max_pairs=0)
    short = SequenceFeatures(
        tokens_T=torch.arange(6), hidden_TD=torch.zeros(4, 2), num_prompt_tokens=1, rl_step=0
    )
    with pytest.raises(ValueError, match="6 tokens has 4 hidden states"):
        pack_sequences([short], max_pairs=10)


@pytest.fixture
def drafter() -> EagleDrafter:
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    return EagleDrafter.for_target(config, seed=0)


def drafted(
    drafter: EagleDrafter, sequences: list[SequenceFeatures], embedding_VD: torch.Tensor
) -> torch.Tensor:
    packed = pack_sequences(sequences, max_pairs=100)
    with torch.no_grad():
        return drafter(
            embedding_VD[packed.next_tokens_BT],
            packed.hidden_BTD,
            packed.position_ids_BT,
            attention_mask=packed.attention_mask(),
        )[0]


@pytest.mark.parametrize("changed", ["token", "hidden"])
def test_future_and_other_segments_do_not_change_an_output(
    drafter: EagleDrafter, changed: str
) -> None:
    """Change token or hidden state 4 of the middle sequence of three.

    Of its pairs only 3 (which has token 4) or 4 (hidden state 4) and later ones may differ.
    """
    generator = torch.Generator().manual_seed(1)
    embedding_VD = torch.randn(11, HIDDEN_SIZE, generator=generator)
    sequences = [
        SequenceFeatures(
            tokens_T=torch.randint(11, (8,), generator=generator),
            hidden_TD=torch.randn(8, HIDDEN_SIZE, generator=generator),
            num_prompt_tokens=2,
            rl_step=0,
        )
        for _ in range(3)
    ]
    before = drafted(drafter, sequences, embedding_VD)
    if changed == "token":
        sequences[1].tokens_T[4] = (sequences[1].tokens_T[4] + 1) % 11
        first_affected = 6 + 3
    else:
        sequences[1].hidden_TD[4] += 1
        first_affected = 6 + 4
    after = drafted(drafter, sequences, embedding_VD)
    differs = (before != after).any(-1)
    assert not differs[:first_affected].any()
    assert differs[first_affected:12].all()
    assert not differs[12:].any()


def test_folding_fills_rows_of_the_longest_segments_length_first_fit() -> None:
    """Segments of 3, 5, 1, 2 pairs: the longest, then 3 with 2, then 1 in a row of its own."""
    packed = pack_sequences([sequence(n + 2, 1) for n in (3, 5, 1, 2)], max_pairs=100)
    folded = fold_segments(packed)
    assert folded.segment_BT.tolist() == [
        [1, 1, 1, 1, 1],
        [0, 0, 0, 3, 3],
        [2, -1, -1, -1, -1],
    ]
    assert folded.position_ids_BT.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 1], [0] * 5]


def test_folding_keeps_every_pair_and_adds_none_to_the_loss() -> None:
    packed = pack_sequences(
        [sequence(n, n // 2, first_token=100 * n) for n in (7, 4, 9, 3, 5)], max_pairs=100
    )

    def pairs(features: PackedFeatures) -> list[tuple[float, ...]]:
        is_pair_BT = features.segment_BT >= 0
        columns = [getattr(features, f.name)[is_pair_BT] for f in dataclasses.fields(features)]
        flat = [column.double().reshape(len(column), -1)[:, 0].tolist() for column in columns]
        return sorted(zip(*flat, strict=True))

    folded = fold_segments(packed)
    assert folded.next_tokens_BT.shape[1] == 7
    assert pairs(folded) == pairs(packed)
    assert not folded.loss_mask_BT[folded.segment_BT < 0].any()
    assert not folded.hidden_BTD[folded.segment_BT < 0].any()


def test_one_segment_is_folded_into_itself() -> None:
    packed = pack_sequences([sequence(9, 2)], max_pairs=100)
    folded = fold_segments(packed)
    for f in dataclasses.fields(packed):
        assert torch.equal(getattr(folded, f.name), getattr(packed, f.name)), f.name


def test_targets_may_be_kept_narrower_than_what_is_read() -> None:
    sequences = [sequence(7, 2), sequence(4, 1, first_token=100)]
    whole, narrow = (pack_sequences(sequences, 100, size) for size in (None, 1))
    assert whole.target_hidden_BTD.shape[-1] == HIDDEN_SIZE > 1
    assert torch.equal(narrow.target_hidden_BTD, whole.target_hidden_BTD[..., :1])
    assert torch.equal(narrow.hidden_BTD, whole.hidden_BTD)
