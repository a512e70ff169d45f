"""Lets a bandit choose the engine's speculation strategy, over the whole run and all ranks.

After each RL step the ranks exchange what their steps showed and learn it in the same order, so
that all hold the same beliefs; acceptance seen under an older policy or drafter is forgotten in
part; the step's choices are logged; a checkpoint holds the bandit. Between RL steps each rank goes
on learning from its own steps, validation's included.

Leaves out how a strategy is chosen (fastrl/rollout/bandit.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any, Protocol, cast

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from fastrl.rollout.bandit import Bandit, BanditReport
from fastrl.rollout.engine import RolloutEngine
from fastrl.types import PolicySource, RolloutBatch, StepStats


class _RolloutSource(Protocol):
    """What this callback asks of the datamodule."""

    engine: RolloutEngine


class StrategyAdaptation(Callback):
    """Chooses the strategy of each decode step by a bandit.

    Args:
        bandit: Chooses among `off` and draft trees by what each yields at the live batch size.
        keep: Share of what the bandit saw of acceptance, newest first, that still counts after the
            policy changed; 1 forgets nothing. Step times are kept.
    """

    def __init__(self, bandit: Bandit, keep: float = 0.5) -> None:
        if not 0 <= keep <= 1:
            raise ValueError(
                f"StrategyAdaptation: keep is a share, in [0, 1] (1 forgets nothing), got {keep}"
            )
        self.bandit = bandit
        self.keep = keep
        self._seen_policy_version: int | None = None
        self._shared_state: dict[str, Any] | None = None  # after the last exchange between ranks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the bandit the engine's selector; refuse arms that need a drafter it has not."""
        engine = _engine(trainer)
        learned = [str(arm) for arm in self.bandit.arms if arm.needs_learned_drafter]
        if engine.drafter_path is None and learned:
            raise ValueError(
                f"StrategyAdaptation: the bandit's arms {learned} need a drafter, but the engine's "
                "drafter_path is null; set drafter_path of the datamodule's engine to a drafter "
                "checkpoint folder, or keep n-gram arms only ('ngram_8_1_9')"
            )
        engine.strategy_selector = self.bandit
        if stage == "fit" and trainer.world_size > 1:
            self._remember_shared()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: RolloutBatch,
        batch_idx: int,
    ) -> None:
        """Log the step's choices, learn what other ranks saw, forget what became stale."""
        source = cast(PolicySource, pl_module)
        scalars = report_scalars(self.bandit.report()) | {"step": float(source.rl_step)}
        pl_module.log_dict(scalars, on_step=True, on_epoch=False, batch_size=len(batch))
        if self._shared_state is not None:
            self._learn_from_all(self._shared_state)
        if source.policy_version != self._seen_policy_version:
            self.bandit.discount(self.keep)
            self._seen_policy_version = source.policy_version
        self.bandit.start_period()
        self.bandit.reseed(source.rl_step)
        if self._shared_state is not None:
            self._remember_shared()

    def _learn_from_all(self, shared_state: dict[str, Any]) -> None:
        """Back to the beliefs all ranks had, then every rank's steps since, in the same order."""
        journals: list[list[StepStats]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(journals, self.bandit.journal)
        self.bandit.journal = None
        self.bandit.load_state_dict(shared_state)
        for stats in in_turns(journals):
            self.bandit.record(stats)

    def _remember_shared(self) -> None:
        self._shared_state = self.bandit.state_dict()
        self.bandit.journal = []

    def state_dict(self) -> dict[str, Any]:
        """The bandit, and which policy its beliefs are of."""
        return {
            "bandit": self.bandit.state_dict(),
            "seen_policy_version": self._seen_policy_version,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `state_dict` gave."""
        self.bandit.load_state_dict(state_dict["bandit"])
        self._seen_policy_version = state_dict["seen_policy_version"]
        if self._shared_state is not None:
            self._remember_shared()


def in_turns(journals: Sequence[Sequence[StepStats]]) -> Iterator[StepStats]:
    """One step of each rank after the other, so that no rank's fill the newest places alone."""
    for round_of_steps in zip_longest(*journals):
        yield from (stats for stats in round_of_steps if stats is not None)


def report_scalars(report: BanditReport) -> dict[str, float]:
    """`bandit/` figures: the step's choices, and by bucket what the best arm yields.

    `best_verify_tokens` names the best arm by its tree size; 1 is plain decoding.
    """
    shares = {f"bandit/arm_share_{name}": share for name, share in report.arm_shares.items()}
    best: dict[str, float] = {}
    for bucket, arm in report.best_arms.items():
        best[f"bandit/tokens_per_s_batch_{bucket}"] = arm.tokens_per_second
        best[f"bandit/best_verify_tokens_batch_{bucket}"] = float(arm.strategy.verify_tokens)
    return {
        "bandit/decisions": float(report.num_decisions),
        "bandit/explore_share": report.explore_share,
        **shares,
        **best,
    }


def _engine(trainer: Trainer) -> RolloutEngine:
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    if datamodule is None:
        raise ValueError(
            "StrategyAdaptation needs a datamodule with a rollout engine, got none; pass a "
            "RolloutDataModule to Trainer.fit(datamodule=...)"
        )
    return cast(_RolloutSource, datamodule).engine
