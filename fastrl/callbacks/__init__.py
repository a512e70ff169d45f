"""Hooks into an RL run: drafter training, strategy adaptation, and what a run shows."""

from fastrl.callbacks.drafter_training import DrafterTraining
from fastrl.callbacks.health import WeightHealth
from fastrl.callbacks.progress_bar import RolloutProgressBar
from fastrl.callbacks.random_state import RandomState
from fastrl.callbacks.rollout_dump import RolloutDump
from fastrl.callbacks.rollout_histograms import RolloutHistograms
from fastrl.callbacks.rollout_metrics import RolloutMetrics
from fastrl.callbacks.run_summary import RunSummary
from fastrl.callbacks.step_checkpoint import StepCheckpoint
from fastrl.callbacks.strategy_adaptation import StrategyAdaptation
from fastrl.callbacks.text_samples import TextSamples
from fastrl.callbacks.timeline import Timeline

__all__ = [
    "DrafterTraining",
    "RandomState",
    "RolloutDump",
    "RolloutHistograms",
    "RolloutMetrics",
    "RolloutProgressBar",
    "RunSummary",
    "StepCheckpoint",
    "StrategyAdaptation",
    "TextSamples",
    "Timeline",
    "WeightHealth",
]
