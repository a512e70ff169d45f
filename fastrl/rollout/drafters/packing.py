"""Packs sequences of target features into one padding-free row for the drafter's training.

Pair t of a sequence of n tokens: input (embedding of token t+1, hidden state t), targets hidden
state t+1 and, through the LM head, the distribution of token t+2. The pairs are t = 0 … n-3: the
last predicts the distribution of the last token. Pair n-2 would predict what follows the end, which
serving never asks for; so the hidden state of the last token, which decoding does not compute, is
not needed either.

Loss mask: pairs whose predicted distribution is of a response token, the end-of-sequence token
included: num_prompt_tokens <= t+2 <= n-1. Earlier pairs are context. A segment is a sequence's
pairs; positions count from the sequence's start, as in serving, and no pair sees another segment.

`fold_segments` lays the same segments out in several shorter rows, whose attention costs less.
Leaves out attention kernels that skip masked blocks. Shape legend: fastrl/types.py; B is 1 until a
row is folded, T counts pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastrl.types import SequenceFeatures


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedFeatures:
    """Pairs of several sequences, one after the other in one row; in several once folded."""

    next_tokens_BT: Tensor  # int64: token t+1
    hidden_BTD: Tensor  # hidden state t, with what else the drafter reads of the target
    target_hidden_BTD: Tensor  # the same of t+1, or its first columns
    position_ids_BT: Tensor  # int64: t
    segment_BT: Tensor  # int64: 0, 1, …, one number a sequence; -1: padding of a folded row
    loss_mask_BT: Tensor  # bool: predicts the distribution of a response token

    def __len__(self) -> int:
        return self.next_tokens_BT.shape[1]

    def to(
        self,
        device: torch.device | str,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
    ) -> PackedFeatures:
        """The same row on `device`, its hidden states as `dtype` if one is given; of a pinned row
        `non_blocking` does not wait."""
        return PackedFeatures(
            **{
                name: tensor.to(
                    device,
                    dtype if tensor.is_floating_point() else None,
                    non_blocking=non_blocking,
                )
                for name, tensor in self._tensors().items()
            }
        )

    def pin_memory(self) -> PackedFeatures:
        """The same row where a GPU reads it without a wait; one on a GPU stays there."""
        return PackedFeatures(
            **{
                name: tensor if tensor.is_cuda else tensor.pin_memory()
                for name, tensor in self._tensors().items()
            }
        )

    def _tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def attention_mask(self) -> Tensor:
        """[B, 1, T, T] bool, True where a query may see a key: same segment, not later."""
        same_segment = self.segment_BT[:, :, None] == self.segment_BT[:, None, :]
        return same_segment.tril().unsqueeze(1)


def num_pairs(features: SequenceFeatures) -> int:
    """Pairs a sequence gives, context included; 0 for one of fewer than 3 tokens."""
    return max(len(features) - 2, 0)


def num_loss_pairs(features: SequenceFeatures) -> int:
    """Pairs that the loss counts: one a response token (from the sequence's third token on)."""
    return max(len(features) - max(features.num_prompt_tokens, 2), 0)


def pack_sequences(
    sequences: Sequence[SequenceFeatures], max_pairs: int, target_size: int | None = None
) -> PackedFeatures:
    """One row of at most `max_pairs` pairs.

    Sequences are taken in order while they fit whole. A first one that is longer than the row is
    cut to its latest pairs, positions kept: speculation pays most far into long responses.

    Args:
        sequences: of one target.
        max_pairs: of the row.
        target_size: columns of the targets that are kept, where the drafter reads more than the
            last hidden state and predicts that alone; None: all.

    Raises:
        ValueError: no pair to pack, `max_pairs` below 1, or hidden states missing.
    """
    if max_pairs < 1:
        raise ValueError(f"max_pairs must be >= 1, got {max_pairs}")
    segments: list[PackedFeatures] = []
    room = max_pairs
    for features in sequences:
        if num_pairs(features) == 0:
            continue
        first_pair = 0 if segments else max(num_pairs(features) - max_pairs, 0)
        if num_pairs(features) - first_pair > room:
            break
        segments.append(_segment(features, first_pair, len(segments), target_size))
        room -= len(segments[-1])
    if not segments:
        raise ValueError(
            f"nothing to pack: expected a sequence of at least 3 tokens, which one pair needs, got "
            f"{[len(features) for features in sequences]}"
        )
    names = [f.name for f in dataclasses.fields(PackedFeatures)]
    return PackedFeatures(
        **{name: torch.cat([getattr(s, name) for s in segments], dim=1) for name in names}
    )


def _segment(
    features: SequenceFeatures, first_pair: int, number: int, target_size: int | None
) -> PackedFeatures:
    """Pairs `first_pair` … n-3 of one sequence, as a row of their own."""
    num_tokens = len(features)
    if features.hidden_TD.shape[0] < num_tokens - 1:
        raise ValueError(
            f"a sequence of {num_tokens} tokens has {features.hidden_TD.shape[0]} hidden states, "
            f"expected one a token (the last token's may be missing)"
        )
    pairs = slice(first_pair, num_tokens - 2)
    shifted = slice(first_pair + 1, num_tokens - 1)
    position_ids = torch.arange(num_tokens - 2, device=features.tokens_T.device)[pairs]
    return PackedFeatures(
        next_tokens_BT=features.tokens_T[shifted].unsqueeze(0),
        hidden_BTD=features.hidden_TD[pairs].unsqueeze(0),
        target_hidden_BTD=features.hidden_TD[shifted, :target_size].unsqueeze(0),
        position_ids_BT=position_ids.unsqueeze(0),
        segment_BT=torch.full_like(position_ids, number).unsqueeze(0),
        loss_mask_BT=(position_ids + 2 >= features.num_prompt_tokens).unsqueeze(0),
    )


def fold_segments(packed: PackedFeatures) -> PackedFeatures:
    """The segments of one row in rows as long as the longest of them, first-fit decreasing.

    Attention compares every two places of a row, though segments do not see each other: S segments
    of equal length cost a fraction 1/S in rows of their own. Rows end in padding, which is in no
    loss and sees, and is seen by, padding alone.
    """
    assert len(packed.segment_BT) == 1, f"folded already, into {len(packed.segment_BT)} rows"
    lengths = packed.segment_BT[0].bincount().tolist()
    places = torch.split(torch.arange(len(packed), device=packed.segment_BT.device), lengths)
    rows = [torch.cat([places[s] for s in segments]) for segments in _first_fit(lengths)]
    return PackedFeatures(
        **{
            f.name: pad_sequence(
                [getattr(packed, f.name)[0, row] for row in rows],
                batch_first=True,
                padding_value=-1 if f.name == "segment_BT" else 0,
            )
            for f in dataclasses.fields(PackedFeatures)
        }
    )


def _first_fit(lengths: Sequence[int]) -> list[list[int]]:
    """Indices by row of the longest length: longest first, each into the first row it fits."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        row = next((row for row in range(len(rows)) if room[row] >= lengths[index]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(max(lengths))
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows
