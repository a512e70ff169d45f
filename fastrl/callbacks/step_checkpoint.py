"""When a run's state is saved: every few RL steps, at validations, at its end, when it is stopped.

`checkpoints/last.ckpt` in the run folder is the newest state, `step-N.ckpt` those of the latest
validations. Only whole RL steps are saved, all callbacks' work on them included, and only finite
weights: after a failure within a step, or on numbers that are not finite, the last checkpoint
stands; on several ranks after any failure, since others may not know of it. Stopped by Ctrl-C or
SIGTERM, a run saves the RL step it was in or before.

Of a policy that is sharded, rank 0 writes one whole file, and any number of ranks goes on from it.

Leaves out how bytes get to the disk (fastrl/checkpoint_io.py) and the state itself, which is its
owners'. FastRLCLI adds this callback where no other `Checkpoint` is configured.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.distributed.tensor import DTensor

from fastrl.callbacks.stop_signals import StopSignals
from fastrl.callbacks.tensorboard import write_summary
from fastrl.types import PolicySource, RolloutBatch

FOLDER = "checkpoints"
LAST = "last.ckpt"


class _StepSource(Protocol):
    """What this callback asks of the datamodule."""

    num_steps: int
    """RL steps an epoch."""


class StepCheckpoint(Checkpoint):
    """Saves whole RL steps, and lets Ctrl-C and SIGTERM wait for the end of one.

    Args:
        every_n_steps: RL steps between writes of `last.ckpt`, so the most that a killed run loses.
        keep: Checkpoints of validations (`step-N.ckpt`) that are kept, the newest ones.
    """

    def __init__(self, every_n_steps: int = 5, keep: int = 2) -> None:
        if every_n_steps < 1 or keep < 0:
            raise ValueError(
                f"StepCheckpoint needs every_n_steps >= 1 and keep >= 0, got {every_n_steps} and "
                f"{keep}; for no checkpoints set trainer.enable_checkpointing to false"
            )
        self.every_n_steps = every_n_steps
        self.keep = keep
        self._folder = Path(FOLDER)  # the run's, once loggers are set up
        self._signals = StopSignals()
        self._is_training = False
        self._finished_step = 0  # RL step whose callbacks have all run
        self._is_validated = True  # whether the validation due after it, if one is, has ended
        self._saved: tuple[int, bool] | None = None  # the two of the last write
        # What that step logs: to the loggers only after its hooks, and so after its checkpoint.
        self._unlogged: dict[str, float] = {}
        self._logged_early: dict[str, float] = {}
        self._unlogged_summaries: list[bytes] = []

    def log_again(self, scalars: Mapping[str, float]) -> None:
        """Take what the loggers have been given in a training step's own hooks.

        Resumed from the step's checkpoint, a run hides all that was logged of the step, and logs
        it anew.
        """
        self._logged_early.update(scalars)

    def write_again(self, summary: bytes) -> None:
        """The same for what TensorBoard alone shows, as a serialized `Summary`."""
        self._unlogged_summaries.append(summary)

    # Hooks. Lightning calls a Checkpoint's after all other callbacks'.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._folder = Path(trainer.log_dir or trainer.default_root_dir) / FOLDER
        if stage == TrainerFn.FITTING:
            _check_whole_files(trainer)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._install_signals(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._install_signals(trainer)
        self._is_training = not trainer.fast_dev_run  # type: ignore[attr-defined]
        self._finished_step = cast(PolicySource, pl_module).rl_step
        self._saved = (self._finished_step, True)  # what a run starts from needs no saving
        for logger in trainer.loggers if self._unlogged else ():
            logger.log_metrics(self._unlogged, step=self._finished_step)
        for summary in self._unlogged_summaries:
            write_summary(trainer, summary, self._finished_step)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._is_validated = True

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: RolloutBatch, batch_idx: int
    ) -> None:
        self._signals.release()  # of the end of an epoch, whose counters no resumed run understands
        self._signals.hold()
        self._unlogged, self._logged_early, self._unlogged_summaries = {}, {}, []

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: RolloutBatch,
        batch_idx: int,
    ) -> None:
        self._finished_step = cast(PolicySource, pl_module).rl_step
        self._is_validated = False
        self._unlogged = _to_be_logged(trainer) | self._logged_early
        if trainer.is_last_batch:
            return  # the end of the epoch follows, and its checkpoint; signals wait for that
        if self._finished_step % self.every_n_steps == 0:
            self._save(trainer, pl_module)
        self._signals.release()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._unlogged, self._unlogged_summaries = {}, []
        self._signals.release()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._is_training or trainer.state.fn != TrainerFn.FITTING:
            return
        self._is_validated = True
        if trainer.should_stop and trainer.is_last_batch:
            return  # of an epoch that need not end with a validation; the run's end saves it
        self._save(trainer, pl_module)
        if self.keep:
            trainer.save_checkpoint(self._folder / f"step-{self._finished_step}.ckpt")
        if trainer.is_global_zero:
            self._remove_old()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._unlogged, self._unlogged_summaries = {}, []
        self._is_validated = True
        self._save(trainer, pl_module)
        self._is_training = False

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save the RL step that is finished, unless its policy is gone."""
        if not self._is_training:
            return
        if reason := self._reason_not_to_save(trainer, cast(PolicySource, pl_module), exception):
            rank_zero_warn(f"no checkpoint is written, what was saved before stands: {reason}")
        elif self._saved != (self._finished_step, self._is_validated):
            self._save(trainer, pl_module)
        if isinstance(exception, KeyboardInterrupt) and (self._folder / LAST).exists():
            rank_zero_info(f"go on with --ckpt_path last ({self._folder / LAST})")

    def state_dict(self) -> dict[str, Any]:
        """What the saved step logs after it is saved, or logged before and a resumed run hides."""
        return {"unlogged": self._unlogged, "unlogged_summaries": self._unlogged_summaries}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep it until training starts."""
        self._unlogged = state_dict["unlogged"]
        self._unlogged_summaries = state_dict["unlogged_summaries"]

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say where the loops stand, in a way that a resumed run repeats and leaves out nothing.

        Saved within a step's hooks, Lightning's counters would make it skip a validation that is
        due, and within a validation, average over the rest of it only.
        """
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        if trainer.is_last_batch and progress["current"]["completed"] < _finished(progress):
            return  # at the very end of an epoch Lightning's own counting is right
        for counts in (progress["total"], progress["current"]):
            counts.update(dict.fromkeys(counts, counts["processed"]))
        # A validation with one batch begun and none finished is run again from its first batch.
        begun = int(not self._is_validated)
        validation = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
        for counts in (validation["total"], validation["current"]):
            counts.update(ready=begun, started=begun, processed=0, completed=0)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on with an epoch that has RL steps left: it has more now, or was stopped early, by
        trainer.max_time say.

        Lightning counts it as finished, and would go on with the next one, or end at once.
        """
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.state.fn != TrainerFn.FITTING or datamodule is None:
            return
        fit_loop = checkpoint["loops"]["fit_loop"]
        steps = fit_loop["epoch_loop.batch_progress"]
        num_steps = _num_steps(cast(_StepSource, datamodule).num_steps, trainer.limit_train_batches)
        if num_steps <= _finished(steps):
            return
        steps["is_last_batch"] = False
        for counts in fit_loop["epoch_progress"].values():
            counts.update(processed=counts["ready"] - 1, completed=counts["ready"] - 1)

    def _install_signals(self, trainer: Trainer) -> None:
        def on_any_rank(flag: bool) -> bool:
            return bool(trainer.strategy.reduce_boolean_decision(flag, all=False))

        self._signals.install(None if trainer.world_size == 1 else on_any_rank)

    # Saving

    def _save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._is_training:
            return
        if culprit := _non_finite_weight(trainer, cast(PolicySource, pl_module)):
            raise FloatingPointError(
                f"RL step {self._finished_step} left weights that are not finite, first "
                f"{culprit}; lower model.optimizer.lr, and resume with --ckpt_path last"
            )
        for logger in trainer.loggers:
            logger.save()  # what was logged up to here is not logged again
        trainer.save_checkpoint(self._folder / LAST)
        self._saved = (self._finished_step, self._is_validated)

    def _reason_not_to_save(
        self, trainer: Trainer, source: PolicySource, exception: BaseException
    ) -> str | None:
        name = type(exception).__name__
        if trainer.world_size > 1 and not self._signals.is_stopped_on_all_ranks:
            return f"{name} on one of {trainer.world_size} ranks, and a checkpoint takes them all"
        if source.is_updating or source.rl_step != self._finished_step:
            return f"{name} within the update of RL step {self._finished_step}"
        if isinstance(exception, FloatingPointError):
            return f"after RL step {self._finished_step} numbers were not finite"
        if culprit := _non_finite_weight(trainer, source):
            return f"{culprit} is not finite after RL step {self._finished_step}"
        return None

    def _remove_old(self) -> None:
        """Of checkpoints of validations, keep the newest."""
        paths = sorted(
            self._folder.glob("step-*.ckpt"), key=lambda path: int(path.stem.removeprefix("step-"))
        )
        for path in paths[: len(paths) - self.keep]:
            path.unlink()


def _to_be_logged(trainer: Trainer) -> dict[str, float]:
    """The step's metrics, which Lightning hands to the loggers once all hooks have run."""
    connector = trainer._logger_connector  # trainer.logged_metrics holds older ones as well
    if not connector.should_update_logs:
        return {}
    metrics = connector.metrics["log"]
    return {name: float(value) for name, value in metrics.items() if name != "step"}


def _num_steps(num_steps: int, limit: int | float) -> int:
    """RL steps an epoch, under trainer.limit_train_batches: a number of them or a share."""
    return min(num_steps, limit) if isinstance(limit, int) else int(num_steps * limit)


def _finished(progress: dict[str, Any]) -> int:
    return int(progress["current"]["processed"])


def _non_finite_weight(trainer: Trainer, source: PolicySource) -> str | None:
    """Name of the first weight that is not finite, the same answer on all ranks or another name."""
    parts = (
        (name, tensor.to_local() if isinstance(tensor, DTensor) else tensor)
        for name, tensor in source.policy_tensors()
    )
    own = next((name for name, part in parts if not part.isfinite().all()), None)
    if trainer.strategy.reduce_boolean_decision(own is None):
        return None
    return own or "one of another rank's shards"


def _check_whole_files(trainer: Trainer) -> None:
    """Raise ValueError for a strategy that saves folders of files by rank."""
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy) and strategy._save_distributed_checkpoint:
        raise ValueError(
            "trainer.strategy ModelParallelStrategy would write checkpoints as folders, a file a "
            "rank, which are neither replaced as a whole nor checked; set "
            "save_distributed_checkpoint to false in its init_args"
        )
