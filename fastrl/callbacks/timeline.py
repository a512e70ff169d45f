"""Shows what each rank did when: a trace to open in Perfetto, a picture, and figures of idle time.

The datamodule tells the phases of a batch, the engine what it did meanwhile, the policy module its
update, and callbacks that have spans of their own give them (`SpanSource`). An RL step is complete
when the next one begins, or the run ends: then all ranks' spans go to rank 0. Leaves out what
checkpoints and validations took, between steps.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from fastrl.callbacks.step_scalars import log_step_scalars
from fastrl.callbacks.tensorboard import tensorboard_writers
from fastrl.callbacks.timeline_picture import picture
from fastrl.callbacks.timeline_spans import RankStep, idle_shares
from fastrl.callbacks.timeline_trace import append_step
from fastrl.types import PolicySource, RolloutBatch, Span

FILE_NAME = "timeline.json"


@runtime_checkable
class SpanSource(Protocol):
    """A callback whose own work is to be shown."""

    def take_spans(self) -> tuple[Span, ...]:
        """Since the last call, in order."""
        ...


class Timeline(Callback):
    """Writes `timeline.json` in the run folder, draws the last step, logs what ranks waited.

    Stateless between steps; a resumed run that goes on in its folder goes on in its file.

    Args:
        every_n_steps: RL steps from one that is written to the next, from the first on.
    """

    def __init__(self, every_n_steps: int = 1) -> None:
        if every_n_steps < 1:
            raise ValueError(f"Timeline: every_n_steps must be >= 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._path: Path | None = None  # known once the trainer has set up its loggers
        self._batch: RolloutBatch | None = None
        """Of the step that is not complete yet."""
        self._spans: list[Span] = []
        """Of other callbacks, taken and not shown yet."""
        self._last: tuple[int, list[RankStep]] | None = None
        """Not drawn yet; rank 0's alone."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Lightning broadcasts the folder, so ask while all ranks are here.
        self._path = Path(trainer.log_dir or trainer.default_root_dir) / FILE_NAME

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: RolloutBatch, batch_idx: int
    ) -> None:
        """The step before is complete; what others have done since is of this one's rollouts."""
        self._complete(trainer, pl_module, next_batch=batch)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: RolloutBatch,
        batch_idx: int,
    ) -> None:
        """The step's phases are known; callbacks may still be at work on it."""
        self._batch = batch

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the last RL step."""
        if trainer.sanity_checking:
            return
        self._complete(trainer, pl_module)
        self._draw(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write and draw the last RL step."""
        self._complete(trainer, pl_module)
        self._draw(trainer)

    def _complete(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        next_batch: RolloutBatch | None = None,
    ) -> None:
        """Called on all ranks at the same places: spans go to rank 0."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SpanSource):
                self._spans += callback.take_spans()
        if (batch := self._batch) is None:
            return
        self._batch = None
        end_s = next_batch.spans[0].start_s if next_batch and next_batch.spans else math.inf
        others = tuple(span for span in self._spans if span.start_s < end_s)
        self._spans = [span for span in self._spans if span.start_s >= end_s]
        source = cast(PolicySource, pl_module)
        own = RankStep(
            clock_offset_s=time.time() - time.perf_counter(),
            phases=(*batch.spans, *source.take_spans()),
            engine=batch.stats.spans,
            drafter=others,
        )
        rl_step = batch.rl_step + 1
        ranks = _gathered(own, trainer)
        if ranks is None:
            return
        self._last = (rl_step, ranks)
        if len(ranks) > 1:
            log_step_scalars(trainer, idle_scalars(ranks), rl_step)
        if batch.rl_step % self.every_n_steps == 0:
            assert self._path is not None, "setup has not run: no run folder is known"
            append_step(self._path, ranks, rl_step)

    def _draw(self, trainer: Trainer) -> None:
        if self._last is None:
            return
        rl_step, ranks = self._last
        self._last = None
        if writers := tensorboard_writers(trainer):
            image_HWC = picture(ranks, rl_step)
            for writer in writers:
                writer.add_image("timeline", image_HWC, rl_step, dataformats="HWC")


def _gathered(own: RankStep, trainer: Trainer) -> list[RankStep] | None:
    """All ranks', on rank 0; None on the others."""
    if trainer.world_size == 1:
        return [own]
    ranks: list[RankStep] | None = None
    if trainer.is_global_zero:
        ranks = [own] * trainer.world_size
    dist.gather_object(own, ranks)
    return ranks


def idle_scalars(ranks: list[RankStep]) -> dict[str, float]:
    """`idle/` figures of an RL step of several ranks; see `IdleShares`."""
    shares = idle_shares(ranks)
    return {"idle/share_before": shares.before, "idle/share_after": shares.after}
