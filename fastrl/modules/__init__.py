"""RL algorithms as LightningModules: one subclass of `PolicyModule` each."""

from fastrl.modules.base import PolicyModule, ScoredResponse
from fastrl.modules.grpo import GRPO
from fastrl.modules.objectives import LossInputs
from fastrl.modules.optimization import OptimizerSettings
from fastrl.modules.reinforce import Reinforce

__all__ = [
    "GRPO",
    "LossInputs",
    "OptimizerSettings",
    "PolicyModule",
    "Reinforce",
    "ScoredResponse",
]
