"""A hand-written engine, policy and prompt source, for tests of the data module."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from fastrl.datamodules.prompts import (
    HELD_OUT_ID_OFFSET,
    PromptSource,
    Question,
    QuestionSplits,
    split_disjoint,
)
from fastrl.datamodules.rewards import RewardFunction
from fastrl.rollout.engine import CostQuery, StrategySelector, WeightEvents
from fastrl.rollout.sampling import request_key
from fastrl.rollout.weight_differences import WeightDifference
from fastrl.types import (
    OFF,
    DraftStrategy,
    EngineStats,
    FinishReason,
    Prompt,
    Rollout,
    RolloutBatch,
    SamplingParams,
    StepStats,
)


class AlwaysOff:
    """A strategy selector that never speculates."""

    def select(
        self, batch_size: int, context_tokens: int, referenced_rows: int = 0
    ) -> DraftStrategy:
        return OFF

    def record(self, stats: StepStats) -> None: ...

    def exclude(self, strategies: Collection[DraftStrategy]) -> None: ...

    def cost_queries(self, max_batch_size: int, max_context: int) -> Sequence[CostQuery]:
        return ()

    def record_cost(self, query: CostQuery, seconds: float) -> None: ...


@dataclass(frozen=True)
class GenerateCall:
    """What the engine was asked for."""

    prompt_ids: tuple[int, ...]
    policy_version: int
    num_samples: int
    seed: int
    rl_step: int
    sampling: SamplingParams


class FakeEngine:
    """Answers with tokens that are a function of (seed, RL step, prompt id, sample index).

    Fails like a real one if it is used before `start` or without weights.
    """

    def __init__(self) -> None:
        self.drafter_path: str | None = None
        self.strategy_selector: StrategySelector = AlwaysOff()
        self.calls: list[GenerateCall] = []
        self.num_starts = 0
        self.num_loads = 0
        self.is_open = False
        self.resumed_from: dict[str, Any] | None = None
        self._weights: dict[str, Tensor] = {}
        self._policy_version = -1
        self._num_rollouts = 0

    def start(self, model_path: str) -> None:
        assert not self.is_open, "started twice"
        self.is_open = True
        self.num_starts += 1
        self._weights = {}

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        *,
        num_samples: int = 1,
        seed: int = 0,
        rl_step: int = 0,
        return_hidden_states: bool = False,
    ) -> list[Rollout]:
        assert self.is_open, "generate before start"
        assert self._weights, "generate before load_policy"
        ids = tuple(prompt.prompt_id for prompt in prompts)
        self.calls.append(
            GenerateCall(ids, self._policy_version, num_samples, seed, rl_step, sampling)
        )
        rollouts = [
            self._rollout(prompt, sample, request_key(seed, rl_step, prompt.prompt_id, sample))
            for prompt in prompts
            for sample in range(num_samples)
        ]
        self._num_rollouts = len(rollouts)
        return rollouts

    def _rollout(self, prompt: Prompt, sample_index: int, key: int) -> Rollout:
        length = 1 + key % 5
        return Rollout(
            prompt=prompt,
            sample_index=sample_index,
            tokens=tuple(key // (7 + i) % 11 + 3 for i in range(length)),
            logprobs=tuple(-0.5 - i for i in range(length)),
            text="x" * length,
            finish_reason=FinishReason.LENGTH if length == 5 else FinishReason.STOP,
            policy_version=self._policy_version,
        )

    @property
    def drafter_version(self) -> int:
        return -1

    @property
    def policy_version(self) -> int:
        return self._policy_version

    def load_policy(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        assert self.is_open, "load_policy before start"
        self.num_loads += 1
        self._weights = dict(named_tensors)
        self._policy_version = version

    def load_drafter(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        raise AssertionError("the data module does not publish drafters")

    @property
    def weight_events(self) -> WeightEvents:
        return WeightEvents(policy_loads=self.num_loads, wakes=self.num_starts)

    def compare_policy(self, named_tensors: Iterable[tuple[str, Tensor]]) -> list[WeightDifference]:
        raise AssertionError("the data module compares nothing")

    compare_drafter = compare_policy

    def probe(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, *, seed: int = 0
    ) -> list[Rollout]:
        raise AssertionError("the data module asks no canaries")

    def reject_drafter(self, reason: str) -> None:
        raise AssertionError("the data module judges no drafters")

    def stats(self) -> EngineStats:
        return EngineStats(num_rollouts=self._num_rollouts)

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {"policy_version": self._policy_version}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the version without the weights, as the contract allows."""
        assert self.is_open, "load_state_dict before start"
        self.resumed_from = state
        self._policy_version = state["policy_version"]

    def close(self) -> None:
        self.is_open = False


class LengthReward(RewardFunction):
    """The number of characters."""

    def score(self, text: str, prompt: Prompt) -> float:
        return float(len(text))


class FixedPrompts(PromptSource):
    """`n<i>` for training and `h<i>` held out."""

    def __init__(self, num_train: int = 10, num_held_out: int = 5) -> None:
        self.num_train = num_train
        self.num_held_out = num_held_out

    def load(self) -> QuestionSplits:
        def questions(letter: str, count: int, first_id: int) -> list[Question]:
            return [
                Question(prompt_id=first_id + i, text=f"{letter}{i}", answer=str(i))
                for i in range(count)
            ]

        train = questions("n", self.num_train, 0)
        held_out = questions("h", self.num_held_out, HELD_OUT_ID_OFFSET)
        return split_disjoint(train, held_out, "fixed prompts")


class FakePolicy(pl.LightningModule):
    """A policy of one weight that counts its RL steps and keeps the batches it was given."""

    def __init__(self, fail_at_step: int | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.policy = nn.Linear(1, 1, bias=False)
        self.rl_step = 0
        self.policy_version = 0
        self.collect_features = False
        self.fail_at_step = fail_at_step
        self.train_batches: list[RolloutBatch] = []
        self.val_batches: list[RolloutBatch] = []
        self.lags: list[int] = []

    def policy_tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.policy.named_parameters()

    def take_features(self) -> list[Any]:
        return []

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> None:
        if self.rl_step == self.fail_at_step:
            raise KeyboardInterrupt
        self.train_batches.append(batch)
        self.lags.append(self.policy_version - int(batch.policy_version_B.min()))
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.policy.weight.sum())
        optimizer.step()
        self.rl_step += 1
        self.policy_version += 1

    def validation_step(self, batch: RolloutBatch, batch_idx: int) -> None:
        self.val_batches.append(batch)

    def predict_step(self, batch: RolloutBatch, batch_idx: int) -> Tensor:
        return batch.rewards_B

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["counts"] = (self.rl_step, self.policy_version)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.rl_step, self.policy_version = checkpoint["counts"]
