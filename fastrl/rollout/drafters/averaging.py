"""One drafter out of those that ranks have trained apart: local SGD's average.

Each rank's weights count as many times as it took optimizer steps since the last average, when all
ranks had the same:

    average = sum over ranks of (num_steps of the rank / num_steps of all) * weights of the rank

It is computed on one rank, in float32, and sent to all: bit by bit the same drafter everywhere. A
checksum of each tensor is compared all the same. Tensors go through one buffer of bounded size,
over the default process group. Optimizer states stay each rank's own.

Source: Stich, "Local SGD Converges Fast and Communicates Little" (arXiv 1805.09767); weighted as in
federated averaging. Leaves out when ranks average.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_NUMBERS = 16 * 2**20
"""Float32 numbers that are averaged at once: 64 MiB."""
_HOME = 0
"""Rank that sums up."""


def average_over_ranks(
    named_weights: Mapping[str, Tensor], num_steps: int, *, bucket_numbers: int = BUCKET_NUMBERS
) -> int:
    """Put the average of all ranks' weights in place of this rank's. All ranks call this together.

    Where no rank took a step, or there are no ranks, nothing is changed.

    Args:
        named_weights: contiguous tensors of one device, in the same order on all ranks.
        num_steps: that this rank took since the last average.
        bucket_numbers: numbers averaged at once.

    Returns:
        Steps of all ranks.

    Raises:
        RuntimeError: ranks hold different weights afterwards, which names them.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return num_steps
    tensors = [tensor.detach() for tensor in named_weights.values()]
    total = sum(gather_numbers([num_steps], tensors[0].device)[:, 0].tolist())
    if total == 0:
        return 0
    share = num_steps / total
    for parts in _buckets(tensors, bucket_numbers):
        bucket = torch.cat([part.float() for part in parts]).mul_(share)
        dist.reduce(bucket, dst=_HOME)
        dist.broadcast(bucket, src=_HOME)
        start = 0
        for part in parts:
            part.copy_(bucket[start : start + len(part)])
            start += len(part)
    check_same_on_all_ranks(named_weights)
    return int(total)


def check_same_on_all_ranks(named_weights: Mapping[str, Tensor]) -> None:
    """Raise RuntimeError naming a tensor of which ranks hold different bits, and the ranks."""
    device = next(iter(named_weights.values())).device
    sums_RW = gather_numbers([checksum(one) for one in named_weights.values()], device)
    different_RW = sums_RW != sums_RW[_HOME]
    for name, is_different_R in zip(named_weights, different_RW.unbind(1), strict=True):
        if is_different_R.any():
            ranks = is_different_R.nonzero().flatten().tolist()
            raise RuntimeError(
                f"the drafter's {name} on ranks {ranks} is not that of rank {_HOME}, after they "
                f"were averaged: memory or transport changed numbers; resume with --ckpt_path last"
            )


def checksum(tensor: Tensor) -> int:
    """Of a tensor's bits and their places, modulo 2^64."""
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start, part in _parts(tensor, BUCKET_NUMBERS):
        bits = part.contiguous().view(torch.int32 if part.element_size() == 4 else torch.int16)
        places = torch.arange(start + 1, start + 1 + len(bits), device=tensor.device)
        total += (bits.long() * (2 * places + 1)).sum()
    return int(total)


def gather_numbers(numbers: Sequence[float], device: torch.device) -> Tensor:
    """One small collective: every rank's numbers, [ranks, numbers], on the host; int64 if all are
    integers, else float64."""
    are_integers = all(isinstance(number, int) for number in numbers)
    dtype = torch.int64 if are_integers else torch.float64
    own = torch.tensor(numbers, dtype=dtype).to(device)
    gathered = torch.empty(dist.get_world_size(), len(numbers), dtype=dtype, device=device)
    dist.all_gather(list(gathered.unbind(0)), own)
    return gathered.cpu()


def _buckets(tensors: Sequence[Tensor], bucket_numbers: int) -> Iterator[list[Tensor]]:
    """Flat views of the tensors, in order, as many together as fit; larger ones in parts."""
    bucket: list[Tensor] = []
    room = bucket_numbers
    for tensor in tensors:
        flat = tensor.view(-1)
        while len(flat):
            part, flat = flat[:room], flat[room:]
            bucket.append(part)
            room -= len(part)
            if room == 0:
                yield bucket
                bucket, room = [], bucket_numbers
    if bucket:
        yield bucket


def _parts(tensor: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    """Flat pieces, and where each begins."""
    flat = tensor.detach().reshape(-1)
    for start in range(0, len(flat), size):
        yield start, flat[start : start + size]
