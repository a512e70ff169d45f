"""Lightning's rich progress bar, counted in RL steps: reward, accept length, tokens a second; or in
the steps of a drafter's warm-up: its loss and agreement.

One bar for the whole run, whatever its number of epochs. Where the output is no terminal (a pipe, a
job's log), a plain line a step instead of control codes. Always on: FastRLCLI adds it, unless
`trainer.enable_progress_bar` is false.
"""

from __future__ import annotations

from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich import get_console
from rich.progress import BarColumn, ProgressColumn

from fastrl.types import PolicySource

_REFRESH_PER_SECOND = 10
_BAR_WIDTH = 8


class RolloutProgressBar(RichProgressBar):
    """Shows the run's RL steps, and the values logged with `prog_bar=True`.

    Args:
        step_name: What a step of the run is called.
    """

    def __init__(self, step_name: str = "RL step") -> None:
        super().__init__(refresh_rate=_REFRESH_PER_SECOND)
        self.step_name = step_name
        self._prints_lines = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        console = get_console()
        is_live = console.is_interactive or console.is_jupyter
        if not is_live and self.is_enabled:
            self._prints_lines = trainer.is_global_zero
            self.disable()

    @property
    def total_train_batches(self) -> int | float:
        """RL steps of the whole run; infinite when neither epochs nor loader bound it."""
        max_epochs = self.trainer.max_epochs
        if max_epochs is None or max_epochs < 0:
            return float("inf")
        return self.trainer.num_training_batches * max_epochs

    @property
    def sanity_check_description(self) -> str:
        """What Lightning calls the sanity check is here the validation before the first step."""
        return self.validation_description

    def _get_train_description(self, current_epoch: int) -> str:
        return self.step_name

    def configure_columns(self, trainer: Trainer) -> list[ProgressColumn]:
        """Lightning's without iterations a second, and a bar that leaves room for the values."""
        columns: list[ProgressColumn] = super().configure_columns(trainer)[:-1]
        for column in columns:
            if isinstance(column, BarColumn):
                column.bar_width = _BAR_WIDTH
        return columns

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """The logged values as text, without the run's version number."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {name: _short(value) for name, value in metrics.items()}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.train_progress_bar_id is None:
            super().on_train_epoch_start(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        rl_step = cast(PolicySource, pl_module).rl_step
        super().on_train_batch_end(trainer, pl_module, outputs, batch, rl_step - 1)
        if self._prints_lines:
            print(self._line(trainer, pl_module, rl_step), flush=True)

    def _line(self, trainer: Trainer, pl_module: LightningModule, rl_step: int) -> str:
        values = self.get_metrics(trainer, pl_module).items()
        progress = f"{self.step_name} {rl_step}/{self.total_train_batches:g}"
        return "  ".join((progress, *(f"{name} {value}" for name, value in values)))


def _short(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2f}"
