"""Whole tensors out of sharded ones (FSDP2, tensor parallelism), one at a time.

A shard is cast first and gathered then, so that what travels, and what is held, is in the dtype
that is served. Gathering is collective: all ranks of the tensor's mesh take part, in the same
order. Whoever asks for a tensor decides how long it is kept; nothing here holds one.

Leaves out FSDP1, whose parameters are whole in a context alone (`summon_full_params`), and all at
once: PolicyModule refuses it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def whole(tensor: Tensor, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The whole tensor in a dtype, on a device; the very same memory where nothing has to change.

    All ranks of a sharded tensor's mesh must call this together.
    """
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        shard = tensor.to_local().to(mesh.device_type, dtype)  # offloaded ones are elsewhere
        tensor = DTensor.from_local(
            shard, mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride()
        ).full_tensor()
    return tensor.to(device, dtype)


def is_shared(ready: Tensor, source: Tensor) -> bool:
    """Whether `whole` gave the source's own memory, so that its changes show."""
    local = source.to_local() if isinstance(source, DTensor) else source
    return ready.untyped_storage().data_ptr() == local.untyped_storage().data_ptr()
