"""A preallocated key-value cache of fixed rows.

Layout: token-major, [L, 2, rows * columns, H, d]. One forward writes its new entries with one
`index_copy_` a layer and tensor, reads them as strided views, and keeping an accepted path is one
gather and one copy for all layers. Live rows are the first ones: cost follows the live batch.

Leaves out which row belongs to whom (rows.py), and what a forward pass writes and sees
(cache_views.py). Shape legend: fastrl/types.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GROWTH = 1.5
_COLUMN_STEP = 64


class KVCache:
    """Keys and values of `num_rows` sequences, growing in length as the longest does.

    Args:
        num_layers, num_kv_heads, head_dim: of the model.
        num_rows: most sequences at once.
        dtype, device: of the entries.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_rows: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_layers = num_layers
        self.num_rows = num_rows
        self._entry_shape = (num_kv_heads, head_dim)
        self.num_columns = 0
        self._set_entries(
            torch.empty(num_layers, 2, num_rows, 0, *self._entry_shape, dtype=dtype, device=device)
        )

    def _set_entries(self, by_row: Tensor) -> None:
        """Take storage of shape [L, 2, rows, columns, H, d]."""
        self.num_columns = by_row.shape[3]
        self._entries = by_row.flatten(2, 3)
        self._flat = [(layer[0], layer[1]) for layer in self._entries]
        self._by_row = [(layer[0], layer[1]) for layer in by_row.transpose(3, 4)]
        self._storage = by_row
        self._columns_S = torch.arange(self.num_columns, device=by_row.device)
        rows_B1 = torch.arange(self.num_rows, device=by_row.device).unsqueeze(1)
        self._row_starts_B1 = rows_B1 * self.num_columns

    @property
    def dtype(self) -> torch.dtype:
        """Of the entries."""
        return self._entries.dtype

    @property
    def device(self) -> torch.device:
        """Where the entries are."""
        return self._entries.device

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return self._entries.numel() * self._entries.element_size()

    def reserve(self, num_columns: int, live_rows: int) -> None:
        """Make room for rows of `num_columns` tokens, keeping the first `live_rows` rows."""
        if num_columns <= self.num_columns:
            return
        grown = max(num_columns, int(self.num_columns * _GROWTH))
        grown += -grown % _COLUMN_STEP
        old = self._storage
        new = old.new_zeros(self.num_layers, 2, self.num_rows, grown, *self._entry_shape)
        new[:, :, :live_rows, : self.num_columns] = old[:, :, :live_rows]
        self._set_entries(new)

    def release(self) -> None:
        """Give the memory back; the next `reserve` takes it again."""
        empty = self._storage.new_empty(self.num_layers, 2, self.num_rows, 0, *self._entry_shape)
        self._set_entries(empty)

    @torch.inference_mode()
    def drop_non_numbers(self) -> None:
        """Put zeros for entries that are not finite: attention that leaves them out weighs them by
        zero, which leaves what is not a number what it is."""
        self._storage.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)

    def write(self, layer: int, places: Tensor, keys_BHTd: Tensor, values_BHTd: Tensor) -> None:
        """Store new entries at flat places [B * T]."""
        keys, values = self._flat[layer]
        keys.index_copy_(0, places, keys_BHTd.transpose(1, 2).flatten(0, 1))
        values.index_copy_(0, places, values_BHTd.transpose(1, 2).flatten(0, 1))

    def read(self, layer: int, rows: slice, num_columns: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, S, d] of some rows' first columns, as views."""
        keys, values = self._by_row[layer]
        return keys[rows, :, :num_columns], values[rows, :, :num_columns]

    def columns(self, count: int) -> Tensor:
        """[count] int64: 0, 1, …, of the reserved columns."""
        return self._columns_S[:count]

    def places(self, first_row: int, num_rows: int, columns_BT: Tensor) -> Tensor:
        """Flat places [B, T] of columns of consecutive rows."""
        return self._row_starts_B1[first_row : first_row + num_rows] + columns_BT

    def keep_path(self, first_places_B: Tensor, path_BP: Tensor) -> None:
        """Move the entries of an accepted path together.

        Args:
            first_places_B: flat place of each row's root.
            path_BP: nodes of the path, the root first; node i stands i places after the root.
        """
        sources = (first_places_B.unsqueeze(1) + path_BP[:, 1:]).flatten()
        steps = torch.arange(1, path_BP.shape[1], device=path_BP.device)
        targets = (first_places_B.unsqueeze(1) + steps).flatten()
        self._entries.index_copy_(2, targets, self._entries.index_select(2, sources))

    def copy_row(self, source: int, target: int, num_columns: int) -> None:
        """Copy the first columns of one row over another's."""
        self.load_row(target, self.view_row(source, num_columns))

    def view_row(self, row: int, num_columns: int) -> Tensor:
        """The first columns of a row, [L, 2, columns, H, d], a view."""
        start = row * self.num_columns
        return self._entries[:, :, start : start + num_columns]

    def load_row(self, row: int, entries: Tensor) -> None:
        """Write entries as `view_row` gave them into the first columns of a row."""
        self.view_row(row, entries.shape[2]).copy_(entries)
