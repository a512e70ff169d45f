"""Hooks into an RL run: drafter training, strategy adaptation, metrics, progress, summary."""

from fastrl.callbacks.progress_bar import RolloutProgressBar
from fastrl.callbacks.rollout_metrics import RolloutMetrics
from fastrl.callbacks.run_summary import RunSummary

__all__ = ["RolloutMetrics", "RolloutProgressBar", "RunSummary"]
