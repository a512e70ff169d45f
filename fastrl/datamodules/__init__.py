"""Prompts, rewards, and the data modules that make batches: rollouts, or drafter features."""

from fastrl.datamodules.dataset_prompts import DatasetPrompts
from fastrl.datamodules.features import FeatureDataModule
from fastrl.datamodules.jsonl_prompts import JsonlPrompts
from fastrl.datamodules.mixed_prompts import MixedPrompts
from fastrl.datamodules.prompts import PromptSource
from fastrl.datamodules.reasoning_gym_prompts import ReasoningGymPrompts
from fastrl.datamodules.rewards import (
    BatchRewardFunction,
    ExactMatchReward,
    ReasoningGymReward,
    RewardFunction,
)
from fastrl.datamodules.rollouts import RolloutDataModule

__all__ = [
    "BatchRewardFunction",
    "DatasetPrompts",
    "ExactMatchReward",
    "FeatureDataModule",
    "JsonlPrompts",
    "MixedPrompts",
    "PromptSource",
    "ReasoningGymPrompts",
    "ReasoningGymReward",
    "RewardFunction",
    "RolloutDataModule",
]
