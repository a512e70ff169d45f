"""The embedded rollout engine."""

from fastrl.rollout.torch_engine.engine import TorchEngine

__all__ = ["TorchEngine"]
