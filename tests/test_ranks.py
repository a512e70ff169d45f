"""Whole runs on two real processes, from YAML: what they sample, train, publish, log and resume is
what one process does.

A token is a function of seed, RL step, prompt, sample and position: the two ranks' rollouts
together are those of one. Models and task are the quickstart's.
"""

from __future__ import annotations

import functools
import io
import logging
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.tensor import DTensor

from fastrl.cli import FastRLCLI
from fastrl.types import RolloutBatch
from tests.rollout.ranks import run_ranks

ROOT = Path(__file__).parents[1]
NUM_STEPS = 3
SHARDED = "fsdp"
WHOLE = "ddp"
ALONE = "alone"

Run = Callable[..., list[dict[str, Any]]]


class Recorder(Callback):
    """Keeps each training step's rollouts and what was logged of it; can have the last rank be told
    to end after the rollouts of a step."""

    def __init__(self, terminate_at: int | None) -> None:
        self.terminate_at = terminate_at
        self.steps: list[dict[tuple[int, int], tuple[tuple[int, ...], float]]] = []
        self.versions: list[int] = []
        self.logged: list[dict[str, float]] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: RolloutBatch, batch_idx: int
    ) -> None:
        if batch_idx == self.terminate_at and trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: RolloutBatch,
        batch_idx: int,
    ) -> None:
        self.steps.append(
            {
                (one.prompt.prompt_id, one.sample_index): (tuple(one.tokens), reward)
                for one, reward in zip(batch.rollouts, batch.rewards_B.tolist(), strict=True)
            }
        )
        self.versions += batch.policy_version_B.unique().tolist()
        metrics = trainer._logger_connector.metrics["log"]
        self.logged.append({name: float(value) for name, value in metrics.items()})


def strategy_options(name: str, num_ranks: int) -> list[str]:
    if name == ALONE:
        return []
    if name == WHOLE:
        return [f"--trainer.devices={num_ranks}", "--trainer.strategy=ddp"]
    strategy = "--trainer.strategy.init_args."
    return [
        f"--trainer.devices={num_ranks}",
        "--trainer.strategy=lightning.pytorch.strategies.ModelParallelStrategy",
        f"{strategy}data_parallel_size={num_ranks}",
        f"{strategy}tensor_parallel_size=1",
        f"{strategy}save_distributed_checkpoint=false",
    ]


def fit(folder: str, *options: str, terminate_at: int | None = None) -> dict[str, Any]:
    """The quickstart, smaller, without what trains its drafter; one rank of it."""
    logging.disable()
    sys.argv = ["fastrl"]
    recorder = Recorder(terminate_at)

    class RecordingCLI(FastRLCLI):
        def instantiate_trainer(self, **kwargs: Any) -> Trainer:
            trainer = super().instantiate_trainer(**kwargs)
            trainer.callbacks.append(recorder)
            made.update(trainer=trainer, module=self.model)
            return trainer

    made: dict[str, Any] = {}
    arguments = [
        "fit",
        f"--config={ROOT}/configs/quickstart.yaml",
        f"--model.init_args.model_path={ROOT}/models/quickstart/policy",
        f"--data.init_args.engine.init_args.drafter_path={ROOT}/models/quickstart/drafter",
        "--data.init_args.engine.init_args.strategy=4_1_5",
        "--trainer.callbacks=null",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        f"--trainer.default_root_dir={folder}",
        f"--trainer.val_check_interval={NUM_STEPS}",
        f"--data.init_args.num_steps={NUM_STEPS}",
        "--data.init_args.prompts_per_step=4",
        "--data.init_args.group_size=4",
        "--data.init_args.sampling.max_tokens=64",
        "--data.init_args.prompts.init_args.num_held_out=6",
        "--data.init_args.reward_workers=1",
        *options,
    ]
    with pytest.raises(SystemExit) if terminate_at is not None else nullcontext():
        RecordingCLI(arguments)
    trainer, module = made["trainer"], made["module"]
    return {
        "steps": recorder.steps,
        "versions": recorder.versions,
        "logged": recorder.logged,
        "held_out": float(trainer.callback_metrics.get("reward/held_out", math.nan)),
        "weights": {name: whole(one) for name, one in module.policy.named_parameters()},
        "is_sharded": all(isinstance(one, DTensor) for one in module.policy.parameters()),
        "rl_step": module.rl_step,
    }


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def fit_on_ranks(folder: str, strategy: str, *options: str) -> dict[str, Any]:
    return fit(folder, *strategy_options(strategy, dist.get_world_size()), *options)


