"""Packed rows of a drafter's warm-up, in their order, the next one made while a step is computed.

A row is a function of its position in the order alone (shard_order.py), whenever and wherever it is
made. In the thread features are read, never made: neither the target nor the engine runs there.
Leaves out where features come from (features.py), and how far training is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fastrl.datamodules.read_ahead import ReadAhead
from fastrl.datamodules.shard_order import ShardOrder, row_length
from fastrl.rollout.drafters.held_out import HeldOutRow
from fastrl.rollout.drafters.packing import (
    PackedFeatures,
    fold_segments,
    num_loss_pairs,
    num_pairs,
    pack_sequences,
)
from fastrl.types import SequenceFeatures, TokenSequence

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One optimizer step's."""

    packed: PackedFeatures
    after: int
    """Position in the order at which the next row begins."""


class RowStream:
    """Rows of a rank's training shards.

    Args:
        order: of the sequences.
        make: features of a shard; runs the target where they are not kept.
        read: the same where they are kept; None where they are not.
        max_pairs: of a row.
        target_size: columns of the hidden states that are predicted.
        device: that rows go to.
    """

    def __init__(
        self,
        order: ShardOrder,
        *,
        make: Callable[[int], list[SequenceFeatures]],
        read: Callable[[int], list[SequenceFeatures] | None],
        max_pairs: int,
        target_size: int,
        device: torch.device,
    ) -> None:
        self._order = order
        self._make = make
        self._read = read
        self._max_pairs = max_pairs
        self._target_size = target_size
        self._device = device
        self._ahead = ReadAhead(self._row_ahead)
        self._held: tuple[int, list[SequenceFeatures]] = (-1, [])
        """The shard in memory, after its number."""
        self._said_cut = False

    def row(self, position: int) -> Row:
        """The first row from a position on that has a token to learn from, by now perhaps made; the
        one after it is begun.

        Raises ValueError where two passes over the data have none.
        """
        row = self._ahead.take(position) or self._row(position, self._make)
        assert row is not None, "features were to be made, and were not"
        self._ahead.start(row.after)
        return row

    def settle(self) -> None:
        """Wait until nothing is being read."""
        self._ahead.settle()

    def close(self) -> None:
        """End the thread."""
        self._ahead.close()

    def _row_ahead(self, position: int) -> Row | None:
        """In the thread; None where features have to be made."""
        if self._device.type != "cuda":
            return self._row(position, self._read)
        with torch.cuda.device(self._device):  # each thread starts at the first
            row = self._row(position, self._read)
            return row and Row(packed=row.packed.pin_memory(), after=row.after)

    def _row(
        self, position: int, features_of: Callable[[int], list[SequenceFeatures] | None]
    ) -> Row | None:
        last = position + 2 * sum(self._order.sizes)
        while position < last:
            shard, members, after = self._order.at(position)
            if self._held[0] != shard:
                features = features_of(shard)
                if features is None:
                    return None
                self._held = (shard, features)
                self._note_cut(features)
            sequences = [self._held[1][index] for index in members]
            num_taken = row_length(sequences, self._max_pairs)
            position += num_taken
            assert position <= after, f"a row took {num_taken} of {len(members)} sequences"
            if taken := usable(sequences[:num_taken]):
                packed = pack_sequences(taken, self._max_pairs, self._target_size)
                return Row(packed=fold_segments(packed), after=position)
        raise ValueError(
            "none of the training prompts has a response of any token to learn from; look at "
            "data.prompts, and at data.sampling.max_tokens"
        )

    def _note_cut(self, features: Sequence[SequenceFeatures]) -> None:
        """Say once that sequences are longer than a row, which are cut to their ends."""
        longest = max(map(num_pairs, features))
        if self._said_cut or longest <= self._max_pairs:
            return
        self._said_cut = True
        num_cut = sum(num_pairs(one) > self._max_pairs for one in features)
        _log.warning(
            "%d of a shard's %d sequences are longer than a row and are cut to their latest %d "
            "pairs, of at most %d: raise data.tokens_per_step to train on all of them; "
            "warmup/num_cut counts them from here on",
            num_cut,
            len(features),
            self._max_pairs,
            longest,
        )


def held_out_rows(
    features: Sequence[SequenceFeatures], tasks: Sequence[str], max_pairs: int, target_size: int
) -> list[HeldOutRow]:
    """Rows of all sequences that have a token to predict, in order; `tasks` are the sequences'."""
    named = [pair for pair in zip(features, tasks, strict=True) if usable([pair[0]])]
    rows: list[HeldOutRow] = []
    while named:
        taken = named[: row_length([sequence for sequence, _ in named], max_pairs)]
        packed = pack_sequences([sequence for sequence, _ in taken], max_pairs, target_size)
        rows.append(
            HeldOutRow(
                packed=fold_segments(packed),
                sequences=tuple(
                    TokenSequence(tokens_T=one.tokens_T, num_prompt_tokens=one.num_prompt_tokens)
                    for one, _ in taken
                ),
                tasks=tuple(task for _, task in taken),
            )
        )
        named = named[len(taken) :]
    return rows


def usable(features: Sequence[SequenceFeatures]) -> list[SequenceFeatures]:
    """Those with a response token to learn from."""
    return [sequence for sequence in features if num_loss_pairs(sequence) > 0]
