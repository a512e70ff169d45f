"""The quickstart in miniature, end to end, with its own models: every part at work, for real."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoConfig

from fastrl.callbacks import DrafterTraining
from fastrl.cli import FastRLCLI
from fastrl.rollout.drafters.eagle3 import Eagle3Drafter
from fastrl.types import RolloutBatch

ROOT = Path(__file__).parents[1]
CALLBACKS = "--trainer.callbacks"
NUM_STEPS = 4


class BatchRecorder(Callback):
    """Keeps every training batch; can press Ctrl-C between a step's rollouts and its update."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.batches: list[RolloutBatch] = []
        self.interrupt_at = interrupt_at

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: RolloutBatch, batch_idx: int
    ) -> None:
        if batch_idx == self.interrupt_at:
            raise KeyboardInterrupt

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: RolloutBatch,
        batch_idx: int,
    ) -> None:
        self.batches.append(batch)


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["fastrl"])


def run_quickstart(
    folder: Path, *options: str, interrupt_at: int | None = None
) -> tuple[FastRLCLI, BatchRecorder]:
    """The quickstart's YAML, smaller by command-line options."""
    recorder = BatchRecorder(interrupt_at)

    class RecordingCLI(FastRLCLI):
        def instantiate_trainer(self, **kwargs: Any) -> Trainer:
            trainer = super().instantiate_trainer(**kwargs)
            trainer.callbacks.append(recorder)
            return trainer

    cli = RecordingCLI(
        [
            "fit",
            "--config=configs/quickstart.yaml",
            f"--trainer.default_root_dir={folder}",
            f"--trainer.val_check_interval={NUM_STEPS}",
            f"--data.init_args.num_steps={NUM_STEPS}",
            "--data.init_args.prompts_per_step=4",
            "--data.init_args.group_size=4",
            "--data.init_args.sampling.max_tokens=96",
            "--data.init_args.prompts.init_args.num_held_out=8",
            *options,
        ]
    )
    return cli, recorder


