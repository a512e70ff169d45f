"""What is trained, as LightningModules: a `PolicyModule` an RL algorithm, and drafters."""

from fastrl.modules.base import PolicyModule, ScoredResponse
from fastrl.modules.drafter import DrafterModule
from fastrl.modules.grpo import GRPO
from fastrl.modules.objectives import LossInputs
from fastrl.modules.optimization import OptimizerSettings
from fastrl.modules.reinforce import Reinforce
from fastrl.modules.sharding_settings import ShardingSettings

__all__ = [
    "GRPO",
    "DrafterModule",
    "LossInputs",
    "OptimizerSettings",
    "PolicyModule",
    "Reinforce",
    "ScoredResponse",
    "ShardingSettings",
]
