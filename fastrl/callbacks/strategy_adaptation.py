"""Lets a bandit choose the engine's speculation strategy, over the whole run and all ranks.

After each RL step the ranks exchange what their steps showed and learn it in the same order, so
that all hold the same beliefs; acceptance seen under an older policy or drafter is forgotten in
part; the step's choices are logged, with what they gained over plain decoding by measurement, and
drawn at each validation; a checkpoint holds the bandit. Between RL steps each rank goes on learning
from its engine's steps, validation's included; of ranks that share an engine, the first brings them
to the exchange. Figures are rank 0's.

Leaves out how a strategy is chosen (fastrl/rollout/bandit.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, Protocol, cast

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from fastrl.callbacks.step_scalars import log_step_scalars
from fastrl.callbacks.strategy_heat_map import heat_map
from fastrl.callbacks.tensorboard import tensorboard_writers
from fastrl.rollout.bandit import Bandit, BanditReport, BucketReport
from fastrl.rollout.bandit_base import MeasuredCost
from fastrl.rollout.engine import RolloutEngine
from fastrl.types import DraftStrategy, PolicySource, RolloutBatch, StepStats


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
        self._seen_drafter_version: int | None = None
        self._shared_state: dict[str, Any] | None = None  # after the last exchange between ranks
        self._last_report: tuple[int, BanditReport] | None = None  # not drawn yet, and its RL step

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
        report = self.bandit.report()
        self._last_report = (source.rl_step, report)
        log_step_scalars(trainer, report_scalars(report), source.rl_step)
        if self._shared_state is not None:
            self._learn_from_all(self._shared_state)
        self.bandit.start_period()
        drafter_version = _engine(trainer).drafter_version
        drafter_changed = drafter_version != self._seen_drafter_version
        if drafter_changed or source.policy_version != self._seen_policy_version:
            self.bandit.discount(self.keep, drafter_changed=drafter_changed)
            self._seen_policy_version = source.policy_version
            self._seen_drafter_version = drafter_version
        self.bandit.reseed(source.rl_step)
        if self._shared_state is not None:
            self._remember_shared()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the last RL step: gains and choices by batch size and strategy."""
        self._draw(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the last RL step."""
        self._draw(trainer)

    def _draw(self, trainer: Trainer) -> None:
        if self._last_report is None:
            return
        rl_step, report = self._last_report
        self._last_report = None
        if report.buckets and (writers := tensorboard_writers(trainer)):
            image_HWC = heat_map(report)
            for writer in writers:
                writer.add_image("bandit/heat_map", image_HWC, rl_step, dataformats="HWC")

    def _learn_from_all(self, shared_state: dict[str, Any]) -> None:
        """Back to the beliefs all ranks had, then every rank's steps since, in the same order."""
        journals: list[list[StepStats | MeasuredCost]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(journals, self.bandit.journal)
        self.bandit.journal = None
        own_period = self.bandit.state_dict()["period"]
        self.bandit.load_state_dict(shared_state | {"period": own_period})
        for entry in in_turns(journals):
            self.bandit.replay(entry)

    def _remember_shared(self) -> None:
        self.bandit.learn()  # what waits in a restored one, so that it is learned once
        self._shared_state = self.bandit.state_dict()
        self.bandit.journal = []

    def state_dict(self) -> dict[str, Any]:
        """The bandit, which policy its beliefs are of, and the RL step that is not drawn yet."""
        drawable = None
        if self._last_report is not None:
            rl_step, report = self._last_report
            drawable = {"rl_step": rl_step, "report": plain_report(report)}
        return {
            "bandit": self.bandit.state_dict(),
            "seen_policy_version": self._seen_policy_version,
            "seen_drafter_version": self._seen_drafter_version,
            "last_report": drawable,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `state_dict` gave."""
        self.bandit.load_state_dict(state_dict["bandit"])
        self._seen_policy_version = state_dict["seen_policy_version"]
        self._seen_drafter_version = state_dict["seen_drafter_version"]
        self._last_report = None
        if drawable := state_dict["last_report"]:
            self._last_report = (drawable["rl_step"], restored_report(drawable["report"]))
        if self._shared_state is not None:
            self._remember_shared()


def in_turns(
    journals: Sequence[Sequence[StepStats | MeasuredCost]],
) -> Iterator[StepStats | MeasuredCost]:
    """One entry of each rank after the other, so that no rank's fill the newest places alone."""
    for round_of_entries in zip_longest(*journals):
        yield from (entry for entry in round_of_entries if entry is not None)


def plain_report(report: BanditReport) -> dict[str, Any]:
    """The report in plain numbers, strings and dicts."""
    buckets = {
        name: dataclasses.asdict(bucket)
        | {"best": None if bucket.best is None else str(bucket.best)}
        for name, bucket in report.buckets.items()
    }
    return dataclasses.asdict(report) | {"buckets": buckets}


def restored_report(plain: Mapping[str, Any]) -> BanditReport:
    """What `plain_report` was given."""
    buckets = {
        name: BucketReport(
            **bucket
            | {"best": None if bucket["best"] is None else DraftStrategy.parse(bucket["best"])}
        )
        for name, bucket in plain["buckets"].items()
    }
    return BanditReport(**{**plain, "buckets": buckets})


def report_scalars(report: BanditReport) -> dict[str, float]:
    """`bandit/` figures: the step's choices, what they gained, by bucket what it is believed of.

    `best_verify_tokens` names the best arm by its tree size, 1 is plain decoding; `best_is_ngram`
    tells by 1 or 0 who drafts it.
    `bandit_shares/` holds the choices of each bucket apart.
    """
    scalars = {
        "bandit/decisions": float(report.num_decisions),
        "bandit/explore_share": report.explore_share,
        "bandit/regret_share": report.regret_share,
        "bandit/regret_s": report.regret_s,
    }
    if report.gain is not None:
        scalars["bandit/gain"] = report.gain
    for strategy, share in report.arm_shares.items():
        scalars[f"bandit/arm_share_{strategy}"] = share
    for name, bucket in report.buckets.items():
        scalars[f"bandit/tokens_per_s_batch_{name}"] = bucket.tokens_per_second
        if bucket.gain is not None:
            scalars[f"bandit/gain_batch_{name}"] = bucket.gain
        if bucket.predicted_gain is not None:
            scalars[f"bandit/predicted_gain_batch_{name}"] = bucket.predicted_gain
        if bucket.best is not None:
            scalars[f"bandit/best_verify_tokens_batch_{name}"] = float(bucket.best.verify_tokens)
            scalars[f"bandit/best_is_ngram_batch_{name}"] = float(bucket.best.drafter == "ngram")
        for strategy, share in bucket.arm_shares.items():
            scalars[f"bandit_shares/batch_{name}/{strategy}"] = share
    return scalars


def _engine(trainer: Trainer) -> RolloutEngine:
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    if datamodule is None:
        raise ValueError(
            "StrategyAdaptation needs a datamodule with a rollout engine, got none; pass a "
            "RolloutDataModule to Trainer.fit(datamodule=...)"
        )
    return cast(_RolloutSource, datamodule).engine
