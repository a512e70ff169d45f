"""The bar counts the run's RL steps; where there is no terminal, a line a step."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import rich
from lightning.pytorch import Trainer

from fastrl.callbacks import RolloutMetrics, RolloutProgressBar
from tests.fake_run import FakePolicy, FakeRollouts


def fit(folder: Path, **settings: int) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        limit_val_batches=0,
        callbacks=[RolloutMetrics(), RolloutProgressBar()],
        enable_checkpointing=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(FakePolicy("tiny"), datamodule=FakeRollouts("tiny", num_steps=3))
    return trainer


def test_without_a_terminal_each_step_is_one_plain_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path, max_epochs=2)
    lines = [line for line in capsys.readouterr().out.splitlines() if "RL step" in line]
    values = "reward 0.50  accept 1.50  tok/s 10.00"
    assert lines == [f"RL step {step}/6  {values}" for step in range(1, 7)]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let rich take the output for a terminal."""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    rich.reconfigure()
    yield
    monkeypatch.undo()
    rich.reconfigure()


@pytest.mark.usefixtures("terminal")
def test_on_a_terminal_one_bar_counts_the_steps_of_all_epochs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = fit(tmp_path, max_epochs=2)
    bar = trainer.progress_bar_callback
    assert isinstance(bar, RolloutProgressBar)
    assert bar.progress is not None
    (task,) = bar.progress.tasks
    assert (task.description, task.completed, task.total) == ("RL step", 6, 6)
    output = capsys.readouterr().out
    assert "6/6" in output
    assert "reward: 0.50 accept: 1.50 tok/s: 10.00" in output
    assert "RL step 1/6" not in output


def test_the_bar_leaves_out_the_version_number(tmp_path: Path) -> None:
    trainer = fit(tmp_path, max_epochs=1)
    bar = trainer.progress_bar_callback
    assert isinstance(bar, RolloutProgressBar)
    assert set(bar.get_metrics(trainer, trainer.lightning_module)) == {"reward", "accept", "tok/s"}


def test_an_unbounded_run_has_an_unbounded_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path, max_epochs=-1, max_steps=4)
    assert "RL step 2/inf" in capsys.readouterr().out
