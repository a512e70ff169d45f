"""Hooks into an RL run: drafter training, strategy adaptation, metrics, progress, summary."""

from fastrl.callbacks.drafter_training import DrafterTraining
from fastrl.callbacks.progress_bar import RolloutProgressBar
from fastrl.callbacks.random_state import RandomState
from fastrl.callbacks.rollout_metrics import RolloutMetrics
from fastrl.callbacks.run_summary import RunSummary
from fastrl.callbacks.step_checkpoint import StepCheckpoint
from fastrl.callbacks.strategy_adaptation import StrategyAdaptation

__all__ = [
    "DrafterTraining",
    "RandomState",
    "RolloutMetrics",
    "RolloutProgressBar",
    "RunSummary",
    "StepCheckpoint",
    "StrategyAdaptation",
]
