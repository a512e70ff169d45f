"""Lightning's ModelCheckpoint, which also saves when a run is interrupted or fails.

Never in the middle of an update, whose half-updated policy no resumed run could go on from: then
the last checkpoint stands, and a line says so. FastRLCLI adds it where none is configured.
"""

from __future__ import annotations

from typing import cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from fastrl.types import PolicySource


class StepCheckpoint(ModelCheckpoint):
    """Saves at the end of each validation and of the run, and between RL steps on an exception."""

    def __init__(self) -> None:
        super().__init__(save_on_exception=True)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save, unless an update was under way."""
        source = cast(PolicySource, pl_module)
        if source.is_updating:
            rank_zero_warn(
                f"{type(exception).__name__} within the update of RL step {source.rl_step}: no "
                f"checkpoint is written of a half-updated policy; resume from the last one"
            )
            return
        super().on_exception(trainer, pl_module, exception)
