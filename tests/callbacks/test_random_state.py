"""Global random numbers go on over a resume as if there had been none."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer, seed_everything

from fastrl.callbacks.random_state import RandomState
from fastrl.types import RolloutBatch
from tests.fake_run import FakePolicy, FakeRollouts


class Drawing(FakePolicy):
    """Draws from all three generators in every RL step."""

    def __init__(self) -> None:
        super().__init__("tiny")
        self.draws: list[tuple[float, float, float, float]] = []

    def on_fit_start(self) -> None:
        """As loading a model does."""
        torch.rand(3), np.random.rand(3), random.random()

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        normal = float(np.random.normal())  # numpy keeps every second one in its state
        self.draws.append((random.random(), random.gauss(0, 1), normal, torch.rand(()).item()))


def trainer(folder: Path, **settings: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **{"callbacks": [RandomState()], **settings},
    )


def test_draws_go_on_over_a_resume(tmp_path: Path) -> None:
    class SaveAtTwo(RandomState):
        state_key = "RandomState"  # type: ignore[assignment]

        def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
            if module.rl_step == 3:
                trainer.save_checkpoint(tmp_path / "3.ckpt")

    seed_everything(0, verbose=False)
    whole = Drawing()
    trainer(tmp_path, callbacks=[SaveAtTwo()]).fit(whole, datamodule=FakeRollouts("tiny", 5))
    torch.load(tmp_path / "3.ckpt", weights_only=True)
    seed_everything(1, verbose=False)
    resumed = Drawing()
    trainer(tmp_path).fit(
        resumed, datamodule=FakeRollouts("tiny", 5), ckpt_path=tmp_path / "3.ckpt"
    )
    assert len(set(whole.draws)) == 5
    assert resumed.draws == whole.draws[3:]
