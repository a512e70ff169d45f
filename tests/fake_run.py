"""A run whose policy is two weights and whose rollouts are made up: for the shell around it.

Policy and data module are named by `class_path` in the CLI's tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn

from fastrl.datamodules import RolloutDataModule
from fastrl.modules import LossInputs, PolicyModule, ScoredResponse
from fastrl.types import EngineStats, RewardResult, RolloutBatch, SamplingParams


def make_batch(
    stats: EngineStats = EngineStats(),  # noqa: B008  (frozen)
    *,
    lengths: tuple[int, ...] = (3, 2),
    rewards: tuple[float, ...] = (1.0, 0.0),
    truncated: tuple[bool, ...] = (True, False),
    failures: tuple[str | None, ...] = (None, None),
    rollout_seconds: float = 0.5,
) -> RolloutBatch:
    """A batch of one-token prompts and responses of the given lengths."""
    num_rows, width = len(lengths), 1 + max(lengths)
    position_T = torch.arange(width)
    attention_mask_BT = position_T < 1 + torch.tensor(lengths).unsqueeze(1)
    return RolloutBatch(
        tokens_BT=torch.zeros(num_rows, width, dtype=torch.long),
        attention_mask_BT=attention_mask_BT,
        response_mask_BT=attention_mask_BT & (position_T > 0),
        rollout_logprobs_BT=torch.zeros(num_rows, width),
        rewards_B=torch.tensor(rewards),
        group_B=torch.zeros(num_rows, dtype=torch.long),
        is_truncated_B=torch.tensor(truncated),
        policy_version_B=torch.zeros(num_rows, dtype=torch.long),
        sampling=SamplingParams(),
        rl_step=0,
        reward_results=tuple(
            RewardResult(score=reward, failure=failure)
            for reward, failure in zip(rewards, failures, strict=True)
        ),
        stats=stats,
        timings={"publish": 0.25, "rollout": rollout_seconds, "reward": 0.125},
    )


class FakePolicy(PolicyModule):
    """Two optimizer steps an RL step; its held-out reward is its number of RL steps.

    Args:
        model_path: Not read; 'refused' is refused.
        interrupt_at: RL step before which the user presses Ctrl-C; 0: never.
        fail_at: RL step before which training fails; 0: never.
    """

    def __init__(self, model_path: str, interrupt_at: int = 0, fail_at: int = 0) -> None:
        LightningModule.__init__(self)
        if model_path == "refused":
            raise ValueError("model_path: 'refused' is refused; give another")
        self.automatic_optimization = False
        self.weights = nn.Linear(1, 1)
        self.rl_step = 0
        self.policy_version = 0
        self.is_updating = False
        self.interrupt_at = interrupt_at
        self.fail_at = fail_at

    def advantages(self, batch: RolloutBatch) -> Tensor:
        raise AssertionError("not asked for")

    def loss(self, inputs: LossInputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        raise AssertionError("not asked for")

    def configure_model(self) -> None:
        """Nothing to load."""

    def on_fit_start(self) -> None:
        """Nothing to check."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def policy_tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.weights.named_parameters()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["rl_step"] = self.rl_step

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.rl_step = checkpoint["rl_step"]

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> None:
        if self.rl_step + 1 == self.interrupt_at:
            raise KeyboardInterrupt
        if self.rl_step + 1 == self.fail_at:
            raise ValueError("this step fails")
        for _ in range(2):
            self.optimizers().step()  # type: ignore[union-attr]
        self.rl_step += 1

    def validation_step(self, batch: RolloutBatch, batch_idx: int) -> None:
        self.log_dict(
            {"reward/held_out": float(self.rl_step), "step": float(self.rl_step)},
            on_step=False,
            on_epoch=True,
            batch_size=len(batch),
        )

    def predict_step(self, batch: RolloutBatch, batch_idx: int) -> list[ScoredResponse]:
        return [ScoredResponse(prompt="1 + 1", response=f"= {batch_idx}", reward=0.5)]


class FakeLoader:
    """So many batches."""

    def __init__(self, num_batches: int, make: Callable[[], RolloutBatch]) -> None:
        self.num_batches = num_batches
        self.make = make

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[RolloutBatch]:
        return (self.make() for _ in range(self.num_batches))


class FakeRollouts(RolloutDataModule):
    """Made-up rollouts.

    Args:
        model_path: Linked to the policy's.
        num_steps: RL steps an epoch.
    """

    def __init__(self, model_path: str, num_steps: int = 2) -> None:
        LightningDataModule.__init__(self)
        self.model_path = model_path
        self.num_steps = num_steps
        self.group_size = 1
        self.was_closed = False

    def setup(self, stage: str) -> None:
        """Nothing to load."""

    def make(self) -> RolloutBatch:
        stats = EngineStats(
            num_tokens=5,
            num_steps=3,
            seconds=0.5,
            steps_by_strategy={"off": 1, "2_1_3": 2},
            row_steps=4,
            accepted_tokens=6,
            offered_by_depth=(4, 1),
            accepted_by_depth=(1, 1),
        )
        return make_batch(stats)

    def train_dataloader(self) -> Any:
        return FakeLoader(self.num_steps, self.make)

    def val_dataloader(self) -> Any:
        return FakeLoader(1, self.make)

    def predict_dataloader(self) -> Any:
        return FakeLoader(2, self.make)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing."""

    def teardown(self, stage: str) -> None:
        self.was_closed = True

    def on_exception(self, exception: BaseException) -> None:
        self.was_closed = True
