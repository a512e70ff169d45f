"""The TensorBoard writers of a run: for what Lightning's `log` cannot show, text and histograms."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter


def tensorboard_writers(trainer: Trainer) -> list[SummaryWriter]:
    """One a TensorBoardLogger; none without such a logger, and none but on rank 0."""
    if not trainer.is_global_zero:
        return []
    return [
        logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)
    ]


def write_summary(trainer: Trainer, serialized: bytes, rl_step: int) -> None:
    """Write a serialized `Summary` to all of them, as their `add_...` methods do theirs."""
    for writer in tensorboard_writers(trainer):
        file_writer = writer._get_file_writer()  # type: ignore[no-untyped-call]
        file_writer.add_summary(Summary.FromString(serialized), rl_step)
