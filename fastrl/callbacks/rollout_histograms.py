"""Histograms of response lengths and accept lengths in TensorBoard, at every RL step.

Of rank 0's rollouts. Leaves out their means and maxima (rollout_metrics.py). Always on: FastRLCLI
adds it; without a TensorBoardLogger it does nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, cast

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.tensorboard.summary import histogram

from fastrl.callbacks.step_summaries import log_step_summary
from fastrl.callbacks.tensorboard import tensorboard_writers
from fastrl.types import PolicySource, RolloutBatch

_MOST_BINS = 64


class RolloutHistograms(Callback):
    """Shows the long tail, and how many tokens decode steps yield. Stateless."""

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: RolloutBatch,
        batch_idx: int,
    ) -> None:
        """Write the step's histograms."""
        if not tensorboard_writers(trainer):
            return
        rl_step = cast(PolicySource, pl_module).rl_step
        for tag, lengths in histograms(batch).items():
            bins = integer_bins(lengths)
            summary = histogram(tag, np.array(lengths), bins)  # type: ignore[no-untyped-call]
            log_step_summary(trainer, summary, rl_step)


def histograms(batch: RolloutBatch) -> dict[str, Sequence[int]]:
    """By tag, all lengths of a step, in tokens.

    `rollout/accept_lengths` holds one a rollout and decode step, 1 with speculation off; it is left
    out for a step that never speculated.
    """
    lengths: dict[str, Sequence[int]] = {
        "rollout/response_lengths": batch.response_mask_BT.sum(-1).tolist()
    }
    if any(rollout.num_verify_steps for rollout in batch.rollouts):
        lengths["rollout/accept_lengths"] = list(
            chain.from_iterable(rollout.accept_lengths for rollout in batch.rollouts)
        )
    return lengths


def integer_bins(values: Sequence[int]) -> list[float]:
    """Edges of equal bins, halfway between integers, so that a bin holds whole values."""
    least, most = min(values), max(values)
    width = -(-(most - least + 1) // _MOST_BINS)
    num_bins = -(-(most - least + 1) // width)
    return [least - 0.5 + width * index for index in range(num_bins + 1)]
