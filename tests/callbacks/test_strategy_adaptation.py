"""The bandit in a real Trainer: installed, logged, discounted, resumed, and alike on two ranks.

The engine is a fake whose step times are simulated; policy, Trainer and process group are real.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastrl.callbacks.strategy_adaptation import StrategyAdaptation, report_scalars
from fastrl.rollout.bandit import (
    Bandit,
    BanditReport,
    BucketReport,
    EpsilonGreedy,
    FixedStrategy,
    Predefined,
)
from fastrl.rollout.engine import StrategySelector
from fastrl.rollout.model_bandit import ModelBased
from fastrl.types import DraftStrategy, RolloutBatch, SamplingParams, StepStats
from tests.recording_logger import RecordingLogger

TREE = DraftStrategy.parse("4_2_8")
BATCHES = (8, 8, 4, 4, 1, 1, 1, 1, 1, 1)
"""Live rows in the steps of one simulated rollout."""


def step(strategy: DraftStrategy, batch_size: int, seconds: float) -> StepStats:
    """Of trees two draft tokens are accepted, always first children."""
    depth = strategy.depth
    offered = [[batch_size] * strategy.topk if d < 3 else [0] * strategy.topk for d in range(depth)]
    accepted = [[batch_size * (d < 2), *[0] * (strategy.topk - 1)] for d in range(depth)]
    return StepStats(
        strategy=strategy,
        batch_size=batch_size,
        context_tokens=9,
        accept_lengths=(1 if strategy.is_off else 3,) * batch_size,
        seconds=seconds,
        offered_by_rank=tuple(map(tuple, offered)),
        accepted_by_rank=tuple(map(tuple, accepted)),
    )


class FakeEngine:
    """Steps the selector through a shrinking batch; trees are slower at larger ones."""

    def __init__(self, drafter_path: str | None = "drafter", rank_delay: float = 0.0) -> None:
        self.drafter_path = drafter_path
        self.drafter_version = -1
        self.strategy_selector: StrategySelector = FixedStrategy()
        self.rank_delay = rank_delay
        self.chosen: list[str] = []
        self.batches: tuple[int, ...] = BATCHES

    def generate(self, rank: int) -> None:
        for index, batch_size in enumerate(self.batches):
            strategy = self.strategy_selector.select(batch_size, 9)
            self.chosen.append(str(strategy))
            seconds = 0.01 + 0.001 * index + (0 if strategy.is_off else 0.004 * batch_size)
            self.strategy_selector.record(
                step(strategy, batch_size, seconds + rank * self.rank_delay)
            )


class FakeRollouts(LightningDataModule):
    def __init__(self, engine: FakeEngine, num_rl_steps: int) -> None:
        super().__init__()
        self.engine = engine
        self.num_rl_steps = num_rl_steps

    def train_dataloader(self) -> DataLoader[RolloutBatch]:
        rl_steps = cast(Dataset[RolloutBatch], range(self.num_rl_steps))
        return DataLoader(rl_steps, collate_fn=self.rollout, batch_size=None)

    def rollout(self, _: Any) -> RolloutBatch:
        assert self.trainer is not None
        self.engine.generate(self.trainer.global_rank)
        ones_BT = torch.ones(2, 3, dtype=torch.bool)
        return RolloutBatch(
            tokens_BT=ones_BT.long(),
            attention_mask_BT=ones_BT,
            response_mask_BT=ones_BT,
            rollout_logprobs_BT=ones_BT.float(),
            rewards_B=torch.ones(2),
            group_B=torch.zeros(2, dtype=torch.long),
            is_truncated_B=torch.zeros(2, dtype=torch.bool),
            policy_version_B=torch.zeros(2, dtype=torch.long),
            sampling=SamplingParams(),
            rl_step=0,
        )

    def transfer_batch_to_device(self, batch: RolloutBatch, *_: Any) -> RolloutBatch:
        return batch


class TinyPolicy(LightningModule):
    """Counts RL steps; the policy changes in each, unless frozen."""

    def __init__(self, is_frozen: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.is_frozen = is_frozen
        self.rl_step = 0
        self.policy_version = 0

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> None:
        self.manual_backward(self.weight.sum())
        cast(torch.optim.Optimizer, self.optimizers()).step()
        self.rl_step += 1
        self.policy_version += not self.is_frozen

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, *callbacks: Any, logger: Any = False, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=list(callbacks),
        default_root_dir=folder,
        logger=logger,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )


def test_bandit_chooses_the_engine_s_strategies_and_its_choices_are_logged(tmp_path: Path) -> None:
    engine, policy = FakeEngine(), TinyPolicy()
    callback = StrategyAdaptation(EpsilonGreedy(["4_2_8"], epsilon=0))
    recorder = RecordingLogger(tmp_path)
    trainer(tmp_path, callback, logger=recorder).fit(policy, FakeRollouts(engine, 6))
    assert engine.strategy_selector is callback.bandit
    logged = [(step, metrics) for step, metrics in recorder.logged if "bandit/decisions" in metrics]
    assert [step for step, _ in logged] == [1, 2, 3, 4, 5, 6]
    for index, (_, metrics) in enumerate(logged):
        chosen = engine.chosen[index * len(BATCHES) : (index + 1) * len(BATCHES)]
        assert metrics["bandit/decisions"] == len(BATCHES)
        assert metrics["bandit/arm_share_off"] == chosen.count("off") / len(BATCHES)
        assert metrics["bandit/arm_share_4_2_8"] == chosen.count("4_2_8") / len(BATCHES)
    assert logged[0][1]["bandit/explore_share"] == 1.0
    last = logged[-1][1]
    assert last["bandit/explore_share"] == 0
    assert last["bandit/best_verify_tokens_batch_1"] == 8
    assert last["bandit/best_verify_tokens_batch_5-8"] == 1
    assert 3 / 0.024 < last["bandit/tokens_per_s_batch_1"] < 3 / 0.018


def test_a_batch_size_that_was_not_met_is_not_logged_anew(tmp_path: Path) -> None:
    class ShrinkingEngine(FakeEngine):
        """Its rollouts after the third have one row from the start."""

        def generate(self, rank: int) -> None:
            super().generate(rank)
            if len(self.chosen) >= 3 * len(BATCHES):
                self.batches = (1, 1)

    recorder = RecordingLogger(tmp_path)
    callback = StrategyAdaptation(EpsilonGreedy(["4_2_8"], epsilon=0))
    run = FakeRollouts(ShrinkingEngine(), 6)
    trainer(tmp_path, callback, logger=recorder, log_every_n_steps=1).fit(TinyPolicy(), run)
    tag = "bandit/tokens_per_s_batch_5-8"
    assert [step for step, metrics in recorder.logged if tag in metrics] == [1, 2, 3]
    tag = "bandit/tokens_per_s_batch_1"
    assert [step for step, metrics in recorder.logged if tag in metrics] == [1, 2, 3, 4, 5, 6]


class PublishingEngine(FakeEngine):
    """Takes a new drafter in every second RL step."""

    def __init__(self) -> None:
        super().__init__()
        self.num_calls = 0

    def generate(self, rank: int) -> None:
        super().generate(rank)
        self.num_calls += 1
        self.drafter_version = self.num_calls // 2


@pytest.mark.parametrize("is_frozen", [False, True])
def test_the_bandit_is_told_of_each_new_policy_and_drafter_once(
    tmp_path: Path, is_frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[float, bool]] = []
    bandit = EpsilonGreedy(["4_2_8"])
    monkeypatch.setattr(
        bandit, "discount", lambda keep, drafter_changed: told.append((keep, drafter_changed))
    )
    callback = StrategyAdaptation(bandit, keep=0.25)
    trainer(tmp_path, callback).fit(TinyPolicy(is_frozen), FakeRollouts(PublishingEngine(), 5))
    changes = [True, True, True] if is_frozen else [True, True, False, True, False]
    assert told == [(0.25, changed) for changed in changes]


@pytest.mark.parametrize(
    "bandit",
    [
        lambda: EpsilonGreedy(["4_2_8", "2_1_3"], epsilon=0.4, seed=3),
        lambda: ModelBased(["4_2_8", "2_1_3", "2_2_4"], seed=3),
    ],
)
def test_resumed_run_chooses_as_the_uninterrupted_one(
    bandit: Callable[[], Bandit], tmp_path: Path
) -> None:
    def callback() -> StrategyAdaptation:
        return StrategyAdaptation(bandit())

    whole, whole_engine = callback(), FakeEngine()
    saver = ModelCheckpoint(
        dirpath=tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1
    )
    trainer(tmp_path, whole, saver).fit(TinyPolicy(), FakeRollouts(whole_engine, 6))

    resumed, resumed_engine = callback(), FakeEngine()
    policy = TinyPolicy()
    policy.rl_step = policy.policy_version = 3
    trainer(tmp_path, resumed).fit(
        policy, FakeRollouts(resumed_engine, 6), ckpt_path=tmp_path / "step=3.ckpt"
    )
    assert len(resumed_engine.chosen) == 3 * len(BATCHES)
    assert resumed_engine.chosen == whole_engine.chosen[3 * len(BATCHES) :]
    assert resumed.state_dict() == whole.state_dict()


def heat_maps(logger: TensorBoardLogger) -> dict[int, bytes]:
    """Pictures by RL step."""
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0})
    events.Reload()
    images = events.Images("bandit/heat_map")
    assert len({image.step for image in images}) == len(images)
    return {image.step: image.encoded_image_string for image in images}


class Validated(FakeRollouts):
    """Validates on a batch of ones, or fails there: after the step, before its picture."""

    def __init__(self, num_rl_steps: int, fails: bool = False) -> None:
        super().__init__(FakeEngine(), num_rl_steps)
        self.fails = fails

    def val_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(cast(Dataset[Tensor], [0]), collate_fn=self.one_or_none, batch_size=None)

    def one_or_none(self, _: Any) -> Tensor:
        if self.fails:
            raise RuntimeError("killed")
        return torch.ones(1)


class ValidatedPolicy(TinyPolicy):
    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Nothing to measure."""


