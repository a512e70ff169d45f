"""What one forward pass over consecutive rows of a cache writes, and what its queries see.

- `CausalView`: new tokens one after the other, each seeing all before it;
- `TreeView`: the nodes of a draft tree, each seeing its own path;
- `DraftWindow`: a draft tree as it grows, level by level.

They keep the contract of `attention.KVView`. Shape legend: fastrl/types.py; M columns of a window
that starts after the columns all queries of a row see.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.rollout.torch_engine.kv_cache import KVCache


class _View:
    """Writes to flat places, reads the first columns of some rows."""

    def __init__(self, cache: KVCache, rows: slice, places: Tensor, num_columns: int) -> None:
        self._cache = cache
        self._rows = rows
        self._places = places
        self._num_columns = num_columns

    def update(self, layer: int, keys_BHTd: Tensor, values_BHTd: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new entries; return all visible ones, [B, H, S, d] each."""
        self._cache.write(layer, self._places, keys_BHTd, values_BHTd)
        return self._cache.read(layer, self._rows, self._num_columns)


class CausalView(_View):
    """New tokens of each row after its cached ones: token t at column and position base + t.

    Args:
        cache: reserved for `longest_base + num_tokens` columns.
        base_B: int64, cached columns of each row.
        longest_base: the largest of them, known to the host.
        num_tokens: new tokens a row.
        first_row: of the consecutive rows.
    """

    def __init__(
        self,
        cache: KVCache,
        *,
        base_B: Tensor,
        longest_base: int,
        num_tokens: int,
        first_row: int = 0,
    ) -> None:
        num_rows = len(base_B)
        self._last_visible_BT = base_B.unsqueeze(1) + cache.columns(num_tokens)
        self.places_BT = cache.places(first_row, num_rows, self._last_visible_BT)
        super().__init__(
            cache,
            slice(first_row, first_row + num_rows),
            self.places_BT.flatten(),
            longest_base + num_tokens,
        )
        self._is_all_visible = num_rows == 1 and num_tokens == 1
        self._masks: dict[int | None, Tensor] = {}

    def additive_mask(self, sliding_window: int | None, dtype: torch.dtype) -> Tensor | None:
        """[B, 1, T, S]: 0 where a query may see a key, the dtype's lowest value elsewhere."""
        if sliding_window is not None and self._num_columns <= sliding_window:
            sliding_window = None
        if self._is_all_visible and sliding_window is None:
            return None
        if sliding_window not in self._masks:
            last_BT1 = self._last_visible_BT.unsqueeze(-1)
            columns_S = self._cache.columns(self._num_columns)
            hidden_BTS = columns_S > last_BT1
            if sliding_window is not None:
                hidden_BTS |= columns_S <= last_BT1 - sliding_window
            self._masks[sliding_window] = _additive(hidden_BTS, dtype).unsqueeze(1)
        return self._masks[sliding_window]


class TreeView(_View):
    """A draft tree in each row after its cached tokens: node n at column base + n.

    Rows are the first ones of the cache.

    Args:
        cache: reserved for `longest_base` columns and as many as a tree has nodes.
        base_B: int64, cached columns of each row, which all its nodes see.
        longest_base: the largest of them, known to the host.
        ancestors_BNN: bool, which nodes each node sees besides; itself too.
        positions_BN: int64, rotary positions of the nodes: what a sliding window counts in.
    """

    def __init__(
        self,
        cache: KVCache,
        *,
        base_B: Tensor,
        longest_base: int,
        ancestors_BNN: Tensor,
        positions_BN: Tensor,
    ) -> None:
        num_rows, num_nodes, _ = ancestors_BNN.shape
        self._base_B1 = base_B.unsqueeze(1)
        self._ancestors_BNN = ancestors_BNN
        self._positions_BN = positions_BN
        self._node_columns_BN = self._base_B1 + cache.columns(num_nodes)
        self.places_BT = cache.places(0, num_rows, self._node_columns_BN)
        super().__init__(
            cache, slice(0, num_rows), self.places_BT.flatten(), longest_base + num_nodes
        )
        self._masks: dict[int | None, Tensor] = {}

    def additive_mask(self, sliding_window: int | None, dtype: torch.dtype) -> Tensor | None:
        """[B, 1, N, S]: 0 where a node may see a key, the dtype's lowest value elsewhere."""
        if sliding_window is not None and self._num_columns <= sliding_window:
            sliding_window = None
        if sliding_window not in self._masks:
            hidden_BNS = self._hidden_columns()
            if sliding_window is not None:
                hidden_BNS |= self._out_of_window(sliding_window)
            self._masks[sliding_window] = _additive(hidden_BNS, dtype).unsqueeze(1)
        return self._masks[sliding_window]

    def _hidden_columns(self) -> Tensor:
        """[B, N, S] bool: columns after the base, but for a node's ancestors."""
        columns_S = self._cache.columns(self._num_columns)
        num_nodes = self._ancestors_BNN.shape[1]
        hidden_BNS = (columns_S >= self._base_B1).unsqueeze(1).repeat(1, num_nodes, 1)
        index_BNN = self._node_columns_BN.unsqueeze(1).expand(-1, num_nodes, -1)
        return hidden_BNS.scatter_(2, index_BNN, ~self._ancestors_BNN)

    def _out_of_window(self, sliding_window: int) -> Tensor:
        """[B, N, S] bool: keys whose position is too far before the node's."""
        columns_S = self._cache.columns(self._num_columns)
        positions_BS = columns_S.repeat(len(self._base_B1), 1)
        positions_BS.scatter_(1, self._node_columns_BN, self._positions_BN)
        oldest_BN1 = self._positions_BN.unsqueeze(-1) - sliding_window
        return positions_BS.unsqueeze(1) <= oldest_BN1


