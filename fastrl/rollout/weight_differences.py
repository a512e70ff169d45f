"""What an engine serves, held against what was published: weight by weight, number by number.

A checksum tells that something is wrong; this tells what, under the publisher's name for it. What
is served may be parts of the published weight (a rank's shard, a share of a fused matrix): each is
compared with its counterpart, and all count as one weight. Counts stay on the weights' device until
they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

_CHUNK_NUMBERS = 2**24
"""Compared at once: the result of a comparison takes memory beside the weights."""
_MAX_NAMED = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightDifference:
    """A weight that is not served as it was published."""

    name: str
    """The publisher's."""
    num_compared: int
    """Numbers of it that the engine holds, over all its devices; 0: it has no such weight."""
    num_different: int
    num_nonzero: int
    """Of the numbers that are served."""

    def __str__(self) -> str:
        if self.num_compared == 0:
            return f"{self.name}: no weight of the engine's model takes this name"
        if self.num_nonzero == 0:
            return f"{self.name}: all zero"
        return f"{self.name}: {self.num_different} of {self.num_compared} numbers differ"


class WeightError(RuntimeError):
    """An engine does not serve the weights that were published, or does not compute with them."""


def described(differences: Iterable[WeightDifference]) -> str:
    """One line for a message; of many weights, the first by name."""
    texts = sorted(map(str, differences))
    named = "; ".join(texts[:_MAX_NAMED])
    rest = len(texts) - _MAX_NAMED
    return f"{named}; and {rest} more" if rest > 0 else named


@dataclass(slots=True)
class _Counts:
    """Of one weight; tensors are int64 scalars on the weight's device."""

    num_compared: int = 0
    different: list[Tensor] = field(default_factory=list)
    nonzero: list[Tensor] = field(default_factory=list)


class Comparison:
    """Counts differences of weights as their parts are shown."""

    def __init__(self) -> None:
        self._counts: dict[str, _Counts] = {}

    def expect(self, name: str) -> None:
        """A weight was published: it counts as different until a part of it was compared."""
        self._counts.setdefault(name, _Counts())

    @torch.no_grad()
    def compare(self, name: str, served: Tensor, published: Tensor) -> None:
        """Compare a part of a weight with its counterpart, in the dtype that is served.

        Raises ValueError if they are of different shapes.
        """
        if served.shape != published.shape:
            raise ValueError(
                f"{name}: the engine serves a part of shape {tuple(served.shape)}, whose published "
                f"counterpart has shape {tuple(published.shape)}"
            )
        self.expect(name)
        counts = self._counts[name]
        counts.num_compared += served.numel()
        if _is_same_memory(served, published):
            return
        for served_part, published_part in _chunks(served, published):
            expected = published_part.to(served.device, served.dtype)
            counts.different.append((served_part != expected).sum())
            counts.nonzero.append(served_part.count_nonzero())

    def differences(self) -> list[WeightDifference]:
        """Of all weights expected; waits for the device."""
        counted = [one for one in self._counts.values() if one.different]
        sums = [
            torch.stack((torch.stack(one.different).sum(), torch.stack(one.nonzero).sum()))
            for one in counted
        ]
        values = dict(
            zip(map(id, counted), torch.stack(sums).tolist() if sums else (), strict=True)
        )
        found = []
        for name, counts in self._counts.items():
            num_different, num_nonzero = values.get(id(counts), (0, 0))
            if num_different > 0 or counts.num_compared == 0:
                found.append(
                    WeightDifference(
                        name=name,
                        num_compared=counts.num_compared,
                        num_different=num_different,
                        num_nonzero=num_nonzero,
                    )
                )
        return found


def added(per_device: Iterable[Iterable[WeightDifference]]) -> list[WeightDifference]:
    """One engine's differences from those of its devices."""
    sums: dict[str, WeightDifference] = {}
    for differences in per_device:
        for one in differences:
            before = sums.get(one.name)
            sums[one.name] = one if before is None else _sum(before, one)
    return list(sums.values())


def _sum(first: WeightDifference, second: WeightDifference) -> WeightDifference:
    return WeightDifference(
        name=first.name,
        num_compared=first.num_compared + second.num_compared,
        num_different=first.num_different + second.num_different,
        num_nonzero=first.num_nonzero + second.num_nonzero,
    )


def _is_same_memory(first: Tensor, second: Tensor) -> bool:
    return (
        first.device == second.device
        and first.dtype == second.dtype
        and first.data_ptr() == second.data_ptr()
        and first.stride() == second.stride()
    )


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Equal parts of equally shaped tensors, of a bounded size where the first dimension allows."""
    first = tensors[0]
    if first.numel() <= _CHUNK_NUMBERS:
        yield tensors
        return
    rows = max(_CHUNK_NUMBERS * first.shape[0] // first.numel(), 1)
    yield from zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True)
