"""Several ranks believe the same of strategies, learned from the steps of all."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from fastrl.callbacks import StrategyAdaptation
from fastrl.callbacks.strategy_adaptation import in_turns
from fastrl.rollout.bandit import BucketedEpsilonGreedy
from fastrl.rollout.bandit_base import Bandit
from fastrl.rollout.model_bandit import ModelBased
from fastrl.types import OFF
from tests.callbacks.test_strategy_adaptation import (
    BATCHES,
    FakeEngine,
    FakeRollouts,
    TinyPolicy,
    step,
    trainer,
)


class SavedByRank(StrategyAdaptation):
    """Writes each rank's beliefs and choices where the parent process finds them."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        engine = trainer.datamodule.engine  # type: ignore[attr-defined]
        result = {"state": self.state_dict(), "chosen": engine.chosen}
        folder = Path(trainer.default_root_dir)
        (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(result))


def ranks_after_three_steps(bandit: Bandit, folder: Path) -> tuple[Any, Any]:
    """What two ranks hold, one of which is half a second slower at each step; what they measured
    is each one's own."""
    trainer(folder, SavedByRank(bandit), strategy="ddp_fork", devices=2).fit(
        TinyPolicy(), FakeRollouts(FakeEngine(rank_delay=0.5), 3)
    )
    first, second = (json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1))
    for rank in (first, second):
        del rank["state"]["bandit"]["period"], rank["state"]["last_report"]
    return first, second


def test_two_ranks_hold_the_same_beliefs_learned_from_both(tmp_path: Path) -> None:
    bandit = BucketedEpsilonGreedy(["4_2_8"], epsilon=0.3, window_size=40)
    first, second = ranks_after_three_steps(bandit, tmp_path)
    assert first["state"] == second["state"]
    windows = first["state"]["bandit"]["windows"]
    steps = [step for bucket in windows for window in bucket for step in window["steps"]]
    assert len(steps) == 2 * 3 * len(BATCHES)
    assert sum(seconds > 0.5 for _, _, seconds in steps) == 3 * len(BATCHES)
    bandit.reseed(3)
    version, words, _ = bandit.state_dict()["rng"]
    assert first["state"]["bandit"]["rng"] == [version, list(words), None]


def test_two_ranks_hold_the_same_model_learned_from_both(tmp_path: Path) -> None:
    first, second = ranks_after_three_steps(ModelBased(["4_2_8", "2_1_3"]), tmp_path)
    assert first["state"] == second["state"]
    bandit = first["state"]["bandit"]
    by_bucket = [sum(len(b[i]) - 1 for b in bandit["cost"]["ratios"] if b[i]) for i in range(7)]
    steps_by_bucket = [
        2 * 3 * sum(low <= size <= high for size in BATCHES)
        for low, high in ((1, 1), (2, 4), (5, 8), (9, 16), (17, 32), (33, 64), (65, 999))
    ]
    assert by_bucket == [min(steps, 3 * 30) for steps in steps_by_bucket]
    # One row: enough controls were seen of both ranks, so that the next is far off.
    steps = bandit["steps"]
    assert 150 < steps["control_at"][0] - steps["in_bucket"][0] <= 200


def test_steps_of_ranks_are_learned_in_turns() -> None:
    first, second, third = ([step(OFF, rank + 1, 0.1 * i) for i in (1, 2, 3)] for rank in range(3))
    steps = list(in_turns([first, second[:1], third[:2]]))
    assert steps == [first[0], second[0], third[0], first[1], third[1], first[2]]
