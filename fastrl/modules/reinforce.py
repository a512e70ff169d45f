"""REINFORCE with a baseline: the smallest algorithm, the worked example of docs/new_algorithm.md.

Source: Williams 1992; leave-one-out baseline: Ahmadian et al. 2024, arXiv 2402.14740.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from fastrl.modules.advantages import batch_mean_advantages, leave_one_out_advantages
from fastrl.modules.base import PolicyModule
from fastrl.modules.objectives import LossInputs
from fastrl.modules.ranks import rows_of_all_ranks
from fastrl.types import RolloutBatch


class Reinforce(PolicyModule):
    """Policy gradient with one optimizer step a rollout batch.

    Args:
        model_path: Hugging Face folder of the model to train (and of the KL reference); or a
            `.gguf` file, or `package:NAME` for the GGUF file in a Python package.
        baseline: Mean reward of the batch, that of all ranks (batch_mean), or of the group's other
            responses (leave_one_out).
        kwargs: What every algorithm takes; num_epochs and num_mini_batches must stay 1.
    """

    def __init__(
        self,
        model_path: str,
        baseline: Literal["batch_mean", "leave_one_out"] = "batch_mean",
        **kwargs: Any,
    ) -> None:
        super().__init__(model_path, **kwargs)
        if self.updates_per_step > 1:
            raise ValueError(
                f"Reinforce is valid for the policy that sampled, so for one optimizer step a "
                f"batch, got num_epochs {self.num_epochs} * num_mini_batches "
                f"{self.num_mini_batches}; set both to 1, or use fastrl.modules.GRPO"
            )
        self.baseline = baseline

    def advantages(self, batch: RolloutBatch) -> Tensor:
        """Rewards relative to the baseline; [B]."""
        if self.baseline == "leave_one_out":
            return leave_one_out_advantages(batch.rewards_B, batch.group_B)
        return batch_mean_advantages(batch.rewards_B, rows_of_all_ranks(batch.rewards_B))

    def loss(self, inputs: LossInputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        """-advantage * log-probability by token."""
        return -inputs.advantages_BT * inputs.policy_logprobs_BT, {}
