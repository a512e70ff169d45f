"""Checks, before an engine generates, that it serves the weights that were published.

An engine may take a publication and not serve it: names that it does not know are dropped, memory
that was released comes back zeroed, a synchronization forgets the drafter. Rollouts then come from
another policy, or drafts from a useless drafter, and nothing says so. So, after publications and
wakes, all weights are compared with what was published, number by number and under the published
names, and the policy reads what the engine answers to a few canary prompts. How often drafts are
accepted is watched by the engine itself (fastrl/rollout/drafter_health.py); what it finds is dealt
with here.

What is found on one rank counts for all: all raise, or all go on without the drafter, since they
publish and train together. Leaves out the checks themselves, and when each is due
(fastrl/rollout/weight_check.py). Stateless: after a resume everything is compared.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal, Protocol, cast

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from fastrl.callbacks.drafter_training import DrafterTraining
from fastrl.callbacks.step_scalars import log_step_scalars
from fastrl.rollout.drafters.loading import load_drafter
from fastrl.rollout.engine import RolloutEngine
from fastrl.rollout.weight_check import Failure, WeightCheck
from fastrl.rollout.weight_differences import WeightError
from fastrl.types import PolicySource, RolloutBatch


class _RolloutSource(Protocol):
    """What this callback asks of the datamodule."""

    engine: RolloutEngine
    on_published: Callable[[], None] | None
    """Called before each generation."""

    def publish_policy(self) -> None:
        """Give the engine the policy's weights, unless it has them."""
        ...


class WeightHealth(Callback):
    """Raises, or goes on without the drafter, when an engine does not serve what was published.

    A drafter is compared whenever it was published, the policy after every publication, or the
    first, every few and each wake. Canaries follow every publication of the policy. Wrong policy
    weights always raise: rollouts of them are useless.

    Args:
        every_n_publications: Publications of the policy from one comparison of all its weights to
            the next, which takes about what a publication takes; between them canaries alone tell.
        num_canaries: Prompts, of 8 tokens and answered with 8, whose log-probabilities are compared
            after each publication of the policy; 0: none.
        canary_tolerance: Largest mean difference of their log-probabilities, in nats; between
            float32 and bfloat16 rounding makes up to some hundredths, wrong weights several nats.
        on_drafter_failure: raise; or fall_back: speculate by n-grams, where the selector has such
            strategies, or not at all, until the next drafter is published.
    """

    def __init__(
        self,
        every_n_publications: int = 1,
        num_canaries: int = 4,
        canary_tolerance: float = 0.1,
        on_drafter_failure: Literal["raise", "fall_back"] = "raise",
    ) -> None:
        for is_valid, expectation, given in (
            (every_n_publications >= 1, "every_n_publications must be >= 1", every_n_publications),
            (num_canaries >= 0, "num_canaries must be >= 0 (0: none)", num_canaries),
            (canary_tolerance > 0, "canary_tolerance must be > 0 nats", canary_tolerance),
            (
                on_drafter_failure in ("raise", "fall_back"),
                "on_drafter_failure must be 'raise' or 'fall_back'",
                on_drafter_failure,
            ),
        ):
            if not is_valid:
                raise ValueError(f"WeightHealth: {expectation}, got {given}")
        self.on_drafter_failure = on_drafter_failure
        self._settings = (every_n_publications, num_canaries, canary_tolerance)
        self._weight_check = WeightCheck(*self._settings, _on_any_rank)
        self._scalars: dict[str, float] = {}  # since the last training step
        self._seconds = 0.0

    # Hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Be asked before each generation."""
        self._weight_check = WeightCheck(*self._settings, _on_any_rank)
        _rollout_source(trainer).on_published = functools.partial(self._check, trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        _rollout_source(trainer).on_published = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: RolloutBatch, batch_idx: int
    ) -> None:
        """A drafter that the engine found bad while it generated the batch."""
        failure = _on_any_rank(next(iter(batch.stats.drafter_failures), None))
        if failure is not None:
            self._drafter_failed(_rollout_source(trainer).engine, failure)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: RolloutBatch,
        batch_idx: int,
    ) -> None:
        """Log what was found since the step before."""
        scalars = {**self._scalars, "time/health": self._seconds}
        log_step_scalars(trainer, scalars, cast(PolicySource, pl_module).rl_step)
        self._scalars, self._seconds = {}, 0.0

    # Checks

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at what has been touched since the last look."""
        started = time.perf_counter()
        source, policy = _rollout_source(trainer), cast(PolicySource, pl_module)
        engine = source.engine
        failure = self._weight_check.drafter_failure(
            engine, functools.partial(_published_drafter, engine, trainer)
        )
        if failure is not None:
            self._drafter_failed(engine, failure)
            source.publish_policy()  # an engine started anew without its drafter has none
        gap = self._weight_check.check_policy(engine, policy.policy, policy.policy_tensors)
        if gap is not None:
            self._scalars["health/canary_gap"] = gap
        self._seconds += time.perf_counter() - started

    def _drafter_failed(self, engine: RolloutEngine, failure: str) -> None:
        if self.on_drafter_failure == "raise":
            raise WeightError(
                f"{failure}. Set WeightHealth.on_drafter_failure to fall_back to go on without it"
            )
        engine.reject_drafter(failure)  # which warns, and counts it in the next batch's statistics


def _on_any_rank(failure: Failure) -> Failure:
    """This rank's failure, or else that of the first rank that has one, with its number."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return failure
    failures: list[Failure] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    elsewhere = (f"{one} (on rank {rank})" for rank, one in enumerate(failures) if one is not None)
    return failure or next(elsewhere, None)


def _published_drafter(engine: RolloutEngine, trainer: Trainer) -> Iterable[tuple[str, Tensor]]:
    """By whoever published it last: the training of drafters, or the checkpoint."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, DrafterTraining) and callback.published_weights is not None:
            return callback.published_weights.items()
    policy = cast(PolicySource, trainer.lightning_module).policy
    return load_drafter(cast(str, engine.drafter_path), policy.config).named_weights()


def _rollout_source(trainer: Trainer) -> _RolloutSource:
    if trainer.datamodule is None:  # type: ignore[attr-defined]
        raise ValueError(
            "WeightHealth needs a datamodule with a rollout engine, got none; pass a "
            "RolloutDataModule to Trainer.fit(datamodule=...)"
        )
    return cast(_RolloutSource, trainer.datamodule)  # type: ignore[attr-defined]
