"""Batches that are made when they are asked for, as data sets of known length.

Lightning prefetches from unsized ones only, so each batch is made after the step before has ended.
Leaves out what a batch is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch.utils.data import DataLoader, IterableDataset

BatchT = TypeVar("BatchT")


class BatchStream(IterableDataset[BatchT]):
    """A known number of batches, each made when it is asked for."""

    def __init__(self, num_batches: int, make_batch: Callable[[int], BatchT]) -> None:
        self._num_batches = num_batches
        self._make_batch = make_batch

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[BatchT]:
        return map(self._make_batch, range(self._num_batches))


class BatchLoader(DataLoader[BatchT]):
    """Loads a BatchStream.

    Its own state is empty, the cursor being the data module's; having one tells Lightning that the
    loader can go on in the middle of an epoch.
    """

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing."""


def load_batches(num_batches: int, make_batch: Callable[[int], BatchT]) -> BatchLoader[BatchT]:
    """A loader of so many batches, `make_batch(0)`, `make_batch(1)`, … in this process."""
    # Lightning recommends loader workers, and warns of what a sized stream would do in them; but
    # engine and model live in this process.
    for advice in ("does not have many workers", "`IterableDataset` has `__len__` defined"):
        warnings.filterwarnings("ignore", message=f".*{advice}.*")
    return BatchLoader(BatchStream(num_batches, make_batch), batch_size=None)
