"""Logs what rollouts and drafter did in each RL step, and where the step's time went.

Groups `rollout/`, `drafter/` (acceptance, failures), `reward/failures`, `time/`; and, for the
progress bar, reward, accept length and tokens a second. Leaves out what others log: rewards and the
update (PolicyModule), the drafter's training, the bandit. Always on: FastRLCLI adds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from fastrl.callbacks.step_clock import StepClock
from fastrl.callbacks.step_scalars import log_step_scalars
from fastrl.types import OFF, EngineStats, PolicySource, RolloutBatch


class RolloutMetrics(Callback):
    """Logs each step's rollouts, acceptance and timings. Stateless: every figure is of one step."""

    def __init__(self) -> None:
        self._clock = StepClock()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock.resume()  # an epoch that is gone on with has no start

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock.resume()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock.resume()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: RolloutBatch,
        batch_idx: int,
    ) -> None:
        rl_step = cast(PolicySource, pl_module).rl_step
        scalars = {
            **rollout_scalars(batch),
            **{f"time/{phase}": seconds for phase, seconds in batch.timings.items()},
            "time/step": self._clock.lap(),
            "step": float(rl_step),
        }
        size = len(batch)
        pl_module.log_dict(scalars, on_step=True, on_epoch=False, batch_size=size)
        log_step_scalars(trainer, acceptance_scalars(batch.stats), rl_step)
        pl_module.log_dict(bar_values(batch), prog_bar=True, logger=False, batch_size=size)


def rollout_scalars(batch: RolloutBatch) -> dict[str, float]:
    """`rollout/` figures of a step, and the numbers of drafters and of rewards that failed."""
    stats = batch.stats
    length_B = batch.response_mask_BT.sum(-1).float()
    num_failures = sum(result.failure is not None for result in batch.reward_results)
    return {
        "rollout/num_tokens": float(stats.num_tokens),
        "rollout/tokens_per_s": stats.tokens_per_second,
        "rollout/response_length_mean": length_B.mean().item(),
        "rollout/response_length_max": length_B.max().item(),
        "rollout/truncated_share": batch.is_truncated_B.float().mean().item(),
        "rollout/accept_length": stats.accept_length,
        "rollout/spec_steps_share": speculative_steps(stats) / max(stats.num_steps, 1),
        "rollout/prefill_share": stats.prefill_seconds / stats.seconds if stats.seconds else 0.0,
        "rollout/draft_share": stats.draft_seconds / stats.seconds if stats.seconds else 0.0,
        "drafter/failures": float(len(stats.drafter_failures)),
        "reward/failures": float(num_failures),
    }


def acceptance_scalars(stats: EngineStats) -> dict[str, float]:
    """`drafter/` figures of a step; none for a drafter (or a depth) that was not asked.

    `accept_depth_d` is the share of rows that accepted a draft token at depth d, among those whose
    strategy has the learned drafter draft to depth d and which accepted all shallower depths;
    `ngram_accept_depth_d` is the same of n-gram strategies.
    """
    return {
        **_depth_shares("drafter/", stats.offered_by_depth, stats.accepted_by_depth),
        **_depth_shares(
            "drafter/ngram_", stats.ngram_offered_by_depth, stats.ngram_accepted_by_depth
        ),
    }


def _depth_shares(
    prefix: str, offered_by_depth: Sequence[int], accepted_by_depth: Sequence[int]
) -> dict[str, float]:
    """The share of all depths together, and of each, from 1."""
    if not (num_offered := sum(offered_by_depth)):
        return {}
    counts = zip(accepted_by_depth, offered_by_depth, strict=True)
    by_depth = {
        f"{prefix}accept_depth_{depth}": accepted / offered
        for depth, (accepted, offered) in enumerate(counts, start=1)
        if offered
    }
    return {f"{prefix}acceptance_rate": sum(accepted_by_depth) / num_offered, **by_depth}


def speculative_steps(stats: EngineStats) -> int:
    """Decode steps that verified a draft tree."""
    return sum(num for name, num in stats.steps_by_strategy.items() if name != str(OFF))


def bar_values(batch: RolloutBatch) -> dict[str, float]:
    """What the progress bar shows, under names short enough for it."""
    return {
        "reward": batch.rewards_B.mean().item(),
        "accept": batch.stats.accept_length,
        "tok/s": batch.stats.tokens_per_second,
    }
