"""What a policy that is sharded by FSDP2 (`fully_shard`) asks of its training.

FSDP2 gathers the weights that no layer of its own holds, embedding, norm and LM head, when the
whole model's forward begins; and every forward is a collective, of which each rank must run as
many. Everything here leaves a policy that is not sharded as it is. Leaves out how it is sharded
(sharded_loading.py), and what ranks tell one another whether or not it is (ranks.py).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

T = TypeVar("T")

_METHOD = "_fastrl_forward"


def check_strategy(strategy: Strategy) -> None:
    """Raise ValueError unless a policy can be trained under the trainer's strategy."""
    if isinstance(strategy, FSDPStrategy):
        raise ValueError(
            "trainer.strategy FSDPStrategy (FSDP1) flattens the weights, which are whole only all "
            "at once (summon_full_params): an engine could not be given them bucket by bucket. Use "
            "lightning.pytorch.strategies.ModelParallelStrategy, which shards by FSDP2"
        )
    is_known = isinstance(strategy, SingleDeviceStrategy | DDPStrategy | ModelParallelStrategy)
    if not is_known or isinstance(strategy, DeepSpeedStrategy):  # a DDPStrategy by inheritance only
        raise ValueError(
            f"trainer.strategy {type(strategy).__name__}: a policy is trained under ddp (it is "
            f"whole on each GPU), lightning.pytorch.strategies.ModelParallelStrategy (it is "
            f"sharded), or on one device"
        )


def check_is_sharded(strategy: Strategy, model: nn.Module) -> None:
    """Raise ValueError where gradients of the model would not reach all ranks.

    Args:
        strategy: of the trainer.
        model: the policy as `configure_model` left it.
    """
    if not isinstance(strategy, ModelParallelStrategy):
        return
    whole = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
    if not is_sharded(model) or whole:
        raise ValueError(
            f"trainer.strategy ModelParallelStrategy averages gradients of sharded weights alone, "
            f"and {whole[0] if whole else 'the model'} is not sharded; apply fully_shard to "
            f"layers and model in configure_model, leave that to PolicyModule's, or use ddp"
        )


def is_sharded(model: nn.Module) -> bool:
    """Whether each forward of the model is a collective."""
    return isinstance(model, FSDPModule)


def is_offloaded(model: nn.Module) -> bool:
    """Whether its shards are in the host's memory, and computed with elsewhere."""
    shards = (one for one in model.parameters() if isinstance(one, DTensor))
    return any(one.to_local().device.type != one.device_mesh.device_type for one in shards)


def gradients_stay_here(strategy: Strategy) -> AbstractContextManager[None]:
    """A context of backwards that are not an update's last.

    DDP averages over ranks what has gathered by the last one; so ranks may differ in the number of
    backwards before it. FSDP2 averages in each, as whole gradients would not fit.
    """
    if isinstance(strategy, DDPStrategy):
        return cast(AbstractContextManager[None], strategy.block_backward_sync())
    return nullcontext()


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
    result = cast(Callable[..., T], vars(model)[_METHOD])(work)
    if not torch.is_grad_enabled():  # no backward follows, which would do it
        reshard(model)
    return result


def reshard(model: nn.Module) -> None:
    """Free what a forward has gathered: the parameters are shards again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _called(work: Callable[[], Any]) -> Any:
    return work()


def own_part(tensor: Tensor) -> Tensor:
    """This rank's shard; the whole where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
