"""Drafters: what proposes the tokens that the target verifies."""

from fastrl.rollout.drafters.eagle import EagleDrafter

__all__ = ["EagleDrafter"]
