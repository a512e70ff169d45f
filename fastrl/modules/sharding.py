"""What a policy that is sharded by FSDP2 (`fully_shard`) asks of its training.

FSDP2 gathers the weights that no layer of its own holds, embedding, norm and LM head, when the
whole model's forward begins; and every forward is a collective, of which each rank must run as
many. Everything here leaves a policy that is not sharded as it is. Leaves out how it is sharded:
that is said in `configure_model`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

T = TypeVar("T")

_METHOD = "_fastrl_forward"


def as_forward(model: nn.Module, work: Callable[[], T]) -> T:
    """What `work` returns, done with the model's weights at hand as in its own forward.

    Args:
        model: that the work is about; the tensors that are returned lead back to its weights.
        work: takes no arguments, which FSDP2 would cast.
    """
    if not isinstance(model, FSDPModule):
        return work()
    if _METHOD not in vars(model):
        setattr(model, _METHOD, _called)
        register_fsdp_forward_method(model, _METHOD)
    return cast(Callable[..., T], vars(model)[_METHOD])(work)


def _called(work: Callable[[], Any]) -> Any:
    return work()


def most_of_any_rank(model: nn.Module, counts: Sequence[int]) -> list[int]:
    """The largest of each count over all ranks, where the model is sharded; these otherwise."""
    if not isinstance(model, FSDPModule):
        return list(counts)
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, list(counts))
    return [max(column) for column in zip(*of_ranks, strict=True)]


def whole_value(scalar: Tensor) -> Tensor:
    """A sum over shards, a norm for instance, that all ranks know."""
    return scalar.full_tensor() if isinstance(scalar, DTensor) else scalar