def stopped_on_ranks(folder: str, strategy: str) -> dict[str, Any]:
    options = strategy_options(strategy, dist.get_world_size())
    return fit(folder, *options, terminate_at=NUM_STEPS - 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    """All steps under a strategy, or those before the last; each is run once."""

    @functools.cache
    def run_once(strategy: str, num_ranks: int, num_steps: int = NUM_STEPS) -> list[dict[str, Any]]:
        place = folder / f"{strategy}{num_ranks}-{num_steps}"
        steps = (f"--data.init_args.num_steps={num_steps}",)
        validations = (f"--trainer.val_check_interval={num_steps}",)
        return run_ranks(
            fit_on_ranks,
            place / "ranks",
            *(str(place / "run"), strategy, *steps, *validations),
            num_ranks=num_ranks,
        )

    return run_once


@pytest.fixture(scope="module")
def alone(run: Run) -> dict[str, Any]:
    """One process, as it is without a strategy."""
    return run(ALONE, 1)[0]


def assert_the_same_policy(run: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, tensor in expected["weights"].items():
        torch.testing.assert_close(run["weights"][name], tensor, atol=2e-4, rtol=0, msg=name)


@pytest.mark.parametrize("strategy", [SHARDED, WHOLE])
def test_a_run_on_two_ranks_is_that_of_one(strategy: str, run: Run, alone: dict[str, Any]) -> None:
    ranks = run(strategy, 2)
    for rank in ranks:
        assert rank["is_sharded"] is (strategy == SHARDED)
        assert rank["versions"] == list(range(NUM_STEPS))  # lag 0: each step's own policy
        assert rank["held_out"] == pytest.approx(alone["held_out"])
        assert_the_same_policy(rank, alone)
    for step, expected in enumerate(alone["steps"]):
        parts = [rank["steps"][step] for rank in ranks]
        assert all(len(part) == len(expected) / 2 for part in parts)
        assert parts[0] | parts[1] == expected
    for step, expected in enumerate(alone["logged"]):
        own = {name: value for name, value in expected.items() if is_of_all_ranks(name)}
        assert {"policy/loss", "policy/grad_norm", "policy/entropy", "reward/mean"} <= set(own)
        for rank in ranks:
            logged = {name: rank["logged"][step][name] for name in own}
            assert logged == pytest.approx(own, rel=2e-3, abs=1e-5)


def is_of_all_ranks(name: str) -> bool:
    return name.startswith(("policy/", "reward/")) or name == "step"


def resumed(
    run: Run, folder: Path, tmp_path: Path, before: tuple[str, int], after: tuple[str, int]
) -> list[dict[str, Any]]:
    """Ranks of a run that took all steps but the last one way, and takes that another way."""
    run(*before, NUM_STEPS - 1)
    shutil.copytree(folder / f"{before[0]}{before[1]}-{NUM_STEPS - 1}" / "run", tmp_path / "run")
    strategy, num_ranks = after
    return run_ranks(
        fit_on_ranks,
        tmp_path / "ranks",
        *(str(tmp_path / "run"), strategy, "--ckpt_path=last"),
        num_ranks=num_ranks,
    )


@pytest.mark.parametrize("strategy", [SHARDED, WHOLE])
def test_a_resumed_run_on_two_ranks_is_one_that_was_not_stopped(
    strategy: str, run: Run, folder: Path, tmp_path: Path
) -> None:
    again = resumed(run, folder, tmp_path, (strategy, 2), (strategy, 2))
    for rank, wanted in zip(again, run(strategy, 2), strict=True):
        assert rank["rl_step"] == NUM_STEPS
        assert rank["steps"] == wanted["steps"][-1:]
        own = {name: value for name, value in wanted["logged"][-1].items() if is_of_all_ranks(name)}
        assert {name: rank["logged"][-1][name] for name in own} == own
        for name, tensor in wanted["weights"].items():
            assert torch.equal(rank["weights"][name], tensor), name


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((SHARDED, 2), (SHARDED, 1)),
        ((SHARDED, 2), (ALONE, 1)),
        ((ALONE, 1), (SHARDED, 2)),
        ((WHOLE, 2), (SHARDED, 2)),
    ],
    ids=lambda one: f"{one[0]} {one[1]}",
)
def test_a_checkpoint_goes_on_under_other_ranks(
    before: tuple[str, int],
    after: tuple[str, int],
    run: Run,
    folder: Path,
    tmp_path: Path,
    alone: dict[str, Any],
) -> None:
    ranks = resumed(run, folder, tmp_path, before, after)
    together: dict[Any, Any] = {}
    for rank in ranks:
        together |= rank["steps"][0]
        assert rank["rl_step"] == NUM_STEPS
        assert_the_same_policy(rank, alone)
    assert together == alone["steps"][-1]


@pytest.mark.parametrize("strategy", [SHARDED, WHOLE])
def test_a_signal_to_one_rank_ends_all_after_a_step_that_is_saved(
    strategy: str, tmp_path: Path
) -> None:
    for rank in run_ranks(stopped_on_ranks, tmp_path / "ranks", str(tmp_path / "run"), strategy):
        assert rank["rl_step"] == NUM_STEPS - 1
    (saved,) = (tmp_path / "run").rglob("last.ckpt")
    assert torch.load(saved, weights_only=True)["rl_step"] == NUM_STEPS - 1


def refused(folder: str, strategy: str, *options: str) -> str:
    with pytest.raises(SystemExit), redirect_stderr(io.StringIO()) as said:
        fit_on_ranks(folder, strategy, *options)
    return said.getvalue()


def test_checkpoints_that_are_not_whole_files_are_refused(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes(b"x" * 1000)
    for option, expected in (
        (
            "--trainer.strategy.init_args.save_distributed_checkpoint=true",
            "set save_distributed_checkpoint to false in its init_args",
        ),
        (f"--ckpt_path={damaged}", f"checkpoint {damaged} is corrupt"),
    ):
        (said,) = run_ranks(
            refused, tmp_path / "ranks", *(str(tmp_path / "run"), SHARDED, option), num_ranks=1
        )
        assert expected in said