def scalars(folder: Path) -> dict[str, list[int]]:
    """Steps at which each TensorBoard scalar was written."""
    (run,) = folder.glob("lightning_logs/version_*")
    events = EventAccumulator(str(run))
    events.Reload()
    return {tag: [e.step for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_the_quickstart_runs_and_shows_what_it_did(tmp_path: Path) -> None:
    _, recorder = run_quickstart(tmp_path)
    assert [batch.rl_step for batch in recorder.batches] == list(range(NUM_STEPS))
    for version, batch in enumerate(recorder.batches):
        assert batch.policy_version_B.unique().tolist() == [version]  # lag 0
        assert not any(result.failure for result in batch.reward_results)
    steps = scalars(tmp_path)
    for name in (
        *("reward/mean", "policy/loss", "policy/entropy", "policy/grad_norm"),
        *("rollout/tokens_per_s", "rollout/accept_length", "rollout/response_length_max"),
        *("drafter/num_steps", "drafter/time_share", "drafter/held_out_acceptance_depth_1"),
        *("drafter/version", "bandit/arm_share_off", "bandit/explore_share"),
        *("time/rollout", "time/update", "time/drafter", "time/step"),
    ):
        assert steps[name] == list(range(1, NUM_STEPS + 1)), name
    assert "drafter/loss" in steps  # of steps that had time for training
    assert "drafter/acceptance_rate" in steps
    assert "drafter/accept_depth_1" in steps
    assert steps["reward/held_out"] == [0, NUM_STEPS]
    (summary_file,) = tmp_path.glob("lightning_logs/version_*/summary.json")
    summary = json.loads(summary_file.read_text())
    assert summary["status"] == "finished"
    assert summary["num_steps"] == NUM_STEPS
    assert summary["num_tokens"] == sum(int(b.response_mask_BT.sum()) for b in recorder.batches)
    for name in ("reward_first", "reward_last", "rollout_share"):
        assert 0 <= summary[name] <= 1, name
    for name in ("accept_length_first", "accept_length_last"):
        assert summary[name] >= 1, name
    assert summary["seconds"] > 0
    assert list(tmp_path.glob("lightning_logs/version_*/checkpoints/*.ckpt"))


def test_dumped_rollouts_are_those_that_were_trained_on(tmp_path: Path) -> None:
    """As the README has it; the last file is compared, after the drafter was published."""
    _, recorder = run_quickstart(
        tmp_path, f"{CALLBACKS}+=fastrl.callbacks.RolloutDump", f"{CALLBACKS}.every_n_steps=3"
    )
    files = sorted(tmp_path.glob("lightning_logs/version_*/rollouts/*"))
    assert [file.name for file in files] == ["step_000001.jsonl", "step_000004.jsonl"]
    dumped = [json.loads(line) for line in files[1].read_text().splitlines()]
    batch = recorder.batches[3]
    assert len(dumped) == len(batch)
    assert any(row["num_verify_steps"] for row in dumped)
    for row, tokens_T, mask_T, reward in zip(
        dumped, batch.tokens_BT, batch.response_mask_BT, batch.rewards_B.tolist(), strict=True
    ):
        assert row["tokens"] == tokens_T[mask_T].tolist()
        assert row["reward"] == pytest.approx(reward)
        assert 1 + sum(row["accept_lengths"]) == len(row["tokens"])  # the first is the prefill's


def weights(cli: FastRLCLI) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in cli.model.policy_tensors()}


def test_speculation_changes_neither_tokens_nor_rewards_nor_weights(tmp_path: Path) -> None:
    """A whole run, training included, with the bandit and without any speculation."""
    adaptive_cli, adaptive = run_quickstart(tmp_path / "adaptive")
    plain_cli, plain = run_quickstart(tmp_path / "plain", f"{CALLBACKS}=null")
    assert sum(batch.stats.row_steps for batch in adaptive.batches) > 0
    assert sum(batch.stats.row_steps for batch in plain.batches) == 0
    for with_drafts, without in zip(adaptive.batches, plain.batches, strict=True):
        assert torch.equal(with_drafts.tokens_BT, without.tokens_BT)
        assert torch.equal(with_drafts.rewards_B, without.rewards_B)
    theirs = weights(plain_cli)
    for name, tensor in weights(adaptive_cli).items():
        assert torch.equal(tensor, theirs[name]), name


def test_an_eagle_3_drafter_is_co_trained_and_changes_no_token(tmp_path: Path) -> None:
    """From random weights: soon some of its drafts are accepted."""
    policy = AutoConfig.from_pretrained(ROOT / "models/quickstart/policy")
    drafter = Eagle3Drafter.for_target(policy, seed=0)
    drafter.save_pretrained(tmp_path / "drafter")
    cli, speculating = run_quickstart(
        tmp_path / "eagle3",
        f"--data.init_args.engine.init_args.drafter_path={tmp_path / 'drafter'}",
        "--data.init_args.engine.init_args.strategy=3_1_4",
        f"{CALLBACKS}=null",
        f"{CALLBACKS}+=fastrl.callbacks.DrafterTraining",
        f"{CALLBACKS}.learning_rate=6.0e-3",
        f"{CALLBACKS}.steps_per_batch=24",
        f"{CALLBACKS}.publish_every_n_steps=1",
    )
    _, plain = run_quickstart(tmp_path / "plain", f"{CALLBACKS}=null")
    for with_drafts, without in zip(speculating.batches, plain.batches, strict=True):
        assert torch.equal(with_drafts.tokens_BT, without.tokens_BT)
    lengths = [batch.stats.accept_length for batch in speculating.batches]
    assert lengths[0] < 1.2
    assert lengths[-1] > 1.5
    (training,) = (c for c in cli.trainer.callbacks if isinstance(c, DrafterTraining))
    assert torch.isfinite(training.published_weights["lm_head.weight"]).all()


def test_a_resumed_run_goes_on_as_the_undisturbed_one(tmp_path: Path) -> None:
    """Ctrl-C in the third of four steps, then on: the same tokens, rewards and weights."""
    undisturbed_cli, undisturbed = run_quickstart(tmp_path / "whole")
    with pytest.raises(SystemExit):
        run_quickstart(tmp_path / "first", interrupt_at=2)
    (checkpoint,) = (tmp_path / "first").rglob("*.ckpt")
    resumed_cli, resumed = run_quickstart(tmp_path / "second", f"--ckpt_path={checkpoint}")
    assert [batch.rl_step for batch in resumed.batches] == [2, 3]
    for ours, theirs in zip(resumed.batches, undisturbed.batches[2:], strict=True):
        assert torch.equal(ours.tokens_BT, theirs.tokens_BT)
        assert torch.equal(ours.rewards_B, theirs.rewards_B)
    theirs = weights(undisturbed_cli)
    for name, tensor in weights(resumed_cli).items():
        assert torch.equal(tensor, theirs[name]), name


def test_a_run_that_is_through_goes_on_when_it_is_given_more_steps(tmp_path: Path) -> None:
    """Three steps at once, or two and then one: the same tokens, rewards, weights and drafter."""

    def run(folder: str, num_steps: int) -> tuple[FastRLCLI, BatchRecorder]:
        return run_quickstart(
            tmp_path / folder,
            f"--data.init_args.num_steps={num_steps}",
            "--trainer.val_check_interval=1.0",
            "--ckpt_path=last",
        )

    def drafter(cli: FastRLCLI) -> dict[str, torch.Tensor]:
        (training,) = (c for c in cli.trainer.callbacks if isinstance(c, DrafterTraining))
        return training.state_dict()["drafter"]

    whole_cli, whole = run("whole", 3)
    run("parts", 2)
    longer_cli, longer = run("parts", 3)
    (ours,) = longer.batches
    assert ours.rl_step == 2
    assert torch.equal(ours.tokens_BT, whole.batches[2].tokens_BT)
    assert torch.equal(ours.rewards_B, whole.batches[2].rewards_B)
    for mine, theirs in (
        (weights(longer_cli), weights(whole_cli)),
        (drafter(longer_cli), drafter(whole_cli)),
    ):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--data.init_args.group_size=1", "group_size must be >= 2 to form a baseline for GRPO"),
        ("--model.init_args.model_path=nowhere", "folder 'nowhere' does not exist"),
        ("--data.init_args.engine.init_args.drafter_path=nowhere", "nowhere has no config.json"),
        ("--data.init_args.engine.init_args.strategy=8_4", "malformed strategy '8_4'"),
    ],
)
def test_bad_input_is_one_message_and_exit_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_quickstart(tmp_path, option)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_validate_test_and_predict_run_on_held_out_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for subcommand in ("validate", "test", "predict"):
        cli = FastRLCLI(
            [
                subcommand,
                "--config=configs/quickstart.yaml",
                f"--trainer.default_root_dir={tmp_path / subcommand}",
                "--data.init_args.sampling.max_tokens=32",
                "--data.init_args.prompts.init_args.num_held_out=6",
            ]
        )
        if subcommand != "predict":
            name = {"validate": "reward/held_out", "test": "reward/test"}[subcommand]
            assert 0 <= cli.trainer.callback_metrics[name].item() <= 1
    (predictions,) = (tmp_path / "predict").rglob("predictions*")
    assert len(predictions.read_text().splitlines()) == 6
