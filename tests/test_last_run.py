"""The same command twice, `--ckpt_path last`: the second goes on with the first, in its folder."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastrl.callbacks import StepCheckpoint
from fastrl.cli import main
from fastrl.last_run import find_last_run
from fastrl.types import RolloutBatch
from tests.fake_run import FakePolicy


@pytest.fixture(autouse=True)
def command_line_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fastrl"])


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """Seven RL steps of the fakes, validated after the third and the sixth."""
    content = {
        "trainer": {
            "default_root_dir": str(tmp_path),
            "accelerator": "cpu",
            "val_check_interval": 3,
            "enable_progress_bar": False,
        },
        "model": {"class_path": "tests.fake_run.FakePolicy", "init_args": {"model_path": "tiny"}},
        "data": {"class_path": "tests.fake_run.FakeRollouts", "init_args": {"num_steps": 7}},
    }
    path = tmp_path / "fake.yaml"
    path.write_text(yaml.safe_dump(content))
    return ["-c", str(path), "--ckpt_path=last"]


def exit_code(args: list[str]) -> Any:
    with pytest.raises(SystemExit) as exit_:
        main(args)
    return exit_.value.code


def next_second() -> None:
    """TensorBoard reads event files by name: the second they began in, then a process's counter as
    text, '10' before '9'. Real runs that follow one another are of different seconds."""
    now = time.time()
    time.sleep(1 - now % 1)


def logged(run: Path) -> dict[str, list[int]]:
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    tags = ("rollout/num_tokens", "drafter/accept_depth_1", "reward/held_out")
    return {tag: [event.step for event in events.Scalars(tag)] for tag in tags}


def test_the_same_command_goes_on_with_an_interrupted_run(
    command: list[str], tmp_path: Path
) -> None:
    """Interrupted, failed, through, and sent once more: one folder, one log, every step once."""
    fit = ["fit", *command]
    assert exit_code([*fit, "--model.init_args.interrupt_at=3"]) == 130
    next_second()
    with pytest.raises(ValueError, match="this step fails"):
        main([*fit, "--model.init_args.fail_at=5"])
    for _ in range(2):
        next_second()
        main(fit)
        (run,) = tmp_path.glob("lightning_logs/*")
        assert logged(run) == {
            "rollout/num_tokens": [1, 2, 3, 4, 5, 6, 7],
            "drafter/accept_depth_1": [1, 2, 3, 4, 5, 6, 7],
            "reward/held_out": [0, 3, 6],
        }
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["rl_step"] == 7


def test_a_step_saved_before_it_was_logged_is_logged_by_the_resumed_run(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the fourth update stops in the step's last hook: saved, and not yet logged, but for
    scalars that a step may lack, which go to the loggers at once: hidden, and logged again."""
    step = FakePolicy.training_step

    def press(self: FakePolicy, batch: RolloutBatch, batch_idx: int) -> None:
        step(self, batch, batch_idx)
        if self.rl_step == 4:
            signal.raise_signal(signal.SIGINT)

    fit = ["fit", *command]
    with monkeypatch.context() as patch:
        patch.setattr(FakePolicy, "training_step", press)
        assert exit_code(fit) == 130
    (run,) = tmp_path.glob("lightning_logs/*")
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["rl_step"] == 4
    assert logged(run)["rollout/num_tokens"] == [1, 2, 3]
    assert logged(run)["drafter/accept_depth_1"] == [1, 2, 3, 4]
    main(fit)
    for tag in ("rollout/num_tokens", "drafter/accept_depth_1"):
        assert logged(run)[tag] == [1, 2, 3, 4, 5, 6, 7]


def shown(events_path: Path) -> dict[str, list[tuple[int, Any]]]:
    """Steps and contents of histograms and texts, in a run's folder or in one event file."""
    events = EventAccumulator(str(events_path), size_guidance={"histograms": 0, "tensors": 0})
    events.Reload()
    lengths = events.Histograms("rollout/response_lengths")
    texts = events.Tensors("rollout/samples/text_summary")
    return {
        "lengths": [(event.step, event.histogram_value) for event in lengths],
        "texts": [(event.step, event.tensor_proto.string_val[0]) for event in texts],
    }


