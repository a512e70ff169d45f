"""What ranks other than 0 keep for a resumed run: a file each, beside the checkpoint of rank 0.

Lightning saves the state of rank 0 alone. Files are named by RL step and rank and written, whole
and with a checksum, before the checkpoint that needs them, which says that there are some; a rank
deletes its own once no checkpoint of StepCheckpoint's needs them, and none where others are
written, of which it cannot tell. On another number of ranks a run goes on with what they had in
common. Leaves out what the state is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from fastrl.callbacks.step_checkpoint import FOLDER, StepCheckpoint
from fastrl.checkpoint_io import AtomicCheckpointIO

KEY = "drafter_ranks"
"""Of a checkpoint: how many ranks trained, and where those other than 0 keep their state."""
_FOLDER = "ranks"


class RankFiles:
    """The files of one rank.

    Args:
        trainer: of this rank; all ranks construct together.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._checkpoints = Path(trainer.log_dir or trainer.default_root_dir) / FOLDER
        self._rank = trainer.global_rank
        self._io = AtomicCheckpointIO()

    def save(
        self,
        trainer: Trainer,
        checkpoint: dict[str, Any],
        state: Callable[[], dict[str, Any]],
        rl_step: int,
    ) -> None:
        """Write this rank's state after an RL step, and say so in rank 0's checkpoint, which is not
        written yet. All ranks call this together."""
        folder = self._checkpoints / _FOLDER
        checkpoint[KEY] = {
            "num_ranks": trainer.world_size,
            "rl_step": rl_step,
            "folder": str(folder.absolute()),
        }
        if trainer.world_size == 1:
            return
        if self._rank:
            self._io.save_checkpoint(state(), folder / self._name(rl_step))
            if all(isinstance(one, StepCheckpoint) for one in trainer.checkpoint_callbacks):
                self._delete_old(folder, rl_step)
        trainer.strategy.barrier("RankFiles.save")

    def load(
        self, trainer: Trainer, checkpoint: Mapping[str, Any]
    ) -> tuple[int | None, dict[str, Any] | None]:
        """How many ranks the checkpoint is of, if it says, and what this rank kept beside it, on
        ranks other than 0 of as many.

        Raises FileNotFoundError or ValueError where that is missing or damaged.
        """
        if (ranks := checkpoint.get(KEY)) is None:
            return None, None
        num_ranks: int = ranks["num_ranks"]
        if self._rank == 0 or num_ranks != trainer.world_size:
            return num_ranks, None
        name = self._name(ranks["rl_step"])
        folders = (Path(str(trainer.ckpt_path)).parent / _FOLDER, Path(ranks["folder"]))
        path = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if path is None:
            raise FileNotFoundError(
                f"rank {self._rank} kept its drafter's state beside the checkpoint, in {name}, "
                f"which is neither in {folders[0]} nor in {folders[1]}; put it there, or resume on "
                f"another number of ranks"
            )
        return num_ranks, self._io.load_checkpoint(path)

    def _delete_old(self, folder: Path, rl_step: int) -> None:
        """All but those of checkpoints that exist, or are about to."""
        saved = {_step(path): path for path in folder.glob(self._name("*"))}
        # The newest of the earlier ones: last.ckpt needs it until it is replaced.
        earlier = [step for step in saved if step < rl_step]
        names = (path.stem for path in self._checkpoints.glob("step-*.ckpt"))
        kept = {int(found[1]) for name in names if (found := re.fullmatch(r"step-(\d+)", name))}
        for step in saved.keys() - kept - {rl_step, max(earlier, default=rl_step)}:
            saved[step].unlink()

    def _name(self, rl_step: int | str) -> str:
        return f"drafter-step{rl_step}-rank{self._rank}.ckpt"


def state_in_common(
    state: Mapping[str, Any],
    *,
    num_ranks: int,
    rank: int,
    own_weights: Mapping[str, Tensor],
    own_generator: Tensor,
) -> dict[str, Any]:
    """What a run on another number of ranks goes on with: the last drafter that all ranks had, and
    rank 0's optimizer and buffer.

    Args:
        state: of rank 0 in the checkpoint.
        num_ranks: that the checkpoint is of.
        rank: this one.
        own_weights: of the drafter that the run began with, which all had before they published.
        own_generator: state of a rank's generator that has drawn nothing.
    """
    rank_zero_warn(
        f"DrafterTraining: the checkpoint is of a run on {num_ranks} ranks. All ranks go on with "
        f"the drafter that those had in common, and with rank 0's optimizer and buffer; other "
        f"buffers, and what was trained since the last publication, are left behind"
    )
    common = dict(state)
    if num_ranks > 1:
        common |= {"drafter": state["published"] or own_weights, "unpublished_steps": 0}
    if rank:
        common |= {"generator": own_generator, "unpublished_steps": 0}
        common |= {"losses": [], "idle_work": (0.0, 0)}
    return common


def _step(path: Path) -> int:
    return int(path.name.removeprefix("drafter-step").partition("-")[0])
