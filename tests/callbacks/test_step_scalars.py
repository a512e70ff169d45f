"""What a step has is written once, at that step; what it lacks is not written at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch import Trainer

from fastrl.callbacks.step_scalars import log_step_scalars
from tests.recording_logger import RecordingLogger


@pytest.fixture
def loggers(tmp_path: Path) -> list[RecordingLogger]:
    return [RecordingLogger(tmp_path), RecordingLogger(tmp_path)]


def test_every_call_writes_to_every_logger(loggers: list[RecordingLogger]) -> None:
    trainer = Trainer(accelerator="cpu", logger=loggers, log_every_n_steps=50)
    log_step_scalars(trainer, {"a": 1.0}, 3)
    log_step_scalars(trainer, {"b": 2.0}, 4)
    for logger in loggers:
        assert logger.logged == [(3, {"a": 1.0}), (4, {"b": 2.0})]


def test_without_scalars_there_is_no_row(loggers: list[RecordingLogger]) -> None:
    log_step_scalars(Trainer(accelerator="cpu", logger=loggers), {}, 3)
    assert [logger.logged for logger in loggers] == [[], []]
