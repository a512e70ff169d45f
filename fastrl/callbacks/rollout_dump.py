"""Writes the rollouts of a step to `rollouts/step_000012.jsonl` in the run folder, a line each.

Files appear whole or not at all, one a rank. Leaves out hidden states, and the update that the
rollouts went into.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from fastrl.types import PolicySource, RolloutBatch

FOLDER = "rollouts"


class RolloutDump(Callback):
    """Writes what was sampled, and how it was scored, as JSON Lines. Stateless between steps.

    Args:
        every_n_steps: RL steps from one file to the next, from the first step on.
        max_rollouts: Most rollouts in a file, the first ones, so that groups stay together; all
            where left out.
        include_held_out: Also write each validation's rollouts, to `held_out_000012.jsonl`.
    """

    def __init__(
        self,
        every_n_steps: int = 1,
        max_rollouts: int | None = None,
        include_held_out: bool = False,
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"RolloutDump: every_n_steps must be >= 1, got {every_n_steps}")
        if max_rollouts is not None and max_rollouts < 1:
            raise ValueError(
                f"RolloutDump: max_rollouts must be >= 1, or null for all, got {max_rollouts}"
            )
        self.every_n_steps = every_n_steps
        self.max_rollouts = max_rollouts
        self.include_held_out = include_held_out
        self._folder: Path | None = None  # known once the trainer has set up its loggers
        self._held_out: list[str] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Lightning broadcasts the folder, so ask while all ranks are here.
        self._folder = Path(trainer.log_dir or trainer.default_root_dir) / FOLDER

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: RolloutBatch,
        batch_idx: int,
    ) -> None:
        """Write the step's file, if it is due."""
        rl_step = cast(PolicySource, pl_module).rl_step
        if (rl_step - 1) % self.every_n_steps == 0:
            self._write(trainer, "step", rl_step, list(lines(batch, rl_step)))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget a validation that was interrupted."""
        self._held_out = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: RolloutBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the batch's lines until the validation has ended."""
        if self.include_held_out:
            self._held_out += lines(batch, cast(PolicySource, pl_module).rl_step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the validation's file."""
        if self.include_held_out:
            rl_step = cast(PolicySource, pl_module).rl_step
            self._write(trainer, "held_out", rl_step, self._held_out)
            self._held_out = []

    def _write(self, trainer: Trainer, kind: str, rl_step: int, rows: list[str]) -> None:
        assert self._folder is not None, "setup has not run: no run folder is known"
        rank = f"_rank_{trainer.global_rank}" if trainer.world_size > 1 else ""
        path = self._folder / f"{kind}_{rl_step:06}{rank}.jsonl"
        partial = path.with_suffix(".jsonl.partial")
        self._folder.mkdir(parents=True, exist_ok=True)
        partial.write_text("".join(rows[: self.max_rollouts]), encoding="utf-8")
        os.replace(partial, path)


def lines(batch: RolloutBatch, rl_step: int) -> Iterator[str]:
    """A JSON object a rollout, in the batch's order."""
    return (json.dumps(record, allow_nan=False) + "\n" for record in records(batch, rl_step))


def records(batch: RolloutBatch, rl_step: int) -> Iterator[Mapping[str, Any]]:
    """What a line says of its rollout.

    `rl_step` counts finished RL steps, as TensorBoard does; `tokens`, with the `logprobs` of the
    distribution that sampled them, are the response's, the one that ended it included;
    `accept_lengths` are the tokens emitted by each decode step, of which `num_verify_steps` had
    drafts; `failure` says why there is no reward, and is null where there is one.
    """
    for rollout, result in zip(batch.rollouts, batch.reward_results, strict=True):
        yield {
            "rl_step": rl_step,
            "prompt_id": rollout.prompt.prompt_id,
            "sample_index": rollout.sample_index,
            "prompt": rollout.prompt.text,
            "answer": rollout.prompt.answer,
            "response": rollout.text,
            "reward": result.score,
            "failure": result.failure,
            "finish_reason": rollout.finish_reason.value,
            "policy_version": rollout.policy_version,
            "tokens": rollout.tokens,
            "logprobs": rollout.logprobs,
            "accept_lengths": rollout.accept_lengths,
            "num_verify_steps": rollout.num_verify_steps,
        }