@pytest.mark.parametrize("best_is_known", [True, False])
def test_a_step_saved_before_its_heat_map_is_drawn_by_the_resumed_run(
    tmp_path: Path, best_is_known: bool
) -> None:
    """The same picture as in the run that went on; without `off`, no arm is known to be best."""

    def run(name: str, *, fails: bool = False, **options: Any) -> dict[int, bytes]:
        logger = TensorBoardLogger(tmp_path, name=name)
        callback = StrategyAdaptation(
            Predefined({1: "4_2_8", 2: "off" if best_is_known else "4_2_8"})
        )
        saver = ModelCheckpoint(dirpath=tmp_path / name, filename="{step}", every_n_train_steps=1)
        policy = ValidatedPolicy()
        policy.rl_step = policy.policy_version = options.pop("rl_step", 0)
        fit = trainer(tmp_path, callback, saver, logger=logger, num_sanity_val_steps=0)
        fit.fit(policy, Validated(3, fails), **options)
        return heat_maps(logger)

    whole = run("whole")
    assert list(whole) == [3]
    with pytest.raises(RuntimeError, match="killed"):
        run("killed", fails=True)
    resumed = run("resumed", rl_step=3, ckpt_path=tmp_path / "killed" / "step=3.ckpt")
    assert resumed == whole


