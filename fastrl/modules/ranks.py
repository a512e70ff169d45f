"""What the ranks that train one policy tell one another: errors, flags, sums, rows.

Each rank trains on rollouts of its own, and gradients are averaged over ranks (DDP, or FSDP2). What
a loss is divided by, what is logged and what stops the run are of all ranks together, so that they
do not depend on how many there are. A process that is alone exchanges nothing.

Every function here is a collective: all ranks call it, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def num_ranks() -> int:
    """Processes of the run; 1 where none are set up."""
    return dist.get_world_size() if dist.is_initialized() else 1


def on_all_ranks(work: Callable[[], T]) -> tuple[T, list[T]]:
    """Have every rank do `work`: its own result, and those of all ranks.

    What it raises on one rank, all ranks raise: the others would wait for that one in what comes
    next. Results and errors must be ones that can be pickled.
    """
    if num_ranks() == 1:
        own = work()
        return own, [own]
    result, error = _tried(work)
    results = _raised_together(result, error)
    return cast(T, result), results


def tried_on_all_ranks(work: Callable[[], T]) -> T:
    """As `on_all_ranks`, for results that stay where they are."""
    if num_ranks() == 1:
        return work()
    result, error = _tried(work)
    _raised_together(None, error)
    return cast(T, result)


def _raised_together(result: Any, error: Exception | None) -> list[Any]:
    of_ranks: list[Any] = [None] * num_ranks()
    dist.all_gather_object(of_ranks, (result, error))
    if error is not None:
        raise error
    for rank, (_, other) in enumerate(of_ranks):
        if other is not None:
            other.add_note(f"on rank {rank}, which trains the policy together with this one")
            raise other
    return [one for one, _ in of_ranks]


def _tried(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, error


def holds_on_all_ranks(flag: Tensor) -> bool:
    """Whether a boolean scalar is true on all ranks."""
    return bool(over_ranks(flag.float(), "min"))


def over_ranks(values: Tensor, operation: Literal["sum", "min", "max"]) -> Tensor:
    """Sums, minima or maxima of all ranks' values, element by element; on their own device."""
    if num_ranks() == 1:
        return values
    result = values.detach().to(_exchange_device(), copy=True)
    operations = {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}
    dist.all_reduce(result, op=operations[operation])
    return result.to(values.device)


def rows_of_all_ranks(values_B: Tensor) -> Tensor:
    """The rows of all ranks, by rank: of a statistic over the whole rollout batch."""
    _, of_ranks = on_all_ranks(lambda: values_B.cpu())
    return torch.cat(of_ranks).to(values_B.device)


def _exchange_device() -> torch.device:
    """NCCL takes tensors of its GPU alone; those of an offloaded policy are on the CPU."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
