"""Prompts, rewards, and the data module that turns them into rollout batches."""

from fastrl.datamodules.dataset_prompts import DatasetPrompts
from fastrl.datamodules.jsonl_prompts import JsonlPrompts
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
    "JsonlPrompts",
    "PromptSource",
    "ReasoningGymPrompts",
    "ReasoningGymReward",
    "RewardFunction",
    "RolloutDataModule",
]
