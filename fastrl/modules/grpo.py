"""GRPO: advantages normalized within each prompt's group, PPO's clipped objective, no critic.

Variants by configuration: Dr.GRPO (`normalize_std: false`, `aggregation: constant`), clip-higher
(`clip_high` > `clip_low`), KL to the initial model (`kl_coef`).

Source: Shao et al. 2024, arXiv 2402.03300. Shape legend: fastrl/types.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastrl.modules.advantages import group_normalized_advantages
from fastrl.modules.base import PolicyModule
from fastrl.modules.objectives import LossInputs, clipped_objective
from fastrl.types import RolloutBatch


class GRPO(PolicyModule):
    """Group-relative policy optimization.

    Args:
        model_path: Hugging Face folder of the model to train (and of the KL reference); or a
            `.gguf` file, or `package:NAME` for the GGUF file in a Python package.
        clip_low: Probability ratios below 1 - clip_low are not pushed further down.
        clip_high: Probability ratios above 1 + clip_high are not pushed further up.
        normalize_std: Divide a group's centered rewards by their standard deviation (false:
            Dr.GRPO).
        kwargs: What every algorithm takes.
    """

    min_group_size = 2

    def __init__(
        self,
        model_path: str,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        normalize_std: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(model_path, **kwargs)
        if not (0 < clip_low <= 1 and clip_high > 0):
            raise ValueError(
                f"model.clip_low must be in (0, 1] and model.clip_high > 0, got {clip_low} and "
                f"{clip_high}; 0.2 is usual for both"
            )
        self.clip_low = clip_low
        self.clip_high = clip_high
        self.normalize_std = normalize_std

    def advantages(self, batch: RolloutBatch) -> Tensor:
        """Rewards relative to the group's mean, in units of its standard deviation; [B]."""
        return group_normalized_advantages(
            batch.rewards_B, batch.group_B, normalize_std=self.normalize_std
        )

    def loss(self, inputs: LossInputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        """PPO's clipped objective by token."""
        loss_BT, is_clipped_BT = clipped_objective(
            inputs.policy_logprobs_BT,
            inputs.old_logprobs_BT,
            inputs.advantages_BT,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
        )
        return loss_BT, {"clip_fraction": is_clipped_BT}
