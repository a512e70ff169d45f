"""`--ckpt_path last`: the newest run of a folder that has a checkpoint, and where its logs go on.

Lightning looks for `last` in the folder of the run that is just starting, which is new and empty;
the user means the run before. Leaves out loggers of one's own: theirs is the folder that is looked
in, so one that is to go on keeps its version.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from fastrl.callbacks.step_checkpoint import FOLDER, LAST
from fastrl.checkpoint_io import check_intact

_LOGS = "lightning_logs"
"""Lightning's name for the folder of runs, below trainer.default_root_dir."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LastRun:
    """A run to go on with."""

    folder: Path
    """Its logs and checkpoints: `version_N`, or the root where nothing is logged."""

    @property
    def checkpoint(self) -> Path:
        """Its newest state."""
        return self.folder / FOLDER / LAST

    def logger(self) -> TensorBoardLogger:
        """Lightning's default logger, going on in the run's folder.

        Steps that were logged after the checkpoint was written, and will be again, are hidden.
        Raises ValueError if the checkpoint is damaged.
        """
        check_intact(self.checkpoint)
        checkpoint = torch.load(self.checkpoint, weights_only=True, mmap=True)
        # A step saved before it was logged is logged again, if it was at all.
        state = checkpoint["callbacks"].get("StepCheckpoint", {})
        is_logged = not (state.get("unlogged") or state.get("unlogged_summaries"))
        first_step = checkpoint["rl_step"] + is_logged
        root, version = self.folder.parent.parent, self.folder.name.removeprefix("version_")
        return TensorBoardLogger(root, name=_LOGS, version=int(version), purge_step=first_step)


def find_last_run(root: str | Path, logger: Logger | list[Logger] | bool | None) -> LastRun | None:
    """The run whose `last.ckpt` is newest, None without any.

    Args:
        root: trainer.default_root_dir.
        logger: trainer.logger; none and true are Lightning's default, a folder for each run.
    """
    if logger is None or logger is True:
        folders = list((Path(root) / _LOGS).glob("version_*"))
    elif not logger:
        folders = [Path(root)]
    else:
        first = logger[0] if isinstance(logger, list) else logger
        folders = [Path(first.log_dir or first.save_dir or root)]
    runs = [LastRun(folder=folder) for folder in folders]
    found = [run for run in runs if run.checkpoint.is_file()]
    return max(found, key=lambda run: run.checkpoint.stat().st_mtime_ns, default=None)
