"""Averages of an RL step's scalars over its micro-batches, mini-batches and epochs, and over ranks.

Values stay on the device, unsynchronized, until `result`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from fastrl.modules.ranks import over_ranks


class UpdateMetrics:
    """Collects token-wise and update-wise values of one RL step."""

    def __init__(self) -> None:
        self._token_sums: dict[str, Tensor] = {}
        self._num_tokens: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}
        self._updates: defaultdict[str, list[Tensor]] = defaultdict(list)

    def add_tokens(self, values: Mapping[str, Tensor], mask_BT: Tensor) -> None:
        """Values by token, [B, T]: averaged over all tokens in the mask, epochs counted each."""
        num_tokens = mask_BT.sum()
        for name, value_BT in values.items():
            total = torch.where(mask_BT, value_BT.detach().float(), 0.0).sum()
            self._token_sums[name] = self._token_sums.get(name, 0) + total
            self._num_tokens[name] = self._num_tokens.get(name, 0) + num_tokens

    def add_max(self, name: str, value: Tensor) -> None:
        """A scalar of which the largest counts."""
        value = value.detach()
        known = self._maxima.get(name)
        self._maxima[name] = value if known is None else torch.maximum(known, value)

    def add_update(self, name: str, value: Tensor) -> None:
        """A scalar of an optimizer step, the same on all ranks: averaged over optimizer steps."""
        self._updates[name].append(value.detach())

    def result(self) -> dict[str, float]:
        """All values, tokens and maxima being those of all ranks, which call it together; the only
        transfer from the device."""
        tensors = {
            **self._token_means(),
            **_over_ranks(self._maxima, "max"),
            **{name: torch.stack(values).mean() for name, values in self._updates.items()},
        }
        numbers = torch.stack([tensor.float() for tensor in tensors.values()]).tolist()
        return dict(zip(tensors, numbers, strict=True))

    def _token_means(self) -> dict[str, Tensor]:
        sums = _over_ranks(self._token_sums, "sum")
        numbers = _over_ranks(self._num_tokens, "sum")
        return {name: total / numbers[name] for name, total in sums.items()}


def _over_ranks(
    scalars: Mapping[str, Tensor], operation: Literal["sum", "max"]
) -> dict[str, Tensor]:
    """The same of all ranks, in one exchange."""
    if not scalars:
        return {}
    values = over_ranks(torch.stack(list(scalars.values())), operation)
    return dict(zip(scalars, values, strict=True))