def test_a_period_s_gains_are_a_rank_s_own_and_its_regret_is_what_was_logged(
    tmp_path: Path,
) -> None:
    recorder = RecordingLogger(tmp_path)
    callback = StrategyAdaptation(ModelBased(["4_2_8", "2_1_3"]), keep=0.5)
    trainer(tmp_path, callback, logger=recorder).fit(TinyPolicy(), FakeRollouts(FakeEngine(), 6))
    logged = [metrics for _, metrics in recorder.logged if "bandit/regret_s" in metrics]
    regrets = [metrics["bandit/regret_s"] for metrics in logged]
    assert regrets == sorted(regrets)
    assert callback.bandit.report().regret_s == pytest.approx(regrets[-1])


def report_of_one_bucket() -> BanditReport:
    shares = {"off": 0.75, "4_2_8": 0.25}
    bucket = BucketReport(
        arm_shares=shares,
        best=TREE,
        tokens_per_second=120.0,
        gain=1.5,
        predicted_gain=1.4,
        arm_gains={"off": 1.0},
        believed_gains={"off": 1.0, "4_2_8": 2.0},
    )
    return BanditReport(
        num_decisions=8,
        explore_share=0.25,
        arm_shares=shares,
        gain=1.5,
        regret_share=0.01,
        regret_s=3.0,
        buckets={"2-4": bucket},
    )