class DraftWindow(_View):
    """A draft tree as it grows: K nodes a level, each seeing its row's cached tokens and its path.

    Call `add_level` before the forward of each level. Rows are the first ones of the cache.

    Args:
        cache: reserved for `longest_base + num_levels * beam` columns.
        base_B: int64, cached columns of each row.
        longest_base: the largest of them, known to the host.
        num_levels: most levels to come.
        beam: K.
    """

    def __init__(
        self, cache: KVCache, *, base_B: Tensor, longest_base: int, num_levels: int, beam: int
    ) -> None:
        num_rows = len(base_B)
        super().__init__(cache, slice(0, num_rows), base_B, longest_base)
        self._beam = beam
        self._longest_base = longest_base
        self._columns_BM = base_B.unsqueeze(1) + cache.columns(num_levels * beam)
        self._places_BM = cache.places(0, num_rows, self._columns_BM)
        self._seen_BKM = torch.empty(0)  # additive, over the window's columns so far
        self._is_all_visible = num_rows == 1 and beam == 1
        if not self._is_all_visible:
            dtype = cache.dtype
            columns_S = cache.columns(longest_base + num_levels * beam)
            hidden_B1S = (columns_S >= base_B.unsqueeze(1)).unsqueeze(1)
            self._mask_BKS = _additive(hidden_B1S, dtype).repeat(1, beam, 1)
            self._own_BKK = _additive(~torch.eye(beam, dtype=torch.bool), dtype)
            self._own_BKK = self._own_BKK.to(cache.device).expand(num_rows, -1, -1)

    def add_level(self, parents_BK: Tensor | None) -> None:
        """Go on to the next level, whose node k sees what node `parents_BK[:, k]` of this one saw.

        A beam of one has no choice of parents (None); the first level's is the root, whose token is
        cached.
        """
        start = self._num_columns - self._longest_base
        end = start + self._beam
        self._num_columns += self._beam
        self._places = self._places_BM[:, start:end].flatten()
        if self._is_all_visible:
            return
        if parents_BK is None:
            self._mask_BKS.scatter_(2, self._columns_BM[:, None, start:end], 0.0)
            return
        seen_BKM = self._own_BKK
        if start:
            inherited_BKM = self._seen_BKM.gather(1, parents_BK.unsqueeze(-1).expand(-1, -1, start))
            seen_BKM = torch.cat((inherited_BKM, seen_BKM), dim=2)
        index_BKM = self._columns_BM[:, None, :end].expand(-1, self._beam, -1)
        self._mask_BKS.scatter_(2, index_BKM, seen_BKM)
        self._seen_BKM = seen_BKM

    def additive_mask(self, sliding_window: int | None, dtype: torch.dtype) -> Tensor | None:
        """[B, 1, K, S]: 0 where a node may see a key, the dtype's lowest value elsewhere."""
        if sliding_window is not None:
            raise ValueError("a drafter's attention has no sliding window")
        if self._is_all_visible:
            return None
        return self._mask_BKS[:, :, : self._num_columns].unsqueeze(1)


def _additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where False, the dtype's lowest value where True."""
    return hidden.to(dtype).mul_(torch.finfo(dtype).min)
