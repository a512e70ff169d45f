"""Dumped rollouts read back and compared; when files are written, and that they are whole."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from fastrl.callbacks.rollout_dump import RolloutDump
from fastrl.types import FinishReason, Prompt, RewardResult, Rollout, RolloutBatch
from tests.fake_run import FakeLoader, FakePolicy, FakeRollouts, make_batch


def rollout(prompt_id: int, sample_index: int, **changes: Any) -> Rollout:
    prompt = Prompt(
        prompt_id=prompt_id, tokens=(0,), text=f"question\n{prompt_id} — «é»", answer=str(prompt_id)
    )
    settings: dict[str, Any] = {
        "tokens": (3, 4, 5, 6),
        "logprobs": (-0.1, -2.5e-7, -0.30000001192092896, 0.0),
        "text": 'a "response"\n日本 \U0001f600',
        "finish_reason": FinishReason.STOP,
        "policy_version": 2,
        "accept_lengths": (1, 2),
        "num_verify_steps": 1,
    }
    return Rollout(prompt=prompt, sample_index=sample_index, **(settings | changes))


ROLLOUTS = (
    rollout(7, 0),
    rollout(7, 1, finish_reason=FinishReason.LENGTH, accept_lengths=(1, 1, 1)),
    rollout(1 << 41, 0),
)
RESULTS = (
    RewardResult(score=1.0),
    RewardResult(score=0.0, failure="timeout"),
    RewardResult(score=0.1),
)


class Rollouts(FakeRollouts):
    """The same rollouts in each batch; two batches a validation."""

    def make(self) -> RolloutBatch:
        batch = make_batch(
            lengths=(4, 4, 4),
            rewards=(1.0, 0.0, 0.1),
            truncated=(False, True, False),
            failures=(None, "timeout", None),
        )
        return dataclasses.replace(batch, rollouts=ROLLOUTS, reward_results=RESULTS)

    def val_dataloader(self) -> Any:
        return FakeLoader(2, self.make)


def dump(folder: Path, num_steps: int = 1, **options: Any) -> dict[str, list[dict[str, Any]]]:
    """What is in each file after a run."""
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        default_root_dir=folder,
        logger=False,
        callbacks=[RolloutDump(**options)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(FakePolicy("tiny"), datamodule=Rollouts("tiny", num_steps=num_steps))
    return {
        path.name: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in sorted((folder / "rollouts").iterdir())
    }


def test_a_rollout_is_read_back_as_it_was(tmp_path: Path) -> None:
    ((name, dumped),) = dump(tmp_path).items()
    assert name == "step_000001.jsonl"
    assert len(dumped) == len(ROLLOUTS)
    for row, original, result in zip(dumped, ROLLOUTS, RESULTS, strict=True):
        prompt = Prompt(
            prompt_id=row.pop("prompt_id"),
            tokens=(0,),
            text=row.pop("prompt"),
            answer=row.pop("answer"),
        )
        assert row.pop("rl_step") == 1
        assert RewardResult(score=row.pop("reward"), failure=row.pop("failure")) == result
        read = Rollout(
            prompt=prompt,
            text=row.pop("response"),
            finish_reason=FinishReason(row.pop("finish_reason")),
            **{name: tuple(row.pop(name)) for name in ("tokens", "logprobs", "accept_lengths")},
            **row,
        )
        assert read == original


def test_files_are_written_every_n_steps_from_the_first_on(tmp_path: Path) -> None:
    files = dump(tmp_path, num_steps=7, every_n_steps=3)
    assert list(files) == [f"step_00000{step}.jsonl" for step in (1, 4, 7)]
    assert [rows[0]["rl_step"] for rows in files.values()] == [1, 4, 7]


def test_the_first_rollouts_are_kept(tmp_path: Path) -> None:
    (rows,) = dump(tmp_path, max_rollouts=2).values()
    assert [(row["prompt_id"], row["sample_index"]) for row in rows] == [(7, 0), (7, 1)]


def test_a_validation_is_one_file_of_all_its_batches(tmp_path: Path) -> None:
    files = dump(tmp_path, num_steps=2, every_n_steps=9, include_held_out=True)
    assert list(files) == ["held_out_000000.jsonl", "held_out_000002.jsonl", "step_000001.jsonl"]
    assert len(files["held_out_000002.jsonl"]) == 2 * len(ROLLOUTS)
    assert {row["rl_step"] for row in files["held_out_000002.jsonl"]} == {2}


def test_a_rank_among_several_names_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "world_size", 4)
    monkeypatch.setattr(Trainer, "global_rank", 2)
    callback = RolloutDump()
    trainer = Trainer(accelerator="cpu", default_root_dir=tmp_path, logger=False)
    module = FakePolicy("tiny")
    module.rl_step = 12
    callback.setup(trainer, module, "fit")
    callback.on_train_batch_end(trainer, module, None, Rollouts("tiny").make(), 0)
    assert [path.name for path in tmp_path.rglob("*.jsonl*")] == ["step_000012_rank_2.jsonl"]


@pytest.mark.parametrize("options", [{"every_n_steps": 0}, {"max_rollouts": 0}])
def test_counts_are_checked(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"RolloutDump: .* must be >= 1.* got 0"):
        RolloutDump(**options)
