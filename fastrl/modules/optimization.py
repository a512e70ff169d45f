"""AdamW with a warm-up and a schedule, gradient clipping, and the check that everything is finite.

The schedule counts RL steps, not optimizer steps. Leaves out parameter groups and other optimizers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from lightning import Trainer
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from fastrl.modules.ranks import holds_on_all_ranks, on_all_ranks, over_ranks
from fastrl.modules.sharding import is_sharded, own_part


# No slots: jsonargparse reads the fields of a default value from its __dict__.
@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """AdamW and its learning rate over RL steps."""

    lr: float = 1e-6
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on every parameter."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or falling to 0 at the last RL step."""
    warmup_steps: int = 0
    """RL steps over which the learning rate rises linearly to its peak."""
    max_grad_norm: float = 1.0
    """Gradients of a larger total norm are scaled down to it."""

    def __post_init__(self) -> None:
        checks = (
            (self.lr >= 0, "lr must be >= 0", self.lr),
            (self.weight_decay >= 0, "weight_decay must be >= 0", self.weight_decay),
            (self.warmup_steps >= 0, "warmup_steps must be >= 0", self.warmup_steps),
            (
                self.max_grad_norm > 0,
                "max_grad_norm must be > 0 (inf: no clipping)",
                self.max_grad_norm,
            ),
        )
        for is_valid, expectation, given in checks:
            if not is_valid:
                raise ValueError(f"optimizer: {expectation}, got {given}")

    def build(
        self,
        parameters: Iterable[nn.Parameter],
        num_rl_steps: float,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> tuple[AdamW, LambdaLR]:
        """The optimizer, and a scheduler to be stepped once an RL step.

        Args:
            parameters: to train.
            num_rl_steps: RL steps of the whole run, `inf` where unknown (fine for `constant`).
            betas: of AdamW.
        """
        if self.schedule != "constant" and math.isinf(num_rl_steps):
            raise ValueError(
                f"optimizer.schedule {self.schedule!r} falls to 0 at the last step, but the run "
                f"has no end; set trainer.max_steps or trainer.max_epochs, or use schedule "
                f"'constant'"
            )
        optimizer = AdamW(
            parameters, lr=self.lr, betas=betas, weight_decay=self.weight_decay, fused=True
        )
        return optimizer, LambdaLR(optimizer, lambda step: self.lr_factor(step, num_rl_steps))

    def apply_to(self, scheduler: LambdaLR) -> None:
        """Have the next step taken under these settings, not under those of a restored state.

        Args:
            scheduler: of `build`; its state and its optimizer's may be of a run with others.
        """
        (group,) = scheduler.optimizer.param_groups
        (factor,) = (of_step(scheduler.last_epoch) for of_step in scheduler.lr_lambdas)
        group.update(lr=self.lr * factor, initial_lr=self.lr, weight_decay=self.weight_decay)
        scheduler.base_lrs, scheduler._last_lr = [self.lr], [self.lr * factor]

    def lr_factor(self, step: int, num_rl_steps: float) -> float:
        """Share of the peak learning rate in RL step `step`, from 0; never 0 before the end."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        progress = (step - self.warmup_steps) / max(num_rl_steps - self.warmup_steps, 1)
        if self.schedule == "linear":
            return max(0.0, 1 - progress)
        return (1 + math.cos(math.pi * min(1.0, progress))) / 2


def count_rl_steps(trainer: Trainer, updates_per_step: int) -> float:
    """RL steps of the run, `inf` where nothing limits it.

    Lightning's `max_steps` counts optimizer steps, of which an RL step takes `updates_per_step`.
    """
    num_steps = float(trainer.estimated_stepping_batches)
    if trainer.max_steps < 0:
        return num_steps if num_steps >= 0 else math.inf  # negative: the loader has no length
    return min(num_steps, math.ceil(trainer.max_steps / updates_per_step))


def clip_gradients(
    module: nn.Module, max_grad_norm: float, *, loss: Tensor, rl_step: int
) -> Tensor:
    """Clip in place to a total L2 norm; return the norm before clipping.

    Args:
        module: whose gradients are averaged over ranks already; all ranks clip together.
        max_grad_norm: the largest norm that is left.
        loss: what this rank has added to the update's loss.
        rl_step: for the message.

    Raises:
        FloatingPointError: the loss or a gradient is not finite on some rank; raised on all ranks,
            with the losses of all. Weights are untouched then.
    """
    parameters = [p for p in module.parameters() if p.grad is not None]
    norm = _total_norm(module, [own_part(p.grad) for p in parameters if p.grad is not None])
    if not holds_on_all_ranks(torch.isfinite(norm.to(loss.device) + loss)):
        _, losses = on_all_ranks(lambda: f"{loss.item():g}")
        raise FloatingPointError(
            f"RL step {rl_step}: loss {', '.join(losses)}, gradient norm {norm.item():g}; "
            f"{_culprits(module)}. The weights are those before this update. Lower "
            f"model.optimizer.lr, or resume from an earlier checkpoint"
        )
    clip_grads_with_norm_(parameters, max_grad_norm, norm)
    return norm


def _total_norm(module: nn.Module, gradients: list[Tensor]) -> Tensor:
    """Of whole gradients, from this rank's parts of them; scalar."""
    norm = get_total_norm(gradients)
    return over_ranks(norm.square(), "sum").sqrt() if is_sharded(module) else norm


def _culprits(module: nn.Module) -> str:
    """Which parameters hold a non-finite weight, or else a non-finite gradient, on any rank."""
    named = list(module.named_parameters())
    for what, tensors in (
        ("weights", [(name, p.detach()) for name, p in named]),
        ("gradients", [(name, p.grad) for name, p in named if p.grad is not None]),
    ):
        are_finite = torch.stack([own_part(tensor).isfinite().all() for _, tensor in tensors])
        are_finite = over_ranks(are_finite.float(), "min")
        names = [
            name for (name, _), is_finite in zip(tensors, are_finite, strict=True) if not is_finite
        ]
        if names:
            return f"non-finite {what} in {len(names)} of {len(named)} parameters, first {names[0]}"
    return "weights and gradients are finite each, the loss or the norm is not"