def test_report_s_scalars_are_named_by_strategy_and_bucket() -> None:
    assert report_scalars(report_of_one_bucket()) == {
        "bandit/decisions": 8.0,
        "bandit/explore_share": 0.25,
        "bandit/gain": 1.5,
        "bandit/regret_share": 0.01,
        "bandit/regret_s": 3.0,
        "bandit/arm_share_off": 0.75,
        "bandit/arm_share_4_2_8": 0.25,
        "bandit/tokens_per_s_batch_2-4": 120.0,
        "bandit/gain_batch_2-4": 1.5,
        "bandit/predicted_gain_batch_2-4": 1.4,
        "bandit/best_verify_tokens_batch_2-4": 8.0,
        "bandit/best_is_ngram_batch_2-4": 0.0,
        "bandit_shares/batch_2-4/off": 0.75,
        "bandit_shares/batch_2-4/4_2_8": 0.25,
    }


def test_a_gain_that_was_not_predicted_has_no_scalar() -> None:
    report = report_of_one_bucket()
    bucket = dataclasses.replace(report.buckets["2-4"], predicted_gain=None)
    scalars = report_scalars(dataclasses.replace(report, buckets={"2-4": bucket}))
    assert "bandit/predicted_gain_batch_2-4" not in scalars


def test_learned_arms_are_refused_without_a_drafter(tmp_path: Path) -> None:
    callback = StrategyAdaptation(EpsilonGreedy(["ngram_4_1_5", "4_2_8"]))
    with pytest.raises(ValueError, match=r"\['4_2_8'\].*drafter_path is null; set drafter_path"):
        trainer(tmp_path, callback).fit(TinyPolicy(), FakeRollouts(FakeEngine(None), 1))


def test_n_gram_arms_need_no_drafter(tmp_path: Path) -> None:
    engine, callback = FakeEngine(None), StrategyAdaptation(EpsilonGreedy(["ngram_4_1_5"]))
    trainer(tmp_path, callback).fit(TinyPolicy(), FakeRollouts(engine, 2))
    assert set(engine.chosen) == {"off", "ngram_4_1_5"}


def test_run_without_datamodule_is_refused(tmp_path: Path) -> None:
    def loader() -> Iterator[Tensor]:
        yield torch.ones(1)

    callback = StrategyAdaptation(EpsilonGreedy(["4_2_8"]))
    with pytest.raises(ValueError, match="needs a datamodule with a rollout engine"):
        trainer(tmp_path, callback).fit(TinyPolicy(), loader())


def test_keep_outside_0_to_1_is_refused() -> None:
    with pytest.raises(ValueError, match=r"keep is a share, in \[0, 1\].*got 1.5"):
        StrategyAdaptation(EpsilonGreedy(["4_2_8"]), keep=1.5)
