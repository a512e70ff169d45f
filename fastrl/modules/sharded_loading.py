"""Loads a policy, or its reference, as this rank's shards (FSDP2), or whole without a mesh.

The first rank alone reads the checkpoint, into the host's memory; then, decoder layer by decoder
layer, what is not in a layer last, weights go to all ranks and are sharded: no rank ever has more
of the model on its GPU than its shards and one layer (or embedding, norm and LM head). Names stay
Hugging Face's, and tied weights tied.

Weights are float32. Under `bf16-mixed` they are gathered as bfloat16, and a frozen model's, which
would be rounded at each gathering, are kept as that. Leaves out tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from transformers import PreTrainedModel

from fastrl.modules.loading import empty_causal_lm, load_causal_lm
from fastrl.modules.ranks import num_ranks, tried_on_all_ranks
from fastrl.modules.sharding_settings import ShardingSettings

COMPUTE_DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16}
"""Of gathered weights, by trainer.precision."""


def data_parallel_mesh(mesh: DeviceMesh | None) -> DeviceMesh | None:
    """The ranks that a policy is sharded over; None where the strategy has no mesh.

    Raises:
        ValueError: the mesh has a tensor-parallel dimension.
    """
    if mesh is None:
        return None
    if (size := mesh["tensor_parallel"].size()) > 1:
        raise ValueError(
            f"trainer.strategy: ModelParallelStrategy with tensor_parallel_size {size}, but no "
            f"algorithm here splits a layer's work over ranks (the sizes that are 'auto' do that "
            f"within a node); set data_parallel_size to the number of all GPUs and "
            f"tensor_parallel_size to 1. (An engine's tp_size is another matter)"
        )
    return mesh["data_parallel"]


def load_policy(
    model_path: str,
    mesh: DeviceMesh | None,
    settings: ShardingSettings,
    precision: str | None,
    *,
    is_frozen: bool = False,
) -> PreTrainedModel:
    """A model in training mode, or a frozen one.

    Args:
        model_path: Hugging Face folder.
        mesh: one-dimensional, of the ranks that share it; None: each has the whole of it.
        settings: what is recomputed, offloaded, gathered when.
        precision: of the trainer; None without a mesh.
        is_frozen: a reference, which has no gradients.

    Raises:
        ValueError: what `load_causal_lm` raises, on all ranks; a setting or precision that does not
            fit.
    """
    if mesh is None:
        settings.check_unsharded()
        model = load_causal_lm(model_path)
    else:
        if precision not in COMPUTE_DTYPES:
            raise ValueError(
                f"trainer.precision {precision}: a policy is sharded with float32 weights and "
                f"computes in float32 or bfloat16; use 32-true or bf16-mixed"
            )
        compute_dtype = COMPUTE_DTYPES[precision]
        is_first = dist.get_rank() == 0
        model = tried_on_all_ranks(
            lambda: load_causal_lm(model_path) if is_first else empty_causal_lm(model_path)
        )
        model.requires_grad_(not is_frozen)
        shard(model, mesh, settings, compute_dtype)
    if is_frozen:
        model.requires_grad_(False)
        return model
    if settings.activation_checkpointing:
        model.gradient_checkpointing_enable(  # type: ignore[no-untyped-call]
            {"use_reentrant": False, "preserve_rng_state": False}
        )
    model.train()
    return model


def shard(
    model: PreTrainedModel,
    mesh: DeviceMesh,
    settings: ShardingSettings,
    compute_dtype: torch.dtype,
) -> None:
    """Shard each decoder layer, then what is left, in place.

    Args:
        model: with its weights on the first rank; those of the others may have none (meta).
        mesh: of all ranks of the run.
        settings: what is offloaded, gathered when, and summed in what.
        compute_dtype: of gathered weights.
    """
    options: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": settings.reshard_after_forward,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=compute_dtype, reduce_dtype=getattr(torch, settings.reduce_dtype)
        ),
        "offload_policy": OffloadPolicy(),
    }
    device = _device(mesh)
    if settings.cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type != "cpu")
    layers = cast(nn.ModuleList, model.base_model.get_submodule("layers"))
    in_layers = {module for layer in layers for module in layer.modules()}
    for layer in layers:
        _spread(layer.modules(), device, compute_dtype)
        fully_shard(layer, **options)
    rest = [module for module in model.modules() if module not in in_layers]
    _spread(rest, device, compute_dtype)
    fully_shard(model, **options)


def _spread(modules: Iterable[nn.Module], device: torch.device, frozen_dtype: torch.dtype) -> None:
    """Bring the first rank's weights and buffers to all ranks, those that are tied once."""
    known: dict[Tensor, Tensor] = {}

    def spread(tensor: Tensor) -> Tensor:
        if tensor not in known:
            whole = _from_first_rank(tensor.detach(), device)
            if isinstance(tensor, nn.Parameter):
                needs_grad = tensor.requires_grad
                whole = whole if needs_grad else whole.to(frozen_dtype)
                whole = nn.Parameter(whole, requires_grad=needs_grad)
            known[tensor] = whole
        return known[tensor]

    for module in modules:
        for tensors in cast(list[dict[str, Tensor]], [module._parameters, module._buffers]):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = spread(tensor)


def _from_first_rank(tensor: Tensor, device: torch.device) -> Tensor:
    tensor = torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)
    if num_ranks() > 1:
        dist.broadcast(tensor, src=0)
    return tensor


def _device(mesh: DeviceMesh) -> torch.device:
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.accelerator.current_device_index())
