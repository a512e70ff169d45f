"""Reward functions, and the worker processes that run them."""

from fastrl.datamodules.rewards.base import BatchRewardFunction, RewardFunction
from fastrl.datamodules.rewards.exact_match import ExactMatchReward
from fastrl.datamodules.rewards.reasoning_gym import ReasoningGymReward
from fastrl.datamodules.rewards.workers import RewardPool

__all__ = [
    "BatchRewardFunction",
    "ExactMatchReward",
    "ReasoningGymReward",
    "RewardFunction",
    "RewardPool",
]