def test_histograms_and_texts_of_a_step_that_is_hidden_are_written_again(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the seventh step, and once more between resuming and the next one: the checkpoint
    is that of the fifth. Texts are read by file: only TensorBoard itself hides texts."""
    fit = [
        *("fit", *command, "--trainer.val_check_interval=7"),
        "--data=tests.callbacks.test_text_samples.Rollouts",
        "--data.init_args.num_steps=7",
        "--trainer.callbacks+=fastrl.callbacks.TextSamples",
        "--trainer.callbacks.every_n_steps=1",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(StepCheckpoint, "on_exception", lambda *_: None)  # as SIGKILL leaves it
        for fail_at in (7, 6):
            with pytest.raises(ValueError, match="this step fails"):
                main([*fit, f"--model.init_args.fail_at={fail_at}"])
            next_second()
    main(fit)
    (run,) = tmp_path.glob("lightning_logs/*")
    assert [step for step, _ in shown(run)["lengths"]] == [1, 2, 3, 4, 5, 6, 7]
    first, second, last = map(shown, sorted(run.glob("events*")))
    for kind, steps in first.items():
        assert [step for step, _ in steps] == [1, 2, 3, 4, 5, 6]
        assert second[kind] == [steps[4]]
        assert [step for step, _ in last[kind]] == [5, 6, 7]
        assert last[kind][:2] == steps[4:]


def test_a_path_begins_a_new_folder(command: list[str], tmp_path: Path) -> None:
    main(["fit", *command])
    checkpoint = tmp_path / "lightning_logs" / "version_0" / "checkpoints" / "step-3.ckpt"
    main(["fit", *command, f"--ckpt_path={checkpoint}"])
    first, second = sorted(tmp_path.glob("lightning_logs/*"))
    assert logged(first)["rollout/num_tokens"] == [1, 2, 3, 4, 5, 6, 7]
    assert logged(second)["rollout/num_tokens"] == [4, 5, 6, 7]


def test_without_a_logger_the_root_is_the_run(command: list[str], tmp_path: Path) -> None:
    fit = ["fit", *command, "--trainer.logger=false"]
    assert exit_code([*fit, "--model.init_args.interrupt_at=6"]) == 130
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["rl_step"] == 5
    main(fit)
    assert torch.load(last, weights_only=True)["rl_step"] == 7


def test_evaluation_needs_a_checkpoint_and_takes_the_last(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(["validate", *command]) == 2
    assert f"no run in {tmp_path} has a checkpoint" in capsys.readouterr().err
    main(["fit", *command])
    capsys.readouterr()
    main(["validate", *command])
    assert "7.0" in capsys.readouterr().out  # its held-out reward is its number of RL steps


@pytest.mark.parametrize("name", ["last", "a path"])
def test_a_corrupt_checkpoint_is_one_message_and_exit_status_2(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    main(["fit", *command])
    folder = tmp_path / "lightning_logs" / "version_0" / "checkpoints"
    last = folder / "last.ckpt"
    os.truncate(last, last.stat().st_size - 100)
    given = [] if name == "last" else [f"--ckpt_path={last}"]
    assert exit_code(["fit", *command, *given]) == 2
    error = capsys.readouterr().err
    assert f"error: checkpoint {last} is corrupt" in error
    assert f"resume with --ckpt_path {folder / 'step-6.ckpt'}" in error
    assert "Traceback" not in error


def test_the_newest_checkpoint_of_all_runs_is_found(tmp_path: Path) -> None:
    assert find_last_run(tmp_path, None) is None
    for version, mtime in ((2, 50), (9, 70), (10, 60)):
        last = tmp_path / "lightning_logs" / f"version_{version}" / "checkpoints" / "last.ckpt"
        last.parent.mkdir(parents=True)
        last.write_bytes(b"")
        os.utime(last, (mtime, mtime))
    (tmp_path / "lightning_logs" / "version_11").mkdir()
    run = find_last_run(tmp_path, True)
    assert run is not None
    assert run.folder.name == "version_9"
    assert find_last_run(tmp_path, False) is None
