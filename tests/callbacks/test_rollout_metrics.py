"""What each scalar counts, by hand; that it is logged at its RL step; what a step's time is."""

from pathlib import Path

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

from fastrl.callbacks.rollout_metrics import (
    RolloutMetrics,
    acceptance_scalars,
    bar_values,
    rollout_scalars,
)
from fastrl.callbacks.run_summary import RunSummary
from fastrl.callbacks.step_clock import StepClock
from fastrl.types import EngineStats
from tests.fake_run import FakePolicy, FakeRollouts, make_batch
from tests.recording_logger import RecordingLogger

STATS = EngineStats(
    num_tokens=60,
    num_steps=20,
    seconds=4.0,
    prefill_seconds=1.0,
    draft_seconds=0.5,
    steps_by_strategy={"off": 5, "2_1_3": 9, "4_2_8": 6},
    row_steps=25,
    accepted_tokens=40,
    offered_by_depth=(25, 10, 0),
    accepted_by_depth=(10, 5, 0),
    ngram_offered_by_depth=(8, 2),
    ngram_accepted_by_depth=(2, 2),
    drafter_failures=("version 3: weights", "version 4: weights"),
)


def test_rollout_scalars_match_hand_worked_figures() -> None:
    batch = make_batch(
        STATS,
        lengths=(4, 1, 7, 2),
        rewards=(1, 0, 0, 1),
        truncated=(False, False, True, False),
        failures=(None, "timeout", None, None),
    )
    assert rollout_scalars(batch) == {
        "rollout/num_tokens": 60,
        "rollout/tokens_per_s": 15,
        "rollout/response_length_mean": 3.5,
        "rollout/response_length_max": 7,
        "rollout/truncated_share": 0.25,
        "rollout/accept_length": 1.6,
        "rollout/spec_steps_share": 0.75,
        "rollout/prefill_share": 0.25,
        "rollout/draft_share": 0.125,
        "drafter/failures": 2,
        "reward/failures": 1,
    }


def test_acceptance_is_a_share_of_what_was_offered_at_each_depth() -> None:
    assert acceptance_scalars(STATS) == {
        "drafter/acceptance_rate": pytest.approx(15 / 35),
        "drafter/accept_depth_1": 0.4,
        "drafter/accept_depth_2": 0.5,
        "drafter/ngram_acceptance_rate": 0.4,
        "drafter/ngram_accept_depth_1": 0.25,
        "drafter/ngram_accept_depth_2": 1,
    }


def test_a_step_without_drafts_of_a_drafter_says_nothing_of_it() -> None:
    plain = EngineStats(num_tokens=3, num_steps=3, seconds=1, steps_by_strategy={"off": 3})
    assert acceptance_scalars(plain) == {}
    ngram = EngineStats(row_steps=2, ngram_offered_by_depth=(2,), ngram_accepted_by_depth=(0,))
    assert acceptance_scalars(ngram) == {
        "drafter/ngram_acceptance_rate": 0,
        "drafter/ngram_accept_depth_1": 0,
    }
    scalars = rollout_scalars(make_batch(plain))
    assert scalars["rollout/spec_steps_share"] == 0
    assert scalars["rollout/accept_length"] == 1


def test_the_bar_shows_reward_accept_length_and_speed() -> None:
    assert bar_values(make_batch(STATS)) == {"reward": 0.5, "accept": 1.6, "tok/s": 15}


def test_scalars_are_logged_at_the_rl_step_not_the_optimizer_step(tmp_path: Path) -> None:
    recorder = RecordingLogger(tmp_path)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        limit_val_batches=0,
        log_every_n_steps=1,
        logger=recorder,
        callbacks=[RolloutMetrics()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(FakePolicy("tiny"), datamodule=FakeRollouts("tiny", num_steps=2))
    assert trainer.global_step == 8
    steps = [step for step, scalars in recorder.logged if "rollout/num_tokens" in scalars]
    assert steps == [1, 2, 3, 4]
    scalars = next(s for _, s in recorder.logged if "rollout/num_tokens" in s)
    assert scalars["time/rollout"] == 0.5
    assert scalars["time/publish"] == 0.25
    assert scalars["time/reward"] == 0.125
    assert scalars["rollout/accept_length"] == 1.5
    assert scalars["time/step"] > 0
    assert "tok/s" not in scalars
    steps = [step for step, scalars in recorder.logged if "drafter/accept_depth_1" in scalars]
    assert steps == [1, 2, 3, 4]


def test_the_step_clock_leaves_out_what_ends_with_a_resume() -> None:
    now = iter([0.0, 10.0, 13.0, 20.0, 24.5, 25.5])
    clock = StepClock(lambda: next(now))  # 0
    clock.resume()  # 10
    assert clock.lap() == 3  # 13
    clock.resume()  # 20, after 7 seconds of validation
    assert clock.lap() == 4.5
    assert clock.lap() == 1


class LongLoading(Callback):
    """Loading takes 1000 seconds of the clock that it is; saves after the first RL step."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds += 1000

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        if pl_module.rl_step == 1:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "step-1.ckpt")


def test_the_first_step_of_a_resumed_run_leaves_out_loading(tmp_path: Path) -> None:
    """Lightning tells of no epoch's start where a run goes on within one."""
    for ckpt_path in (None, tmp_path / "step-1.ckpt"):
        loading, metrics, summary = LongLoading(), RolloutMetrics(), RunSummary()
        metrics._clock, summary._clock = StepClock(loading), StepClock(loading)
        recorder = RecordingLogger(tmp_path)
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=1,
            limit_val_batches=0,
            log_every_n_steps=1,
            default_root_dir=tmp_path,
            logger=recorder,
            callbacks=[loading, metrics, summary],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = FakeRollouts("tiny", num_steps=3)
        weights_only = None if ckpt_path is None else True
        policy = FakePolicy("tiny")
        trainer.fit(policy, datamodule=data, ckpt_path=ckpt_path, weights_only=weights_only)
        steps = [s["time/step"] for _, s in recorder.logged if "time/step" in s]
        assert steps == [0.0] * (3 if ckpt_path is None else 2)
        assert summary._totals.step_seconds == 0
