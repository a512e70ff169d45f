"""A preallocated key-value cache of fixed rows, written and read through views of one forward pass.

Layout: token-major, [L, 2, rows * columns, H, d]. One forward writes its new entries with one
`index_copy_` a layer and tensor, reads them as strided views, and keeping an accepted path is one
gather and one copy for all layers. Live rows are the first ones: cost follows the live batch.

Leaves out which row belongs to whom (rows.py). Shape legend: fastrl/types.py.
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

    def write(self, layer: int, places: Tensor, keys_BHTd: Tensor, values_BHTd: Tensor) -> None:
        """Store new entries at flat places [B * T]."""
        keys, values = self._flat[layer]
        keys.index_copy_(0, places, keys_BHTd.transpose(1, 2).flatten(0, 1))
        values.index_copy_(0, places, values_BHTd.transpose(1, 2).flatten(0, 1))

    def read(self, layer: int, rows: slice, num_columns: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, S, d] of some rows' first columns, as views."""
        keys, values = self._by_row[layer]
        return keys[rows, :, :num_columns], values[rows, :, :num_columns]

    def places(self, rows_B: Tensor, columns_BT: Tensor) -> Tensor:
        """Flat places [B, T] of columns of rows."""
        return rows_B.unsqueeze(1) * self.num_columns + columns_BT

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


class CacheView:
    """One forward pass over consecutive rows of a cache: where it writes, what it sees.

    Queries of row b see the row's first `base_B[b]` columns, and of the window of columns after
    these what `visible_BTM` says. They write to the columns `base_B[b] + offset + t`.

    Args:
        cache: reserved far enough.
        first_row: of the consecutive rows.
        base_B: int64, columns of each row that all its queries see.
        visible_BTM: bool, which of the M columns after the base each query sees; its own too.
        offset: where in that window the new entries start.
        longest_base: the largest of base_B, known to the host.
        positions_BT: int64, rotary positions of the queries: what a sliding window counts in.
    """

    def __init__(
        self,
        cache: KVCache,
        *,
        first_row: int,
        base_B: Tensor,
        visible_BTM: Tensor,
        offset: int,
        longest_base: int,
        positions_BT: Tensor,
    ) -> None:
        num_rows, num_queries, window = visible_BTM.shape
        self._cache = cache
        self._rows = slice(first_row, first_row + num_rows)
        self._base_B = base_B
        self._visible_BTM = visible_BTM
        self._num_columns = longest_base + window
        self._positions_BT = positions_BT
        self._is_all_visible = num_rows == 1 and num_queries == 1 and window == 1
        self._masks: dict[int | None, Tensor] = {}
        rows_B = torch.arange(first_row, first_row + num_rows, device=cache.device)
        steps_T = torch.arange(offset, offset + num_queries, device=cache.device)
        self.places_BT = cache.places(rows_B, base_B.unsqueeze(1) + steps_T)
        self._places = self.places_BT.flatten()

    def update(self, layer: int, keys_BHTd: Tensor, values_BHTd: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new entries; return all visible ones, [B, H, S, d] each."""
        self._cache.write(layer, self._places, keys_BHTd, values_BHTd)
        return self._cache.read(layer, self._rows, self._num_columns)

    def additive_mask(self, sliding_window: int | None, dtype: torch.dtype) -> Tensor | None:
        """[B, 1, T, S]: 0 where a query may see a key, the dtype's lowest value elsewhere."""
        if sliding_window is not None and self._num_columns <= sliding_window:
            sliding_window = None
        if self._is_all_visible and sliding_window is None:
            return None
        if sliding_window not in self._masks:
            visible_BTS = self._visible_columns(sliding_window)
            mask = torch.zeros(visible_BTS.shape, dtype=dtype, device=visible_BTS.device)
            mask.masked_fill_(~visible_BTS, torch.finfo(dtype).min)
            self._masks[sliding_window] = mask.unsqueeze(1)
        return self._masks[sliding_window]

    def _visible_columns(self, sliding_window: int | None) -> Tensor:
        """[B, T, S] bool."""
        num_rows, num_queries, window = self._visible_BTM.shape
        columns_S = torch.arange(self._num_columns, device=self._base_B.device)
        base_B1 = self._base_B.unsqueeze(1)
        window_columns_BM = base_B1 + columns_S[:window]
        visible_BTS = (columns_S < base_B1).unsqueeze(1).repeat(1, num_queries, 1)
        index_BTM = window_columns_BM.unsqueeze(1).expand(-1, num_queries, -1)
        visible_BTS.scatter_(2, index_BTM, self._visible_BTM)
        if sliding_window is None:
            return visible_BTS
        if window != num_queries:
            raise AssertionError("a sliding window needs the positions of the whole tree's columns")
        positions_BS = columns_S.repeat(num_rows, 1)
        positions_BS.scatter_(1, window_columns_BM, self._positions_BT)
        oldest_BT1 = self._positions_BT.unsqueeze(-1) - sliding_window
        return visible_BTS & (positions_BS.unsqueeze(1) > oldest_BT1)
