"""The summary's figures by hand; when it is written: at the end, on failure, across a resume."""

import json
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from fastrl.callbacks.run_summary import RunSummary, RunTotals
from fastrl.types import EngineStats
from tests.fake_run import FakePolicy, FakeRollouts, make_batch


def speculating(accepted_tokens: int, row_steps: int) -> EngineStats:
    return EngineStats(
        num_tokens=accepted_tokens,
        num_steps=4,
        seconds=2.0,
        steps_by_strategy={"off": 1, "2_1_3": 3},
        row_steps=row_steps,
        accepted_tokens=accepted_tokens,
    )


def test_figures_match_hand_worked_ones() -> None:
    totals = RunTotals()
    for accepted_tokens, row_steps in ((10, 10), (30, 20), (20, 10), (90, 30), (8, 2)):
        totals.add_step(make_batch(speculating(accepted_tokens, row_steps)), step_seconds=2.0)
    totals.add_held_out_reward(0.25)
    totals.add_held_out_reward(0.5)
    totals.add_held_out_reward(0.75)
    assert totals.figures() == {
        "reward_first": 0.25,
        "reward_last": 0.75,
        "accept_length_first": 60 / 40,
        "accept_length_last": 118 / 42,
        "rollout_share": 0.25,
        "tokens_per_s": 15.8,
        "speculation_share": 0.75,
        "num_steps": 5,
        "num_tokens": 158,
    }


def test_accept_lengths_are_of_steps_that_speculated() -> None:
    totals = RunTotals()
    plain = EngineStats(num_tokens=9, num_steps=9, seconds=1.0, steps_by_strategy={"off": 9})
    for stats in (plain, speculating(4, 2), plain, plain, plain, plain):
        totals.add_step(make_batch(stats), step_seconds=1.0)
    assert totals.figures()["accept_length_first"] == 2
    assert totals.figures()["accept_length_last"] == 2


def test_without_speculation_and_validation_figures_say_so() -> None:
    figures = RunTotals().figures()
    assert figures["accept_length_first"] == 1
    assert figures["reward_first"] is None
    assert figures["rollout_share"] == 0


def trainer_of(folder: Path, **settings: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        num_sanity_val_steps=settings.pop("num_sanity_val_steps", -1),
        logger=settings.pop("logger", False),
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def read_summary(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def test_first_reward_is_before_training_and_last_after_it(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, max_epochs=2, callbacks=[RunSummary()])
    trainer.fit(FakePolicy("tiny"), datamodule=FakeRollouts("tiny", num_steps=3))
    summary = read_summary(tmp_path)
    assert set(summary) == {
        *("reward_first", "reward_last", "accept_length_first", "accept_length_last"),
        *("rollout_share", "seconds", "tokens_per_s", "speculation_share"),
        *("num_steps", "num_tokens", "status"),
    }
    assert (summary["reward_first"], summary["reward_last"]) == (0, 6)
    assert summary["accept_length_last"] == 1.5
    assert (summary["num_steps"], summary["num_tokens"]) == (6, 30)
    assert summary["tokens_per_s"] == 10
    assert summary["status"] == "finished"
    assert not list(tmp_path.glob("*.partial"))


def test_a_sanity_check_of_a_few_batches_is_no_measurement(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, max_epochs=1, num_sanity_val_steps=1, callbacks=[RunSummary()])
    trainer.fit(FakePolicy("tiny"), datamodule=FakeRollouts("tiny", num_steps=3))
    assert read_summary(tmp_path)["reward_first"] == 3


def test_the_reward_before_training_reaches_the_logger(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, max_epochs=1, logger=None, callbacks=[RunSummary()])
    trainer.fit(FakePolicy("tiny"), datamodule=FakeRollouts("tiny"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert trainer.log_dir is not None
    events = EventAccumulator(trainer.log_dir)
    events.Reload()
    logged = [(event.step, event.value) for event in events.Scalars("reward/held_out")]
    assert logged == [(0, 0.0), (2, 2.0)]
    assert read_summary(Path(trainer.log_dir))["reward_last"] == 2


def test_a_failed_run_leaves_what_it_reached(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = trainer_of(tmp_path, max_epochs=1, callbacks=[RunSummary()])
    with pytest.raises(ValueError, match="this step fails"):
        trainer.fit(FakePolicy("tiny", fail_at=3), datamodule=FakeRollouts("tiny", num_steps=9))
    summary = read_summary(tmp_path)
    assert (summary["status"], summary["num_steps"]) == ("failed", 2)
    assert "2 RL steps" in capsys.readouterr().out


def test_the_table_closes_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = trainer_of(tmp_path, max_epochs=1, callbacks=[RunSummary()])
    trainer.fit(FakePolicy("tiny"), datamodule=FakeRollouts("tiny", num_steps=4))
    output = capsys.readouterr().out
    assert "held-out reward" in output
    assert "4.000" in output
    assert str(tmp_path / "summary.json") in output


def test_a_run_that_fails_to_set_up_writes_nothing_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class WithoutData(FakeRollouts):
        def setup(self, stage: str) -> None:
            raise ValueError("no such data")

    monkeypatch.chdir(tmp_path)
    trainer = trainer_of(tmp_path / "run", max_epochs=1, callbacks=[RunSummary()])
    with pytest.raises(ValueError, match="no such data"):
        trainer.fit(FakePolicy("tiny"), datamodule=WithoutData("tiny"))
    assert not list(tmp_path.rglob("summary.json"))


def test_validating_alone_writes_no_summary(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, callbacks=[RunSummary()])
    trainer.validate(FakePolicy("tiny"), datamodule=FakeRollouts("tiny"), verbose=False)
    assert not (tmp_path / "summary.json").exists()


def test_a_resumed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    first = trainer_of(
        tmp_path,
        max_epochs=1,
        callbacks=[RunSummary(), ModelCheckpoint(tmp_path, filename="last")],
    )
    first.fit(FakePolicy("tiny"), datamodule=FakeRollouts("tiny", num_steps=3))
    seconds_before = read_summary(tmp_path)["seconds"]

    second = trainer_of(
        tmp_path, max_epochs=2, enable_checkpointing=False, callbacks=[RunSummary()]
    )
    data = FakeRollouts("tiny", num_steps=3)
    second.fit(FakePolicy("tiny"), datamodule=data, ckpt_path=tmp_path / "last.ckpt")
    summary = read_summary(tmp_path)
    assert (summary["reward_first"], summary["reward_last"]) == (0, 6)
    assert summary["num_steps"] == 6
    assert summary["seconds"] > seconds_before * 0.5
