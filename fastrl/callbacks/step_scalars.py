"""Scalars that a step may lack, logged at the steps that have them.

`LightningModule.log` goes on repeating a value that was logged once, at every step of the epoch.
Where the set of figures changes from step to step (batch sizes that were met, depths that were
drafted), that would show old values as new ones.
"""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch import Trainer

from fastrl.callbacks.step_checkpoint import StepCheckpoint


def log_step_scalars(trainer: Trainer, scalars: Mapping[str, float], rl_step: int) -> None:
    """Write to all loggers, for this RL step alone; only rank 0's are written.

    Every call writes, whatever `trainer.log_every_n_steps` is; without scalars, none does. For the
    hooks of a training step: a step that a resumed run hides is logged again with these.
    """
    if not scalars:
        return
    for checkpoint in trainer.checkpoint_callbacks:
        if isinstance(checkpoint, StepCheckpoint):
            checkpoint.log_again(scalars)
    for logger in trainer.loggers:
        logger.log_metrics(dict(scalars), step=rl_step)
