"""Histograms and texts of an RL step in TensorBoard, which outlast the step's checkpoint.

They are written in the step's hooks, and so before its checkpoint. A run resumed from that hides
the whole step (last_run.py), and writes them again. Leaves out scalars (step_scalars.py), and
pictures of validations, which end with a checkpoint that hides nothing of the step.
"""

from __future__ import annotations

from lightning.pytorch import Trainer
from tensorboard.compat.proto.summary_pb2 import Summary

from fastrl.callbacks.step_checkpoint import StepCheckpoint
from fastrl.callbacks.tensorboard import write_summary


def log_step_summary(trainer: Trainer, summary: Summary, rl_step: int) -> None:
    """Write to every TensorBoardLogger, for this RL step; for the hooks of a training step.

    Args:
        trainer: the run's; only rank 0 writes.
        summary: made by a function of `torch.utils.tensorboard.summary`.
        rl_step: the step just finished.
    """
    serialized = summary.SerializeToString()
    for checkpoint in trainer.checkpoint_callbacks:
        if isinstance(checkpoint, StepCheckpoint):
            checkpoint.write_again(serialized)
    write_summary(trainer, serialized, rl_step)
