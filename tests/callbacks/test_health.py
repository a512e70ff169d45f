"""The health check in a real Trainer, over the embedded engine: what it raises, drops and logs.

Policy, drafter, engine and Lightning are real; the data module is as small as it can be. Failures
are made by hand, where no publication can see them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader

from fastrl.callbacks.health import WeightHealth
from fastrl.rollout.torch_engine import TorchEngine
from fastrl.rollout.weight_differences import WeightError
from fastrl.types import RolloutBatch, SamplingParams
from tests.fake_run import make_batch
from tests.recording_logger import RecordingLogger
from tests.rollout.ranks import raised, run_ranks
from tests.rollout.tiny_models import make_drafter, make_prompts, make_target

SAMPLING = SamplingParams(max_tokens=8, ignore_eos=True)
NUM_STEPS = 4


class Rollouts(LightningDataModule):
    """One generation a step; `sabotage(engine, step)` runs between publication and check."""

    def __init__(self, folder: Path, engine: TorchEngine, sabotage: Any = None) -> None:
        super().__init__()
        self.folder, self.engine, self.sabotage = folder, engine, sabotage
        self.on_published: Any = None
        self.num_generated = 0

    def publish_policy(self) -> None:
        policy = self.trainer.lightning_module
        if self.engine.policy_version != policy.policy_version:
            self.engine.load_policy(policy.policy_tensors(), policy.policy_version)

    def train_dataloader(self) -> DataLoader[RolloutBatch]:
        return DataLoader(range(NUM_STEPS), batch_size=1, collate_fn=self.batch)

    def batch(self, _: list[int]) -> RolloutBatch:
        if self.num_generated == 0:
            self.engine.start(str(self.folder))
        self.publish_policy()
        if self.sabotage is not None:
            self.sabotage(self.engine, self.num_generated)
        if self.on_published is not None:
            self.on_published()
        self.engine.generate(make_prompts(6), SAMPLING, num_samples=2)
        self.num_generated += 1
        return make_batch(self.engine.stats())

    def transfer_batch_to_device(self, batch: RolloutBatch, *_: Any) -> RolloutBatch:
        return batch


class Policy(LightningModule):
    """Each step changes all weights a little."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.policy = model
        self.automatic_optimization = False
        self.rl_step = self.policy_version = 0

    def policy_tensors(self) -> Any:
        yield from self.policy.named_parameters()

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> None:
        self.optimizers().step()
        with torch.no_grad():
            for parameter in self.policy.parameters():
                parameter *= 1.01
        self.rl_step += 1
        self.policy_version += 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Run:
    """A training over tiny models, checked by a callback."""

    def __init__(
        self,
        folder: Path,
        sabotage: Any = None,
        dtype: str = "bfloat16",
        num_ranks: int = 1,
        **settings: Any,
    ) -> None:
        model = make_target(folder / "target")
        self.drafter = make_drafter(folder / "drafter", model)
        engine = TorchEngine(str(folder / "drafter"), "2_1_3", dtype=dtype, device="cpu")
        self.engine = engine
        self.data = Rollouts(folder / "target", engine, sabotage)
        self.logger = RecordingLogger(folder)
        self.trainer = Trainer(
            accelerator="cpu",
            devices=num_ranks,
            strategy="auto" if num_ranks == 1 else "ddp",
            use_distributed_sampler=False,
            max_epochs=1,
            logger=self.logger,
            callbacks=[WeightHealth(**settings)],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        self.policy = Policy(model)

    @property
    def gaps(self) -> list[float]:
        """Of the canaries, by step."""
        tag = "health/canary_gap"
        return [metrics[tag] for _, metrics in self.logger.logged if tag in metrics]

    def fit(self) -> None:
        self.trainer.fit(self.policy, datamodule=self.data)


def zero_drafter(engine: TorchEngine, step: int) -> None:
    """As a release of memory would, once."""
    if step == 1:
        assert engine._loaded is not None
        assert engine._loaded.drafter is not None
        assert engine._loaded.drafting is not None
        for parameter in engine._loaded.drafter.parameters():
            parameter.zero_()
        engine._loaded.drafting.refresh()  # what is served is laid out from these
        engine.wake()


def spoil_policy(engine: TorchEngine, step: int) -> None:
    if step == 2:
        assert engine._loaded is not None
        dict(engine._loaded.target._model.named_parameters())["model.norm.weight"].zero_()


def test_a_sound_run_passes_and_logs_the_gap(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.fit()
    assert run.data.num_generated == NUM_STEPS
    assert len(run.gaps) == NUM_STEPS
    assert all(0 < gap < 0.1 for gap in run.gaps)  # float32 against bfloat16
    assert run.data.on_published is None


def test_a_spoilt_policy_raises_before_anything_is_generated_from_it(tmp_path: Path) -> None:
    run = Run(tmp_path, spoil_policy, num_canaries=0, on_drafter_failure="fall_back")
    with pytest.raises(WeightError, match=r"policy version 2 .* model\.norm\.weight: all zero"):
        run.fit()
    assert run.data.num_generated == 2


def test_between_comparisons_canaries_tell(tmp_path: Path) -> None:
    run = Run(tmp_path, spoil_policy, every_n_publications=100)
    with pytest.raises(WeightError, match=r"policy version 2 does: .* differ by"):
        run.fit()
    blind = Run(tmp_path / "blind", spoil_policy, every_n_publications=100, num_canaries=0)
    blind.fit()  # nobody looks
    assert blind.gaps == []


def test_a_zeroed_drafter_raises_by_name(tmp_path: Path) -> None:
    run = Run(tmp_path, zero_drafter)
    with pytest.raises(WeightError, match=r"the drafter of .* fc\.weight: all zero.*fall_back"):
        run.fit()
    assert run.data.num_generated == 1


def test_a_zeroed_drafter_is_left_out_where_so_configured(tmp_path: Path) -> None:
    run = Run(tmp_path, zero_drafter, on_drafter_failure="fall_back")
    with pytest.warns(UserWarning, match="all zero.*Its strategies are left out"):
        run.fit()
    assert run.data.num_generated == NUM_STEPS
    stats = run.engine.stats()
    assert "2_1_3" not in stats.steps_by_strategy
    assert stats.num_tokens == 6 * 2 * SAMPLING.max_tokens


def test_a_drafter_that_the_engine_found_bad_raises_too(tmp_path: Path) -> None:
    def never_accepted(engine: TorchEngine, step: int) -> None:
        engine._health.min_acceptance, engine._health.window_rows = 1.1, 10

    run = Run(tmp_path, never_accepted)
    with (
        pytest.warns(UserWarning, match="accepted its first draft token"),
        pytest.raises(WeightError, match=r"accepted its first draft token.*on_drafter_failure"),
    ):
        run.fit()
    assert run.policy.rl_step == 0


def on_second_rank(sabotage: Any) -> Any:
    def spoil_one(engine: TorchEngine, step: int) -> None:
        if dist.get_rank() == 1:
            sabotage(engine, step)
        elif sabotage is zero_drafter and step == 1:
            engine.wake()  # as ranks do all together

    return spoil_one


def fit_on_two_ranks(folder: str, what: str) -> dict[str, Any]:
    """Each rank has an engine of its own; the second's is spoilt."""
    spoilt = {"policy": spoil_policy, "drafter": zero_drafter}[what]
    settings: dict[str, Any] = {"every_n_publications": 1, "on_drafter_failure": "fall_back"}
    run = Run(Path(folder), on_second_rank(spoilt), num_ranks=2, **settings)
    dist.barrier()  # the first rank has written the models
    result: dict[str, Any] = {}
    if what == "policy":
        result["raised"] = raised(run.fit)
    else:
        run.fit()
        result["strategies"] = set(run.engine.stats().steps_by_strategy)
    return result | {"generated": run.data.num_generated}


def test_what_one_rank_finds_all_raise_and_nobody_waits(tmp_path: Path) -> None:
    first, second = run_ranks(fit_on_two_ranks, tmp_path, str(tmp_path), "policy")
    for rank in (first, second):
        kind, message = rank["raised"]
        assert kind == "WeightError"
        assert "model.norm.weight: all zero" in message
        assert rank["generated"] == 2
    assert "(on rank 1)" in first["raised"][1]
    assert "(on rank 1)" not in second["raised"][1]


def test_a_drafter_that_is_bad_on_one_rank_is_left_out_on_all(tmp_path: Path) -> None:
    for rank in run_ranks(fit_on_two_ranks, tmp_path, str(tmp_path), "drafter"):
        assert rank == {"strategies": {"ngram_2_1_3"}, "generated": NUM_STEPS}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_publications": 0}, "every_n_publications must be >= 1, got 0"),
        ({"num_canaries": -1}, "num_canaries must be >= 0"),
        ({"canary_tolerance": 0.0}, "canary_tolerance must be > 0"),
        ({"on_drafter_failure": "ignore"}, "'raise' or 'fall_back', got ignore"),
    ],
)
def test_settings_without_meaning_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightHealth(**settings)


def test_a_run_without_an_engine_is_refused(tmp_path: Path) -> None:
    trainer = pl.Trainer(
        callbacks=[WeightHealth()], logger=False, accelerator="cpu", default_root_dir=tmp_path
    )
    policy = Policy(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="WeightHealth needs a datamodule"):
        trainer.fit(policy, DataLoader([torch.zeros(1)]))
