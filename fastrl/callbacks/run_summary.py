"""Closes a run with a table, and keeps the same figures in `summary.json` in the run folder.

Written at every validation, at the end, and when the run is interrupted or fails; atomically, so
that a reader never sees half a file. Held-out rewards come from the validations; the first is the
one before any training, which Lightning runs as its sanity check (`num_sanity_val_steps: -1`) and
logs nowhere: it is logged here. Always on: FastRLCLI adds it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from rich import get_console
from rich.table import Table

from fastrl.callbacks.rollout_metrics import speculative_steps
from fastrl.callbacks.step_clock import StepClock
from fastrl.types import PolicySource, RolloutBatch

FILE_NAME = "summary.json"
HELD_OUT_REWARD = "reward/held_out"
_WINDOW_STEPS = 3


@dataclass(kw_only=True, slots=True)
class RunTotals:
    """Sums over a run's RL steps, those before a resume included."""

    num_steps: int = 0
    num_tokens: int = 0
    engine_seconds: float = 0.0
    rollout_seconds: float = 0.0
    step_seconds: float = 0.0
    decode_steps: int = 0
    speculative_steps: int = 0
    first_acceptance: list[list[int]] = field(default_factory=list)
    """(accepted tokens, row steps) of the first steps that speculated."""
    last_acceptance: list[list[int]] = field(default_factory=list)
    """The same of the last ones."""
    reward_first: float | None = None
    reward_last: float | None = None

    def add_step(self, batch: RolloutBatch, step_seconds: float) -> None:
        """Count one RL step."""
        stats = batch.stats
        self.num_steps += 1
        self.num_tokens += stats.num_tokens
        self.engine_seconds += stats.seconds
        self.rollout_seconds += batch.timings["rollout"]
        self.step_seconds += step_seconds
        self.decode_steps += stats.num_steps
        self.speculative_steps += speculative_steps(stats)
        if stats.row_steps:
            acceptance = [stats.accepted_tokens, stats.row_steps]
            if len(self.first_acceptance) < _WINDOW_STEPS:
                self.first_acceptance.append(acceptance)
            self.last_acceptance = [*self.last_acceptance, acceptance][-_WINDOW_STEPS:]

    def add_held_out_reward(self, reward: float) -> None:
        """Count one validation."""
        if self.reward_first is None:
            self.reward_first = reward
        self.reward_last = reward

    def figures(self) -> dict[str, float | int | None]:
        """What `summary.json` says of them; held-out rewards are null without a validation.

        Accept lengths are over the first and last three steps that speculated, weighted by rows and
        decode steps; 1 if none did.
        """
        return {
            "reward_first": self.reward_first,
            "reward_last": self.reward_last,
            "accept_length_first": _accept_length(self.first_acceptance),
            "accept_length_last": _accept_length(self.last_acceptance),
            "rollout_share": _ratio(self.rollout_seconds, self.step_seconds),
            "tokens_per_s": _ratio(self.num_tokens, self.engine_seconds),
            "speculation_share": _ratio(self.speculative_steps, self.decode_steps),
            "num_steps": self.num_steps,
            "num_tokens": self.num_tokens,
        }


def _accept_length(acceptance: list[list[int]]) -> float:
    accepted_tokens = sum(accepted for accepted, _ in acceptance)
    row_steps = sum(rows for _, rows in acceptance)
    return accepted_tokens / row_steps if row_steps else 1.0


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


class RunSummary(Callback):
    """Keeps a run's totals, writes `summary.json`, prints the closing table."""

    def __init__(self) -> None:
        self._totals = RunTotals()
        self._clock = StepClock()
        self._started_at = time.perf_counter()
        self._seconds_before_resume = 0.0
        self._folder: Path | None = None  # known once the trainer has set up its loggers

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._started_at = time.perf_counter()
        # Lightning broadcasts the folder, so ask while all ranks are here: not when one has failed.
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock.resume()  # an epoch that is gone on with has no start

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock.resume()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: RolloutBatch,
        batch_idx: int,
    ) -> None:
        self._totals.add_step(batch, self._clock.lap())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rl_step = cast(PolicySource, pl_module).rl_step
        # Lightning checks again when a run goes on from the end of an epoch.
        is_first = rl_step == 0 and math.isinf(trainer.num_sanity_val_steps)
        is_whole = is_first or not trainer.sanity_checking
        if _is_fitting(trainer) and is_whole and HELD_OUT_REWARD in trainer.callback_metrics:
            self._totals.add_held_out_reward(trainer.callback_metrics[HELD_OUT_REWARD].item())
            if trainer.sanity_checking:
                _log_validation(trainer, rl_step)
            self._write(trainer, "running")
        self._clock.resume()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, "finished")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if _is_fitting(trainer):
            is_interrupt = isinstance(exception, KeyboardInterrupt)
            self._write(trainer, "interrupted" if is_interrupt else "failed")
            self._print_table(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The table comes here: the progress bar, an earlier callback, has left the screen."""
        if _is_fitting(trainer):
            self._print_table(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"totals": dataclasses.asdict(self._totals), "seconds": self._seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._totals = RunTotals(**state_dict["totals"])
        self._seconds_before_resume = state_dict["seconds"]

    def _seconds(self) -> float:
        """Of the whole run: loading, validation and checkpoints included, time between runs not."""
        return self._seconds_before_resume + time.perf_counter() - self._started_at

    def _write(self, trainer: Trainer, status: str) -> None:
        if not trainer.is_global_zero or self._folder is None:
            return
        summary = {**self._totals.figures(), "seconds": self._seconds(), "status": status}
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._folder / f"{FILE_NAME}.partial"
        partial.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, self._folder / FILE_NAME)

    def _print_table(self, trainer: Trainer) -> None:
        if trainer.is_global_zero and self._totals.num_steps and self._folder is not None:
            console = get_console()
            console.print(_table(self._totals, self._seconds()))
            console.print(f"in {self._folder / FILE_NAME}", soft_wrap=True, highlight=False)


def _is_fitting(trainer: Trainer) -> bool:
    return trainer.state.fn == TrainerFn.FITTING


def _log_validation(trainer: Trainer, rl_step: int) -> None:
    values = {
        name: value.item()
        for name, value in trainer.callback_metrics.items()
        if name.startswith("reward/")
    }
    for logger in trainer.loggers:
        logger.log_metrics(values, step=rl_step)


def _table(totals: RunTotals, seconds: float) -> Table:
    figures = totals.figures()
    table = Table(title=f"{totals.num_steps} RL steps in {seconds:.0f} s")
    for column, justify in (("", "left"), ("first", "right"), ("last", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for title, name in (("held-out reward", "reward"), ("accept length", "accept_length")):
        table.add_row(title, *(_number(figures[f"{name}_{end}"]) for end in ("first", "last")))
    table.add_section()
    for title, name in (
        ("rollout share of step time", "rollout_share"),
        ("speculative share of decode steps", "speculation_share"),
        ("response tokens a second", "tokens_per_s"),
    ):
        table.add_row(title, "", _number(figures[name]))
    return table


def _number(value: float | int | None) -> str:
    if value is None:
        return "none"
    return f"{value:.0f}" if value >= 100 else f"{value:.3f}"
