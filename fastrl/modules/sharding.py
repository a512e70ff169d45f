"""What a policy that is sharded by FSDP2 (`fully_shard`) asks of its training.

FSDP2 gathers the weights that no layer of its own holds, embedding, norm and LM head, when the
whole model's forward begins; and every forward is a collective, of which each rank must run as
many, or raise what the others raise. Everything here leaves a policy that is not sharded as it is.
Leaves out how it is sharded: that is said in `configure_model`.
"""

from __future__ import annotations

from collections.abc import Callable
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


def on_all_ranks(model: nn.Module, work: Callable[[], T]) -> tuple[T, list[T]]:
    """Have every rank do `work`: its own result, and those of all ranks; this one's alone where the
    model is not sharded.

    What it raises on one rank, all ranks raise: the others would wait for that one in the next
    forward. Results and errors must be ones that can be pickled.
    """
    if not isinstance(model, FSDPModule):
        own = work()
        return own, [own]
    result, error = _tried(work)
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, (result, error))
    if error is not None:
        raise error
    for rank, (_, other) in enumerate(of_ranks):
        if other is not None:
            other.add_note(f"on rank {rank}, which shares this rank's policy")
            raise other
    return cast(T, result), [one for one, _ in of_ranks]


def _tried(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, error


def holds_on_all_ranks(model: nn.Module, flag: Tensor) -> bool:
    """Whether a boolean is true on all ranks, where the model is sharded; on this one otherwise."""
    if isinstance(model, FSDPModule):
        flag = flag.int()
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


def whole_value(scalar: Tensor) -> Tensor:
    """A sum over shards, a norm for instance, that all ranks know."""
    return scalar.full_tensor() if isinstance(scalar, DTensor) else scalar


def own_part(tensor: Tensor) -> Tensor:
    """This rank's shard; the whole where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
